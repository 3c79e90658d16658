"""Objectives against their definitions and diffusers' tables, and randomness that depends on (seed, image number) alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from lidit import diffusion
from lidit.diffusion import (
    DDPM,
    STREAMS,
    Flow,
    draw,
    loss_per_sample,
    objective_from_dict,
    objective_to_dict,
    sample_rng,
    shift_timestep,
    timestep_bins,
)

pytestmark = pytest.mark.unit

SHAPE = (4, 6, 10)
OBJECTIVES = [Flow(), Flow(shift=3.0), DDPM(), DDPM(prediction_type="v")]


def batch(objective, count=5, seed=0):
    """latents, noise (B, C, H, W) and timesteps (B,) that differ from sample to sample."""
    timestep, noise = draw(objective, seed, range(count), SHAPE)
    latents = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.3
    return latents, noise, timestep


def grid(count):
    """Midpoints of `count` equal parts of [0, 1]: a distribution's own quantiles, without luck."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_timestep_0_is_data_and_1_is_noise(objective):
    latents, noise, _ = batch(objective)
    torch.testing.assert_close(objective.add_noise(latents, noise, torch.zeros(5)), latents, rtol=0, atol=0)
    left = 0.0 if isinstance(objective, Flow) else math.sqrt(4.04e-5)  # linear betas end at this share of the data
    end = objective.add_noise(latents, noise, torch.ones(5))
    torch.testing.assert_close(end, noise * math.sqrt(1 - left**2) + left * latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_sample_has_its_own_timestep(objective):
    latents, noise, timestep = batch(objective)
    together = objective.add_noise(latents, noise, timestep)
    targets = objective.target(latents, noise, timestep)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(together[one], objective.add_noise(latents[one], noise[one], timestep[one]))
        assert torch.equal(targets[one], objective.target(latents[one], noise[one], timestep[one]))


def test_flow_target_is_the_derivative_by_time():
    objective = Flow()
    latents, noise, timestep = (value.double() for value in batch(objective))
    step = 1e-3
    after, before = (objective.add_noise(latents, noise, timestep + sign * step) for sign in (1, -1))
    torch.testing.assert_close((after - before) / (2 * step), objective.target(latents, noise, timestep))


# -- ddpm against diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_ddpm_is_the_one_of_diffusers(kind):
    objective = DDPM(prediction_type=kind)
    latents, noise, _ = batch(objective)
    steps = torch.tensor([0, 1, 499, 998, 999])
    timestep = (steps + 1) / 1000
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(objective.alpha_bar(timestep), theirs.alphas_cumprod[steps], rtol=1e-4, atol=0)
    torch.testing.assert_close(
        objective.add_noise(latents, noise, timestep), theirs.add_noise(latents, noise, steps), rtol=0, atol=1e-5
    )
    wanted = noise if kind == "epsilon" else theirs.get_velocity(latents, noise, steps)
    torch.testing.assert_close(objective.target(latents, noise, timestep), wanted, rtol=0, atol=1e-5)


def test_every_step_of_the_chain_is_told_from_its_timestep():
    objective = DDPM()
    timestep = (torch.arange(1000) + 1) / 1000  # float32, rounded
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(objective.alpha_bar(timestep).numpy(), np.cumprod(1 - betas), rtol=1e-6)


def test_ddpm_table_made_under_inference_mode_serves_training():
    objective = DDPM(beta_end=0.0199, min_snr_gamma=5.0)  # no other test has put it into the cache
    latents, noise, timestep = batch(objective)
    with torch.inference_mode():
        objective.add_noise(latents, noise, timestep)
    prediction = torch.zeros_like(latents, requires_grad=True)
    loss_per_sample(objective, prediction, latents, noise, timestep).sum().backward()
    assert prediction.grad is not None and bool(prediction.grad.abs().sum() > 0)


# -- which timesteps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.5)])
def test_flow_timesteps_are_logit_normal(mean, std):
    timestep = Flow(logit_mean=mean, logit_std=std).timestep_at(grid(20_000)).double()
    logit = torch.logit(timestep)
    assert logit.mean() == pytest.approx(mean, abs=1e-3) and logit.std() == pytest.approx(std, rel=1e-3)
    inside = ((logit - mean).abs() < std).double().mean()
    assert inside == pytest.approx(0.6827, abs=1e-3), "not normal"


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_shift_moves_the_median(shift):
    for density in ("logit_normal", "uniform"):
        timestep = Flow(shift=shift, density=density).timestep_at(grid(1001))
        assert timestep.median() == pytest.approx(shift / (1 + shift), rel=1e-5)
        assert bool((timestep.diff() > 0).all()) and timestep.min() > 0 and timestep.max() < 1


def test_shift_table_is_that_of_diffusers(data):
    golden = json.loads((data / "golden" / "flow_match_euler.json").read_text())["train_table_shift3"]
    table = shift_timestep(torch.arange(1000, 0, -1) / 1000, 3.0)
    assert len(table) == golden["len"]
    torch.testing.assert_close(table[:5], torch.tensor(golden["first5_sigmas"]))
    torch.testing.assert_close(table[-5:], torch.tensor(golden["last5_sigmas"]))


@pytest.mark.parametrize("objective", [Flow(), Flow(shift=6.0), Flow(density="uniform"), DDPM()])
def test_ends_of_the_uniform_numbers_are_fine(objective):
    timestep = objective.timestep_at(torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64))
    assert bool(torch.isfinite(timestep).all()) and timestep.min() >= 0 and timestep.max() <= 1


