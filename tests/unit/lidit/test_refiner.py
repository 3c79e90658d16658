"""The refiners against formulas written out, at their start, and under every switch of the ablations."""

import pytest
import torch
import torch.nn.functional as F

from lidit.attention import Keys

pytestmark = pytest.mark.unit

B, L, P, D = 3, 5, 2, 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)


def linguistic_inputs(width=24, causal=False):
    """prompt_embeds, instruction_embeds, cond, keys."""
    real = torch.cat([torch.ones(B, P, dtype=torch.bool), REAL], dim=1)
    return randn(B, L, width), randn(P, width, seed=1), randn(B, D, seed=2), Keys(real, causal=causal)


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# -- linguistic -------------------------------------------------------------------------------------------------------


def test_starts_as_its_input_projection(make_model):
    refiner = make_model(awake=False).linguistic["one"]
    prompt_embeds, instruction_embeds, cond, keys = linguistic_inputs()
    x = torch.cat([instruction_embeds.expand(B, -1, -1), prompt_embeds], dim=1)
    wanted = rms(x, refiner.project.norm) @ refiner.project.project.weight.T + refiner.project.project.bias
    torch.testing.assert_close(refiner(prompt_embeds, instruction_embeds, cond, keys), wanted)


def test_linguistic_block_by_hand(make_model):
    """Gates from cond alone, of norm(x): no shift, no scale (figure 5)."""
    block = make_model().linguistic["one"].blocks[0]
    x, cond, keys = randn(B, P + L, D), randn(B, D, seed=2), linguistic_inputs()[3]
    gates = F.silu(cond) @ block.gates.project.weight.T + block.gates.project.bias
    gate_attention, gate_feed_forward = gates[:, None, :D], gates[:, None, D:]
    wanted = x + gate_attention * block.attention(rms(x, block.norm1), keys)
    wanted = wanted + gate_feed_forward * block.feed_forward(rms(wanted, block.norm2))
    torch.testing.assert_close(block(x, cond, keys), wanted)


