"""The whole model: its size, its start, what may and may not influence a sample, precision, and ways of running it."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from lidit.attention import Keys
from lidit.config import lidit_1b, lidit_10b, lidit_tiny
from lidit.layers import ZeroLinear, rotary_angles
from lidit.model import LIDiT

pytestmark = pytest.mark.unit

SWITCHES = [
    {},
    {"instruction": "cut"},
    {"refiner_blocks": 0},
    {"refiner_blocks": 3},
    {"refiner_attention": "causal"},
    {"refiner_gate": False},
    {"fusion": "concat"},
    {"encoders": 1},
    {"encoders": 3},
    {"encoders": 1, "refiner_blocks": 0},
    {"patch_size": 1, "ffn_ratio": 2},
    {"position": "rope"},
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes})


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, billions", [(lidit_1b(), 1.08), (lidit_10b(), 10.35)])
def test_parameter_counts_are_the_papers(config, billions):
    with torch.device("meta"):
        model = LIDiT(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)
    assert not list(model.buffers()), "whoever lays the model out on the meta device has nothing else to fill"


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", SWITCHES)
def test_starts_by_predicting_zeros(make_model, make_inputs, changes):
    model = make_model(awake=False, **changes)
    inputs = make_inputs(model)
    out = run(model, inputs)
    assert out.shape == inputs["noisy_latents"].shape and out.eq(0).all()


@pytest.mark.parametrize("changes", SWITCHES)
def test_every_parameter_is_trained(make_model, make_inputs, changes):
    """Zeros at the start open one after the other: last layer, gates of the DiT, gates of the refiners, what is behind them."""
    model = make_model(awake=False, **changes)
    inputs = make_inputs(model, lengths={"one": [7, 2, 3], "two": [5, 2, 6], "three": [2, 4, 2]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target, moved = torch.randn_like(inputs["noisy_latents"]), set()
    for step in range(4):
        loss = F.mse_loss(model(**inputs), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters()), "no parameter is left out, even at first"
        moved |= {name for name, weight in model.named_parameters() if weight.grad.ne(0).any()}
        if step == 0:
            assert {name.split(".")[0] for name in moved} == {"final"}
        optimizer.step()
    never = {name for name, _ in model.named_parameters()} - moved
    assert not never


@pytest.mark.parametrize("padding", [0, 3])
def test_every_parameter_has_a_gradient_without_any_text(make_model, make_inputs, padding):
    """Ranks of a sharded model wait for each other's gradients: a batch of empty prompts must make them all, of zeros."""
    for changes in ({}, {"encoders": 1}, {"encoders": 3, "refiner_attention": "causal"}):
        model = make_model(**changes)
        nothing = {key: [0, 0, 0] for key in model.config.encoders}
        inputs = make_inputs(model, lengths=nothing, padding=padding, instruction=0)
        found = gradients(model, inputs)  # fails where there is none
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        assert found["linguistic.one.project.project.weight"].eq(0).all()
        assert found["blocks.0.self_attention.to_qkv.weight"].ne(0).any()


