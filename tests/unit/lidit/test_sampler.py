"""Samplers against closed forms and diffusers' numbers; guidance against its formula; images against their batch.

A Gaussian data distribution has a closed-form model, and its probability flow maps noise to `mean + deviation * noise`: what
a sampler must reach is known for every element.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from lidit.diffusion import DDPM, Flow, draw, loss_per_sample
from lidit.sampler import (
    PromptBatch,
    SamplerConfig,
    dpm_scheduler,
    euler,
    flow_sigmas,
    guided,
    initial_noise,
    sample,
)

pytestmark = pytest.mark.unit

DEVIATION = 0.5
SHAPE = (4, 16, 16)
UNGUIDED = SamplerConfig(guidance_scale=1)


class GaussianModel(torch.nn.Module):
    """The best possible model where a prompt's latents are N(mean of its states, DEVIATION^2); notes how it was called."""

    def __init__(self, objective):
        super().__init__()
        self.objective, self.calls = objective, []

    def forward(self, noisy_latents, timestep, prompt_embeds, prompt_mask, instruction_embeds):
        assert timestep.dtype == torch.float32 and timestep.shape == (len(noisy_latents),)
        self.calls.append((len(noisy_latents), timestep[0].item()))
        embeds, mask = prompt_embeds["one"], prompt_mask["one"]
        mean = (embeds[..., 0] * mask).sum(1) / mask.sum(1).clamp(min=1)
        mean, t = mean.reshape(-1, 1, 1, 1), timestep.reshape(-1, 1, 1, 1)
        if isinstance(self.objective, Flow):
            alpha, sigma = 1 - t, t
        else:
            alpha_bar = self.objective.alpha_bar(timestep).reshape(-1, 1, 1, 1)
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        score = (noisy_latents - alpha * mean) / (alpha**2 * DEVIATION**2 + sigma**2)
        noise, latents = sigma * score, mean + alpha * DEVIATION**2 * score
        return self.objective.target(latents, noise, timestep)


def prompts_of(*means, padding=0):
    """A prompt of one token per mean (none where it is None), for an encoder of width 1."""
    longest = max([padding, *(mean is not None for mean in means)])
    embeds, mask = torch.zeros(len(means), longest, 1), torch.zeros(len(means), longest, dtype=torch.bool)
    for row, mean in enumerate(means):
        if mean is not None:
            embeds[row, 0, 0], mask[row, 0] = mean, True
    return PromptBatch({"one": embeds}, {"one": mask}, {"one": torch.zeros(2, 1)})


def noise_of(count, shape=SHAPE):
    return initial_noise([torch.Generator().manual_seed(seed) for seed in range(count)], shape)


# -- samplers against closed forms ------------------------------------------------------------------------------------


def gaussian_error(objective, steps, **options):
    """Root mean square distance of samples from where the probability flow ends."""
    noise, means = noise_of(3), (-1.0, 0.0, 2.0)
    config = SamplerConfig(steps, guidance_scale=1, **options)
    latents = sample(GaussianModel(objective), objective, noise, prompts_of(*means), config=config)
    wanted = torch.tensor(means).reshape(-1, 1, 1, 1) + DEVIATION * noise
    for row, mean in enumerate(means):
        assert latents[row].mean() == pytest.approx(mean, abs=0.1)
    return float((latents - wanted).square().mean().sqrt())


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"spacing": "diffusers"}, {"spacing": "diffusers_dynamic"}])
def test_euler_reaches_the_gaussian(options):
    assert gaussian_error(Flow(), 400, **options) < 0.01


def test_euler_converges_with_order_one():
    coarse, fine = gaussian_error(Flow(), 50), gaussian_error(Flow(), 100)
    assert coarse / fine == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_dpm_solver_reaches_the_gaussian(kind):
    objective = DDPM(prediction_type=kind)
    assert gaussian_error(objective, 200) < 0.01
    assert gaussian_error(objective, 20) < 0.06, "20 steps are enough for this solver"