def test_without_gates_residuals_are_plain(make_model):
    model = make_model(awake=False, refiner_gate=False)
    block = model.linguistic["one"].blocks[0]
    x, keys = randn(B, P + L, D), linguistic_inputs()[3]
    wanted = x + block.attention(rms(x, block.norm1), keys)
    wanted = wanted + block.feed_forward(rms(wanted, block.norm2))
    torch.testing.assert_close(block(x, randn(B, D), keys), wanted)
    assert not torch.allclose(wanted, x, atol=0.1), "not the identity at the start"
    assert not any("gates" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_number_of_blocks(make_model, blocks):
    model = make_model(refiner_blocks=blocks)
    inputs = linguistic_inputs()
    ran = []
    for block in model.linguistic["one"].blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    out = model.linguistic["one"](*inputs)
    assert len(ran) == blocks and out.shape == (B, P + L, D)
    projected = model.linguistic["one"].project(inputs[0])
    assert torch.equal(out[:, P:], projected) is (blocks == 0)


def influence(make_model, attention, of, on):
    """Largest gradient of the refined token `on` with respect to the states of token `of` (instruction not counted)."""
    refiner = make_model(refiner_attention=attention).linguistic["one"]
    prompt_embeds, instruction_embeds, cond, keys = linguistic_inputs(causal=attention == "causal")
    prompt_embeds.requires_grad_()
    out = refiner(prompt_embeds, instruction_embeds, cond, keys)
    (gradient,) = torch.autograd.grad(out[0, P + on].sum(), prompt_embeds)
    return gradient[0, of].abs().max()


def test_causal_refiner_does_not_look_ahead(make_model):
    for of, on in ((1, 0), (4, 0), (4, 3), (3, 1)):
        assert influence(make_model, "causal", of, on) == 0
        assert influence(make_model, "full", of, on) > 1e-4
    for of, on in ((0, 1), (0, 4), (3, 4), (2, 2)):
        assert influence(make_model, "causal", of, on) > 1e-4


@pytest.mark.parametrize("attention, sees", [("full", True), ("causal", False)])
def test_instruction_sees_the_prompt_unless_causal(make_model, attention, sees):
    refiner = make_model(refiner_attention=attention).linguistic["one"]
    prompt_embeds, instruction_embeds, cond, keys = linguistic_inputs(causal=attention == "causal")
    before = refiner(prompt_embeds, instruction_embeds, cond, keys)[0, :P]
    after = refiner(prompt_embeds + 1, instruction_embeds, cond, keys)[0, :P]
    assert torch.equal(before, after) is not sees


def test_padding_has_no_influence_on_real_tokens(make_model):
    refiner = make_model().linguistic["one"]
    prompt_embeds, instruction_embeds, cond, keys = linguistic_inputs()
    prompt_embeds.requires_grad_()
    out = refiner(prompt_embeds, instruction_embeds, cond, keys)
    (gradient,) = torch.autograd.grad((out * keys.real[..., None]).square().sum(), prompt_embeds)
    assert gradient[~REAL].eq(0).all() and gradient[REAL].ne(0).any(dim=-1).all()


# -- collaborative ----------------------------------------------------------------------------------------------------


def branches(names):
    """tokens, conds, keys by encoder; branches of different length."""
    tokens, conds, keys = {}, {}, {}
    for number, name in enumerate(names):
        length = 3 + number
        real = torch.ones(B, length, dtype=torch.bool)
        real[1, 1:] = False
        tokens[name], conds[name] = randn(B, length, D, seed=number), randn(B, D, seed=10 + number)
        keys[name] = Keys(real)
    return tokens, conds, keys


@pytest.mark.parametrize("encoders", [2, 3])
def test_collaborative_refiner_starts_as_the_identity(make_model, encoders):
    model = make_model(awake=False, encoders=encoders)
    tokens, conds, keys = branches(model.config.encoders)
    refined = model.collaborative(tokens, conds, keys)
    assert list(refined) == list(tokens) and all(torch.equal(refined[name], tokens[name]) for name in tokens)


@pytest.mark.parametrize("encoders", [2, 3])
def test_collaborative_refiner_by_hand(make_model, encoders):
    """Six vectors from the branch's own cond; keys and values of all others, as they were before any branch changed."""
    model = make_model(encoders=encoders)
    tokens, conds, keys = branches(model.config.encoders)
    refined = model.collaborative(tokens, conds, keys)
    for name, branch in model.collaborative.branches.items():
        names = [other for other in tokens if other != name]
        vectors = F.silu(conds[name]) @ branch.modulation.project.weight.T + branch.modulation.project.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors[:, None].split(D, dim=-1)
        x = tokens[name]
        others = rms(torch.cat([tokens[other] for other in names], dim=1), branch.norm_others)
        seen = Keys(torch.cat([keys[other].real for other in names], dim=1))
        x = x + gate1 * branch.attention(layer_norm(x) * (1 + scale1) + shift1, others, seen)
        x = x + gate2 * branch.feed_forward(layer_norm(x) * (1 + scale2) + shift2)
        torch.testing.assert_close(refined[name], x, atol=1e-5, rtol=1e-5)


def test_a_branch_reads_others_and_not_itself(make_model):
    model = make_model(encoders=3)
    tokens, conds, keys = branches(model.config.encoders)
    tokens = {name: x.requires_grad_() for name, x in tokens.items()}
    refined = model.collaborative(tokens, conds, keys)
    one, two, three = torch.autograd.grad(refined["one"][0, 0].square().sum(), list(tokens.values()))
    assert one[0, 1:].eq(0).all() and one[0, 0].ne(0).any(), "no self-attention"
    assert two[0].ne(0).any(dim=-1).all() and three[0].ne(0).any(dim=-1).all()
    assert two[1:].eq(0).all() and three[1:].eq(0).all(), "nor other samples"


def test_a_branch_whose_others_are_empty_is_only_fed_forward(make_model):
    model = make_model()
    tokens, conds, keys = branches(model.config.encoders)
    keys["two"] = Keys(torch.zeros(B, 4, dtype=torch.bool))
    branch = model.collaborative.branches["one"]
    x = tokens["one"]
    _, _, _, shift2, scale2, gate2 = branch.modulation(conds["one"])
    wanted = x + gate2 * branch.feed_forward(layer_norm(x) * (1 + scale2) + shift2)
    torch.testing.assert_close(model.collaborative(tokens, conds, keys)["one"], wanted)


@pytest.mark.parametrize("changes", [{"encoders": 1}, {"fusion": "concat"}, {"encoders": 1, "fusion": "concat"}])
def test_no_collaborative_refiner(make_model, changes):
    model = make_model(**changes)
    assert model.collaborative is None and not any("collaborative" in name for name, _ in model.named_parameters())