def test_xavier_for_linear_maps_and_zero_for_gates():
    torch.manual_seed(0)
    model = LIDiT(lidit_tiny())
    for name, module in model.named_modules():
        if isinstance(module, ZeroLinear):
            assert module.weight.eq(0).all() and module.bias.eq(0).all(), name
        elif isinstance(module, torch.nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert bound * 0.95 < module.weight.abs().max() <= bound, name
            assert module.bias is None or module.bias.eq(0).all(), name
    zero = {name for name, module in model.named_modules() if isinstance(module, ZeroLinear)}
    gated = [name for name in zero if name.endswith(("gates.project", "modulation.project"))]
    assert len(gated) == 2 * 2 + 2 + 4 + 1 and zero - set(gated) == {"final.project"}


def test_initial_weights_in_bfloat16_are_those_of_float32_rounded():
    """ZeRO-3 builds the model in bfloat16, the other stages round it afterwards: all begin alike."""
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            models.append(LIDiT(lidit_tiny()))
        finally:
            torch.set_default_dtype(torch.float32)
    for (name, exact), rounded in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(exact.bfloat16(), rounded), name


# -- influence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", SWITCHES)
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_padding_neighbours_and_order_change_nothing(make_model, make_inputs, changes, backend):
    model = make_model(**changes).set_attention(backend)
    together = run(model, make_inputs(model, rows=(0, 1, 2)))
    assert together.abs().max() > 0.1
    close(run(model, make_inputs(model, rows=(0, 1, 2), padding=9)), together)
    close(run(model, make_inputs(model, rows=(2, 0, 1))), together[[2, 0, 1]])
    for row in range(3):
        close(run(model, make_inputs(model, rows=(row,))), together[[row]])
        close(run(model, make_inputs(model, rows=(3, row, 4), padding=1))[[1]], together[[row]])


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan])
def test_what_stands_at_padding_has_no_influence(make_model, make_inputs, garbage):
    model = make_model()
    inputs = make_inputs(model, padding=2)
    plain, plain_gradients = run(model, inputs), gradients(model, inputs)
    for name, embeds in inputs["prompt_embeds"].items():
        embeds[~inputs["prompt_mask"][name]] = garbage
    assert torch.equal(run(model, inputs), plain)
    for name, gradient in gradients(model, inputs).items():
        assert torch.equal(gradient, plain_gradients[name]), name


@pytest.mark.parametrize("changes", SWITCHES)
def test_gradient_reaches_real_tokens_and_no_others(make_model, make_inputs, changes):
    model = make_model(**changes)
    inputs = make_inputs(model, padding=2)
    for embeds in inputs["prompt_embeds"].values():
        embeds.requires_grad_()
    model(**inputs).square().sum().backward()
    for name, embeds in inputs["prompt_embeds"].items():
        real = inputs["prompt_mask"][name]
        assert embeds.grad[~real].eq(0).all()
        assert embeds.grad[real].ne(0).any(dim=-1).all()


def test_masks_may_have_holes(make_model, make_inputs):
    """Padding may stand anywhere: left of a prompt, or within."""
    model = make_model()
    inputs = make_inputs(model, padding=4)
    moved = copy.deepcopy(inputs)
    for name in model.config.encoders:
        order = torch.randperm(inputs["prompt_mask"][name].shape[1], generator=torch.Generator().manual_seed(0))
        moved["prompt_embeds"][name] = inputs["prompt_embeds"][name][:, order]
        moved["prompt_mask"][name] = inputs["prompt_mask"][name][:, order]
    close(run(model, moved), run(model, inputs))


@pytest.mark.parametrize("encoders", [2, 3])
def test_order_of_encoders_does_not_matter(make_model, make_inputs, encoders):
    model = make_model(encoders=encoders)
    names = list(model.config.encoders)[::-1]
    turned = LIDiT(dataclasses.replace(model.config, encoders={name: model.config.encoders[name] for name in names}))
    turned.load_state_dict(model.state_dict())
    assert list(turned.config.encoders) == names
    inputs = make_inputs(model)
    close(run(turned, inputs), run(model, inputs))