def test_shift_of_the_objective_is_the_default():
    noise, prompts = noise_of(1), prompts_of(0.0)

    def timesteps(objective, **options):
        model = GaussianModel(objective)
        sample(model, objective, noise, prompts, config=SamplerConfig(5, 1, **options))
        return [timestep for _, timestep in model.calls]

    assert timesteps(Flow(shift=3.0)) == timesteps(Flow(), shift=3.0) == flow_sigmas(5, 3.0)[:-1].tolist()
    assert timesteps(Flow(shift=3.0), shift=1.0) == timesteps(Flow()) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_ddpm_model_is_asked_at_the_schedulers_steps(steps):
    objective = DDPM()
    model, scheduler = GaussianModel(objective), dpm_scheduler(objective)
    scheduler.set_timesteps(steps)
    sample(model, objective, noise_of(1), prompts_of(0.0), config=SamplerConfig(steps, 1))
    asked = [timestep for _, timestep in model.calls]
    assert asked == pytest.approx([(step + 1) / 1000 for step in scheduler.timesteps.tolist()])
    assert asked[0] == 1.0 and len(asked) == steps


def test_ddpm_scheduler_has_the_objectives_table():
    objective = DDPM(num_steps=100, beta_start=1e-3, beta_end=0.05)
    timestep = (torch.arange(100) + 1) / 100
    torch.testing.assert_close(
        dpm_scheduler(objective).alphas_cumprod, objective.alpha_bar(timestep), rtol=1e-4, atol=0
    )


# -- sigmas against diffusers -----------------------------------------------------------------------------------------


def test_sigmas_and_euler_steps_are_those_of_diffusers(data):
    cases = json.loads((data / "golden" / "flow_match_euler.json").read_text())["cases"]
    assert len(cases) == 14
    for case in cases:
        dynamic = case["mu"] is not None
        shift = math.exp(case["mu"]) if dynamic else case["config"]["shift"]
        sigmas = flow_sigmas(case["num_inference_steps"], shift, "diffusers_dynamic" if dynamic else "diffusers")
        torch.testing.assert_close(sigmas, torch.tensor(case["sigmas"]), rtol=0, atol=1e-7)
        seen = []
        start = torch.tensor([1.0, -2.0, 0.25]).reshape(1, 3, 1, 1)
        few = sigmas[: len(case["step"]) + 1]
        euler(lambda x, _: x * 0.5, start, few, lambda done, steps, x, seen=seen: seen.append(x.flatten()))
        torch.testing.assert_close(torch.stack(seen), torch.tensor(case["step"]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 5, 28])