def test_ddpm_timesteps_are_each_step_equally_often():
    timestep = DDPM().timestep_at(grid(5000))
    steps, counts = torch.unique((timestep * 1000).round().long() - 1, return_counts=True)
    assert steps.tolist() == list(range(1000)) and set(counts.tolist()) == {5}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_timesteps_from_a_generator(objective):
    first, again = (objective.sample_timestep(64, torch.Generator().manual_seed(1)) for _ in range(2))
    other = objective.sample_timestep(64, torch.Generator().manual_seed(2))
    assert first.shape == (64,) and torch.equal(first, again) and not torch.equal(first, other)


# -- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_mean_square_of_each_sample(objective):
    latents, noise, timestep = batch(objective)
    prediction = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    loss = loss_per_sample(objective, prediction, latents, noise, timestep)
    for row in range(5):
        target = objective.target(latents, noise, timestep)[row]
        assert loss[row] == pytest.approx(float(((prediction[row] - target) ** 2).mean()), rel=1e-5)
    assert bool((loss_per_sample(objective, target_of(objective), latents, noise, timestep) == 0).all())


def target_of(objective):
    return objective.target(*batch(objective))


def test_loss_is_float32_though_the_model_is_not():
    objective = Flow()
    latents, noise, timestep = batch(objective)
    prediction = torch.full((5, *SHAPE), 3.0, dtype=torch.bfloat16)
    loss = loss_per_sample(objective, prediction, latents.bfloat16(), noise, timestep)
    wanted = loss_per_sample(objective, prediction.float(), latents.bfloat16().float(), noise, timestep)
    assert loss.dtype == torch.float32 and torch.equal(loss, wanted)


@pytest.mark.parametrize("objective", [Flow(), DDPM(), DDPM(prediction_type="v")])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_in_the_latents(objective, gamma):
    """The definition: whatever is predicted, the loss is min(SNR, gamma) times the square of what the latents are off."""
    objective = dataclasses.replace(objective, min_snr_gamma=gamma)
    latents, noise, _ = (value.double() for value in batch(objective))
    timestep = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
    off = torch.full_like(latents, 0.1)  # the model sees noisy_latents and believes in latents + off
    if isinstance(objective, Flow):
        alpha, sigma = 1 - timestep, timestep
    else:
        alpha, sigma = (
            objective.alpha_bar(timestep).double().sqrt(),
            (1 - objective.alpha_bar(timestep)).double().sqrt(),
        )
    ratio = (alpha / sigma).reshape(-1, 1, 1, 1)
    prediction = objective.target(latents + off, noise - ratio * off, timestep)
    loss = loss_per_sample(objective, prediction, latents, noise, timestep)
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(loss.double(), torch.clamp(snr, max=gamma) * 0.1**2, rtol=2e-3, atol=1e-8)


def test_bins_add_up():
    timestep = torch.tensor([0.0, 0.05, 0.1, 0.55, 0.56, 0.999, 1.0])
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], requires_grad=True)
    totals = timestep_bins(loss, timestep)
    assert totals[0].tolist() == [3, 4, 0, 0, 0, 24, 0, 0, 0, 96]
    assert totals[1].tolist() == [2, 1, 0, 0, 0, 2, 0, 0, 0, 2]
    assert not totals.requires_grad and totals.dtype == torch.float64
    parts = timestep_bins(loss[:3], timestep[:3]) + timestep_bins(loss[3:], timestep[3:])
    assert torch.equal(parts, totals), "what ranks add up is not the whole"
    assert timestep_bins(loss, timestep, bins=2)[1].tolist() == [3, 4]