def test_every_input_matters(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(model)
    before = run(model, inputs)
    changed = {
        "noisy_latents": inputs["noisy_latents"] + 1,
        "timestep": inputs["timestep"] / 2,
        "prompt_embeds": {**inputs["prompt_embeds"], "two": -inputs["prompt_embeds"]["two"]},
        "instruction_embeds": {**inputs["instruction_embeds"], "one": -inputs["instruction_embeds"]["one"]},
    }
    for name, value in changed.items():
        assert (run(model, inputs, **{name: value}) - before).abs().max() > 1e-3, name


def test_instruction_matters_only_where_it_is_kept(make_model, make_inputs):
    for instruction in ("kept", "cut"):
        model = make_model(instruction=instruction)
        inputs = make_inputs(model)
        other = {name: -embeds for name, embeds in inputs["instruction_embeds"].items()}
        same = torch.equal(run(model, inputs), run(model, inputs, instruction_embeds=other))
        assert same is (instruction == "cut")
    none = {name: embeds[:0] for name, embeds in inputs["instruction_embeds"].items()}
    kept = make_model(instruction="kept")
    close(run(kept, inputs, instruction_embeds=none), run(model, inputs))  # absent is cut


def test_instruction_is_no_part_of_the_pooled_prompt_nor_of_the_context(make_model, make_inputs):
    model = make_model(refiner_blocks=0, fusion="concat")  # so that no token sees another
    inputs = make_inputs(model)
    other = {name: -embeds for name, embeds in inputs["instruction_embeds"].items()}
    assert torch.equal(run(model, inputs), run(model, inputs, instruction_embeds=other))


def test_cond_is_timestep_and_the_mean_of_prompt_tokens(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(model)
    time, wanted = model.timestep(inputs["timestep"]), 0
    for name, embeds in inputs["prompt_embeds"].items():
        means = [row[real].mean(0) if real.any() else row.new_zeros(row.shape[1])
                 for row, real in zip(embeds, inputs["prompt_mask"][name])]  # fmt: skip
        wanted = wanted + model.pooled[name](torch.stack(means))
    _, cond = model.refine(**{key: value for key, value in inputs.items() if key != "noisy_latents"})
    close(cond, time + wanted)


def test_context_is_the_projection_at_the_start(make_model, make_inputs):
    model = make_model(awake=False)
    inputs = make_inputs(model)
    context, _ = model.refine(**{key: value for key, value in inputs.items() if key != "noisy_latents"})
    wanted = [model.linguistic[name].project(embeds) for name, embeds in inputs["prompt_embeds"].items()]
    close(context, torch.cat(wanted, dim=1))
    assert context.shape[1] == sum(embeds.shape[1] for embeds in inputs["prompt_embeds"].values())


def test_dit_block_by_hand(make_model):
    model = make_model()
    block, keys = model.blocks[0], Keys(torch.ones(2, 4, dtype=torch.bool))
    x, cond, context = torch.randn(2, 6, 32), torch.randn(2, 32), torch.randn(2, 4, 32)
    vectors = (F.silu(cond) @ block.modulation.project.weight.T + block.modulation.project.bias)[:, None].split(32, -1)
    wanted = x
    sublayers = (block.self_attention, lambda y: block.cross_attention(y, context, keys), block.feed_forward)
    for sublayer, (shift, scale, gate) in zip(sublayers, (vectors[:3], vectors[3:6], vectors[6:])):
        normed = F.layer_norm(wanted, (32,), eps=1e-6)
        wanted = wanted + gate * sublayer(normed * (1 + scale) + shift)
    close(block(x, cond, context, keys), wanted)


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 2), (2, 14), (6, 10), (14, 6), (10, 10)])
def test_any_size_and_odd_numbers_of_patches(make_model, make_inputs, size):
    model = make_model()
    out = run(model, make_inputs(model, size=size))
    assert out.shape == (3, 4, *size) and torch.isfinite(out).all()


def test_patches_go_back_where_they_came_from(make_model, make_inputs):
    """A change of one latent pixel changes the prediction most at its own patch, in a model of convolutions and attention."""
    model = make_model()
    inputs = make_inputs(model, rows=(0,), size=(8, 12))
    changed = inputs["noisy_latents"].clone()
    changed[0, :, 5, 8] += 3
    difference = (run(model, inputs, noisy_latents=changed) - run(model, inputs)).abs().sum(dim=(0, 1))
    patches = difference.unflatten(0, (4, 2)).unflatten(2, (6, 2)).sum(dim=(1, 3))
    assert divmod(int(patches.argmax()), 6) == (2, 4)


@pytest.mark.parametrize("lengths", [
    {"one": [0, 0, 0], "two": [4, 0, 2]},
    {"one": [3, 1, 2], "two": [0, 0, 0]},
    {"one": [0, 0, 0], "two": [0, 0, 0]},
])  # fmt: skip
@pytest.mark.parametrize("instruction", [0, 3])
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_empty_prompts(make_model, make_inputs, lengths, instruction, backend):
    model = make_model().set_attention(backend)
    inputs = make_inputs(model, lengths=lengths, instruction=instruction)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, inputs).values())
    close(run(model, inputs), run(model, make_inputs(model, lengths=lengths, instruction=instruction, padding=2)))