def test_spacing_of_diffusers_is_that_of_the_one_installed(shift, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(flow_sigmas(steps, shift, "diffusers"), theirs.sigmas, rtol=0, atol=1e-7)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(steps, mu=math.log(shift))
    torch.testing.assert_close(flow_sigmas(steps, shift, "diffusers_dynamic"), theirs.sigmas, rtol=0, atol=1e-7)


def test_linear_sigmas_are_shifted_once():
    assert flow_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert flow_sigmas(4, shift=3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("spacing", ["linear", "diffusers", "diffusers_dynamic"])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_sigmas_fall_from_1_to_0(spacing, steps):
    sigmas = flow_sigmas(steps, 3.0, spacing)
    assert sigmas.shape == (steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())


# -- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.5])
def test_guidance_is_its_formula(make_model, make_inputs, scale):
    """On a LIDiT, against two calls of their own: so the unconditional half has its own length, mask and pooled prompt."""
    model = make_model()
    inputs = make_inputs(model, rows=(0, 2))
    empty = make_inputs(model, rows=(3, 1))  # row 3 is empty for one encoder and both are shorter
    prompts, negative = batch_of(inputs), batch_of(empty)
    noisy = inputs["noisy_latents"]
    with torch.no_grad():
        made = guided(model, prompts, negative, SamplerConfig(guidance_scale=scale))(noisy, 0.3)
        timestep = torch.full((2,), 0.3)
        conditional = model(**{**inputs, "timestep": timestep})
        unconditional = model(**{**empty, "noisy_latents": noisy, "timestep": timestep})
    torch.testing.assert_close(made, unconditional + scale * (conditional - unconditional), rtol=0, atol=2e-5)
    assert (conditional - unconditional).abs().max() > 1e-2, "the two halves are alike: nothing was tested"


def batch_of(inputs):
    return PromptBatch(inputs["prompt_embeds"], inputs["prompt_mask"], inputs["instruction_embeds"])


def test_guidance_moves_the_mean_as_its_formula_says():
    """For Gaussians of one deviation the guided velocity is that of the extrapolated mean, at every timestep."""
    noise = noise_of(2)
    config = SamplerConfig(400, guidance_scale=3.0)
    latents = sample(GaussianModel(Flow()), Flow(), noise, prompts_of(1.0, 2.0), prompts_of(None, 1.5), config)
    for row, mean in enumerate([0 + 3 * (1.0 - 0), 1.5 + 3 * (2.0 - 1.5)]):
        torch.testing.assert_close(latents[row], mean + DEVIATION * noise[row], rtol=0, atol=0.06)


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_both_halves_are_asked_in_one_call(objective):
    model = GaussianModel(objective)
    sample(model, objective, noise_of(3), prompts_of(1, 2, 3), prompts_of(None, None, None), SamplerConfig(6, 4.5))
    assert [rows for rows, _ in model.calls] == [6] * 6


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_no_guidance_asks_for_the_prompt_alone(objective):
    noise, prompts, model = noise_of(3), prompts_of(1, 2, 3), GaussianModel(objective)
    alone = sample(model, objective, noise, prompts, None, SamplerConfig(6, 1))
    assert [rows for rows, _ in model.calls] == [3] * 6
    assert torch.equal(alone, sample(model, objective, noise, prompts, prompts_of(9, 9, 9), SamplerConfig(6, 1)))


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_guidance_interval(objective):
    noise, prompts, negative = noise_of(2), prompts_of(1, 2), prompts_of(None, None)
    model = GaussianModel(objective)
    config = SamplerConfig(20, 3.0, guidance_interval=(0.3, 0.7))
    latents = sample(model, objective, noise, prompts, negative, config)
    assert [rows == 4 for rows, _ in model.calls] == [0.3 <= timestep <= 0.7 for _, timestep in model.calls]
    assert {rows for rows, _ in model.calls} == {2, 4}
    with_all, with_none = (
        sample(model, objective, noise, prompts, negative, SamplerConfig(20, scale)) for scale in (3.0, 1.0)
    )
    assert bool((with_none.mean((1, 2, 3)) < latents.mean((1, 2, 3))).all())
    assert bool((latents.mean((1, 2, 3)) < with_all.mean((1, 2, 3))).all())


def test_guidance_needs_something_to_lead_away_from():
    with pytest.raises(ValueError, match=r"guidance_scale 4.5: expected the negative or empty prompts, received none"):
        sample(GaussianModel(Flow()), Flow(), noise_of(1), prompts_of(1.0))


def test_prompts_without_any_token(make_model, make_inputs):
    """L = 0 for every encoder, on both sides: what an LLM that gives the empty prompt no token leads to."""
    model = make_model()
    inputs = make_inputs(model, rows=(3, 4), lengths={"one": [0] * 5, "two": [0] * 5})
    assert all(embeds.shape[1] == 0 for embeds in inputs["prompt_embeds"].values())
    prompts = batch_of(inputs)
    for objective in (Flow(), DDPM()):
        latents = sample(model, objective, inputs["noisy_latents"], prompts, prompts, SamplerConfig(3))
        assert bool(torch.isfinite(latents).all())


# -- an image and its batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Flow(shift=3.0), DDPM()])
def test_an_image_does_not_depend_on_its_batch(make_model, make_inputs, objective):
    model, rows = make_model(), (0, 1, 2, 3, 4)
    empty = (3, 3, 3, 3, 3)
    config = SamplerConfig(4, 3.0)

    def images(some, padding=0):
        prompts = batch_of(make_inputs(model, rows=some, padding=padding))
        negative = batch_of(make_inputs(model, rows=empty[: len(some)]))
        noise = initial_noise([torch.Generator().manual_seed(row) for row in some], (4, 6, 10))
        return sample(model, objective, noise, prompts, negative, config)

    together = images(rows)
    assert len(torch.unique(together)) == together.numel(), "the images are alike: nothing was tested"
    rounding = 2e-5 * float(together.abs().max())  # an untrained model's epsilon makes latents of a hundred and more
    for some in ((2,), (4, 0), (3, 2, 1)):
        torch.testing.assert_close(images(some), together[list(some)], rtol=0, atol=rounding)
    torch.testing.assert_close(images(rows, padding=5), together, rtol=0, atol=rounding)


def test_noise_belongs_to_the_generator():
    four = noise_of(4)
    assert four.dtype == torch.float32 and four.std() == pytest.approx(1, abs=0.05)
    alone = initial_noise([torch.Generator().manual_seed(2)], SHAPE)
    assert torch.equal(alone[0], four[2])


def test_generators_of_a_gpu_are_refused():
    generators = [torch.Generator(), SimpleNamespace(device=torch.device("cuda:0"))]
    with pytest.raises(ValueError, match=r"expected torch.Generator on the CPU, received some on cuda:0"):
        initial_noise(generators, SHAPE)


def test_rows_and_join_of_prompt_batches():
    first, second = prompts_of(1.0, None), prompts_of(None, padding=3)
    joined = first.join(second)
    assert joined.prompt_embeds["one"].shape == (3, 3, 1) and joined.prompt_mask["one"].sum(1).tolist() == [1, 0, 0]
    assert joined.prompt_embeds["one"][0, 0, 0] == 1 and joined.instruction_embeds is first.instruction_embeds
    again = second.join(first).rows([1, 1, 0])
    assert again.prompt_mask["one"].sum(1).tolist() == [1, 1, 0] and again.prompt_embeds["one"][1, 0, 0] == 1


# -- progress and configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_progress(objective):
    seen = []
    latents = sample(
        GaussianModel(objective), objective, noise_of(2), prompts_of(1, 2), None, SamplerConfig(3, 1),
        on_step=lambda done, steps, so_far: seen.append((done, steps, so_far.clone())),
    )  # fmt: skip
    assert [(done, steps) for done, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(seen[-1][2], latents) and not torch.equal(seen[0][2], latents)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number >= 1"),
        ({"guidance_scale": -1.0}, "guidance_scale: expected a number >= 0"),
        ({"guidance_interval": (0.7, 0.3)}, "0 <= from <= to <= 1, received 0.7 and 0.3"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"shift": 0.0}, "shift: expected a number > 0 or null"),
        ({"spacing": "karras"}, "spacing: expected linear, .* received 'karras'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SamplerConfig(**options)


def test_more_steps_than_the_chain_has():
    with pytest.raises(ValueError, match=r"less than the 10 steps of the chain, received 10"):
        sample(GaussianModel(DDPM()), DDPM(num_steps=10), noise_of(1), prompts_of(1.0), config=SamplerConfig(10, 1))


# -- the whole path: draw, loss, optimizer, sample --------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Flow(), DDPM(), DDPM(prediction_type="v")], ids=["flow", "epsilon", "v"])
def test_a_model_learns_two_prompts(make_model, objective):
    """Two prompts, two constant images: the loss falls, and each prompt gives its own image."""
    model = make_model(awake=False, encoders=1, depth=1)
    width = model.config.encoders["one"]
    embeds = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    prompts = PromptBatch({"one": embeds}, {"one": torch.ones(2, 3, dtype=torch.bool)}, {"one": torch.zeros(0, width)})
    images = torch.stack([torch.full((4, 4, 4), 1.0), torch.full((4, 4, 4), -1.0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for step in range(120):
        rows = torch.arange(16) % 2
        timestep, noise = draw(objective, 0, range(step * 16, step * 16 + 16), images.shape[1:])
        batch = prompts.rows(rows.tolist())
        noisy_latents = objective.add_noise(images[rows], noise, timestep)
        prediction = model(noisy_latents, timestep, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds)
        loss = loss_per_sample(objective, prediction, images[rows], noise, timestep).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    made = sample(model, objective, noise_of(2, (4, 4, 4)), prompts, config=SamplerConfig(20, 1))
    assert made[0].median() > 0.5 and made[1].median() < -0.5