# -- randomness of a sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Flow(shift=3.0), DDPM()])
def test_a_samples_noise_depends_on_seed_and_number_alone(objective):
    timestep, noise = draw(objective, 7, range(100, 108), SHAPE)
    assert timestep.shape == (8,) and noise.shape == (8, *SHAPE) and noise.dtype == torch.float32
    for order in ([3], [7, 0], [5, 4, 3]):
        some_timesteps, some_noise = draw(objective, 7, np.array(order) + 100, SHAPE)
        assert torch.equal(some_timesteps, timestep[order]) and torch.equal(some_noise, noise[order])
    other_timesteps, other_noise = draw(objective, 8, range(100, 108), SHAPE)
    assert not bool((other_timesteps == timestep).any()) and not bool((other_noise == noise).any())


def test_draws_are_what_they_were():
    """A changed generator, order of streams or key would silently change what a resumed run sees."""
    assert sample_rng(0, 0, "timestep").random() == pytest.approx(0.011546754286331562, abs=1e-15)
    assert sample_rng(3, 10**12, "noise").random() == pytest.approx(0.6238782723309945, abs=1e-15)


def test_no_two_samples_share_numbers():
    """Neighbours in counter, seed and stream, and ends of their ranges: all raw numbers differ."""
    keys = [
        (seed, number, stream)
        for seed in (0, 1, 2**64 - 1)
        for number in (0, 1, 2, 2**40, 2**64 - 1)
        for stream in STREAMS
    ]
    raw = [sample_rng(*key).integers(0, 2**63, 500) for key in keys]
    assert len(np.unique(np.concatenate(raw))) == 500 * len(keys)


def test_noise_is_normal_across_and_within_samples():
    _, noise = draw(Flow(), 0, range(400), (4, 8, 8))
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    rows = noise.flatten(1)
    correlation = torch.corrcoef(rows[:50]) - torch.eye(50)
    assert correlation.abs().max() < 5 / math.sqrt(rows.shape[1])
    across = torch.corrcoef(rows[:, :50].T) - torch.eye(50)
    assert across.abs().max() < 5 / math.sqrt(len(rows))


@pytest.mark.parametrize(
    "seed, number, stream", [(-1, 0, "noise"), (0, -1, "noise"), (2**64, 0, "noise"), (0, 0, "nois")]
)
def test_draws_that_cannot_be_are_refused(seed, number, stream):
    with pytest.raises(ValueError, match="expected"):
        sample_rng(seed, number, stream)


def test_no_samples():
    timestep, noise = draw(Flow(), 0, [], SHAPE)
    assert timestep.shape == (0,) and noise.shape == (0, *SHAPE)


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [*OBJECTIVES, Flow(density="uniform", min_snr_gamma=5.0), DDPM(num_steps=50)])
def test_objective_through_json(objective):
    assert objective_from_dict(json.loads(json.dumps(objective_to_dict(objective)))) == objective


@pytest.mark.parametrize(
    "values, match",
    [
        ({"name": "flw"}, "expected name flow or ddpm, received 'flw'"),
        ({}, "expected name flow or ddpm, received None"),
        (
            {"name": "flow", "shft": 3},
            r"objective flow: expected fields shift, density, .* received unknown \['shft'\]",
        ),
        ({"name": "flow", "shift": 0}, "flow.shift: expected a number > 0"),
        ({"name": "flow", "logit_std": 0}, "flow.logit_std: expected a number > 0"),
        ({"name": "flow", "density": "cosine"}, "logit_normal or uniform, received 'cosine'"),
        ({"name": "flow", "min_snr_gamma": 0}, "min_snr_gamma: expected a number > 0 or null"),
        ({"name": "ddpm", "num_steps": 0}, "ddpm.num_steps: expected a whole number >= 1"),
        ({"name": "ddpm", "beta_start": 0.1}, "beta_start <= beta_end"),
        ({"name": "ddpm", "prediction_type": "x0"}, "epsilon or v, received 'x0'"),
        ({"name": "ddpm", "min_snr_gamma": -5}, "min_snr_gamma: expected a number > 0 or null"),
    ],
)
def test_objectives_that_cannot_be_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        objective_from_dict(values)


def test_paper_defaults():
    assert dataclasses.asdict(DDPM()) == {
        "num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon", "min_snr_gamma": None
    }  # fmt: skip
    assert Flow().shift == 1.0 and Flow().density == "logit_normal" and diffusion.BINS == 10