def test_states_of_encoder_only_models_as_they_are(make_model, make_inputs):
    """The paper's baselines: T5 or CLIP states, no instruction, no refiner."""
    model = make_model(encoders={"t5": 24}, refiner_blocks=0)
    inputs = make_inputs(model, lengths={"t5": [4, 0, 2]}, instruction=0)
    assert run(model, inputs).abs().max() > 0.1
    context, _ = model.refine(**{key: value for key, value in inputs.items() if key != "noisy_latents"})
    assert torch.equal(context, model.linguistic["t5"].project(inputs["prompt_embeds"]["t5"]))


BAD_INPUTS = [
    (lambda i: i.update(noisy_latents=i["noisy_latents"][:, :3]), r"expected \(B, 4, H, W\), received \(3, 3, 6, 10\)"),
    (lambda i: i.update(noisy_latents=i["noisy_latents"][0]), r"noisy_latents: expected \(B, 4, H, W\)"),
    (lambda i: i.update(noisy_latents=i["noisy_latents"][..., :5, :]), r"multiples of the patch size 2, received \(5, 10\)"),
    (lambda i: i.update(noisy_latents=i["noisy_latents"][..., :9]), r"multiples of the patch size 2, received \(6, 9\)"),
    (lambda i: i.update(noisy_latents=i["noisy_latents"][..., :0]), r"received \(6, 0\)"),
    (lambda i: i.update(timestep=i["timestep"][:2]), r"timestep: expected \(3,\) float32 in \[0, 1\], received \(2,\)"),
    (lambda i: i.update(timestep=torch.tensor([1, 2, 3])), r"received \(3,\) torch.int64"),
    (lambda i: i.update(timestep=i["timestep"].bfloat16()), r"received \(3,\) torch.bfloat16"),
    (lambda i: i["prompt_embeds"].pop("two"), r"prompt_embeds: expected encoders \['one', 'two'\], received \['one'\]"),
    (lambda i: i["instruction_embeds"].pop("one"), r"instruction_embeds: expected encoders .*, received \['two'\]"),
    (lambda i: i["prompt_mask"].update(three=i["prompt_mask"]["one"]), r"prompt_mask: .*received .*'three'"),
    (lambda i: i["prompt_embeds"].update(one=i["prompt_embeds"]["two"]), r"prompt_embeds\[one\]: expected \(3, L, 24\)"),
    (lambda i: i["prompt_mask"].update(one=i["prompt_mask"]["one"].float()), r"prompt_mask\[one\]: .*bool, true for real"),
    (lambda i: i["prompt_mask"].update(one=i["prompt_mask"]["two"]), r"prompt_mask\[one\]: expected \(3, 7\) bool"),
    (lambda i: i["instruction_embeds"].update(one=i["prompt_embeds"]["one"]), r"expected \(P, 24\), one for the whole"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, match", BAD_INPUTS)
def test_refuses_inputs_that_do_not_fit(make_model, make_inputs, spoil, match):
    model = make_model()
    inputs = make_inputs(model)
    spoil(inputs)
    with pytest.raises(ValueError, match=match):
        model(**inputs)


# -- precision and ways of running ------------------------------------------------------------------------------------


def test_bf16_is_close_to_fp32(make_model, make_inputs):
    """Weights and activations in bf16, nothing left to autocast; the size of the difference is stated in docs/model.md."""
    model = make_model(width=128, heads=4, depth=8)
    inputs = make_inputs(model)
    wanted = run(model, inputs)
    out = run(model.to(torch.bfloat16), inputs)
    assert out.dtype == torch.float32, "the prediction has the dtype of the latents"
    assert (out - wanted).norm() / wanted.norm() < 0.03
    half = run(model, make_inputs(model, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{}, {"encoders": 1}, {"encoders": 3}])
def test_checkpointing_gives_the_same_gradients(make_model, make_inputs, changes):
    model = make_model(**changes)
    inputs = make_inputs(model)
    plain = gradients(model, inputs)
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    kept = gradients(model.set_checkpointing(), inputs)
    assert len(calls) == 2, "each block is computed again in the backward pass"
    assert all(torch.equal(gradient, kept[name]) for name, gradient in plain.items())
    calls.clear()
    run(model, inputs)
    gradients(model.set_checkpointing(False), inputs)
    assert len(calls) == 2, "not without gradients, nor when it is off again"


def test_backends_agree(make_model, make_inputs):
    model = make_model(encoders=3)
    inputs = make_inputs(model)
    plain, ours = run(model.set_attention("sdpa"), inputs), gradients(model, inputs)
    close(run(model.set_attention("varlen"), inputs), plain)
    for name, gradient in gradients(model, inputs).items():
        close(gradient, ours[name])
    assert torch.equal(run(model.set_attention("auto"), inputs), plain), "masks on the CPU"
    with pytest.raises(ValueError, match="expected one of auto, sdpa, varlen, received 'flash'"):
        model.set_attention("flash")


def test_rotated_tokens_know_their_places(make_model, make_inputs):
    """Without, and without convolutions, a block does not see in which order its tokens stand."""
    inputs, order = randn(2, 12, 32), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for position, same in (("conv", True), ("rope", False)):
        model = make_model(position=position)
        angles = rotary_angles(3, 4, model.config.head_channels) if position == "rope" else None
        context, cond = randn(2, 5, 32), randn(2, 1, 32)[:, 0]
        keys = Keys(torch.ones(2, 5, dtype=torch.bool))
        straight = model.blocks[0](inputs, cond, context, keys, angles)
        mixed = model.blocks[0](inputs[:, order], cond, context, keys, angles)
        assert torch.allclose(straight[:, order], mixed, atol=1e-5) == same
    conv, rope = make_model(position="conv"), make_model(position="rope")
    rope.load_state_dict(conv.state_dict())
    same_inputs = make_inputs(conv)
    assert not torch.allclose(run(conv, same_inputs), run(rope, same_inputs), atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_regions_give_the_same(make_model, make_inputs, backend):
    model = make_model()
    inputs = make_inputs(model)
    plain, ours = run(model, inputs), gradients(model, inputs)
    names = set(model.state_dict())
    compiled = copy.deepcopy(model).compile_regions(backend=backend)
    close(run(compiled, inputs), plain)
    for name, gradient in gradients(compiled, inputs).items():
        close(gradient, ours[name])
    assert set(compiled.state_dict()) == names
    assert "modulate" in vars(compiled.blocks[0]) and "modulate" not in vars(model.blocks[0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same(make_model, make_inputs, backend):
    torch._dynamo.reset()
    model = make_model(position="rope")
    inputs = make_inputs(model)
    plain, ours = run(model, inputs), gradients(model, inputs)
    names = set(model.state_dict())
    compiled = copy.deepcopy(model).compile_blocks(backend=backend)
    close(run(compiled, inputs), plain)
    for name, gradient in gradients(compiled, inputs).items():
        close(gradient, ours[name])
    assert set(compiled.state_dict()) == names


def test_blocks_of_a_kind_are_compiled_once(make_model, make_inputs):
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    deep, shallow = (make_model(depth=depth) for depth in (5, 2))
    run(shallow.compile_blocks(backend=backend), make_inputs(shallow))
    once = len(made)
    run(deep.compile_blocks(backend=backend), make_inputs(deep))
    assert len(made) == once > 0


def test_regions_are_compiled_once_for_all_sizes(make_model, make_inputs):
    """Of images, batches and prompts; in all blocks, whichever of its vectors a block passes."""
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    model = make_model(encoders=3).compile_regions(backend=backend)
    for rows, size, padding in (((0, 1, 2), (6, 10), 0), ((0, 1), (4, 4), 3), ((0, 1, 2, 4), (10, 6), 1)):
        gradients(model, make_inputs(model, rows=rows, size=size, padding=padding))
    assert len(made) == 2, "modulate, and add_gated"


def test_every_forward_runs_every_module(make_model, make_inputs):
    """Whatever the data: ranks of a sharded model gather weights together."""

    def modules_run(inputs):
        names = []
        hooks = [module.register_forward_hook(lambda *_, name=name: names.append(name))
                 for name, module in model.named_modules()]  # fmt: skip
        run(model, inputs)
        for hook in hooks:
            hook.remove()
        return names

    model = make_model(encoders=3)
    nothing = {key: [0, 0, 0] for key in model.config.encoders}
    assert modules_run(make_inputs(model)) == modules_run(make_inputs(model, lengths=nothing))
