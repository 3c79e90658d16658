"""The layers against formulas written out, and their precision in bf16."""

import json

import pytest
import torch
import torch.nn.functional as F

from lidit.layers import (
    CrossAttention,
    Keys,
    Modulation,
    NormedProjection,
    ResBlock,
    SelfAttention,
    TimestepEmbedding,
    add_gated,
    masked_mean,
    modulate,
    rotary_angles,
    rotate,
    timestep_features,
)

pytestmark = pytest.mark.unit


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- timestep ---------------------------------------------------------------------------------------------------------


def test_timestep_features_are_the_golden_ones(data):
    golden = json.loads((data / "golden" / "embeddings.json").read_text())["timestep_embedding"]
    wanted = torch.tensor(golden["value"])
    features = timestep_features(torch.tensor(golden["t"]), wanted.shape[1])
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=0)  # sines of angles up to 1,000


def test_timestep_features_by_hand():
    features = timestep_features(torch.tensor([0.0, 2.0]), 4, max_period=100.0)
    angles = torch.tensor([2.0, 0.2])
    wanted = torch.stack([torch.tensor([1.0, 1, 0, 0]), torch.cat([angles.cos(), angles.sin()])])
    torch.testing.assert_close(features, wanted)


def test_timestep_embedding_reads_thousandths():
    torch.manual_seed(0)
    embedding = TimestepEmbedding(16)
    wanted = embedding.out(F.silu(embedding.up(timestep_features(torch.tensor([250.0, 1000.0])))))
    torch.testing.assert_close(embedding(torch.tensor([0.25, 1.0])), wanted)


def test_timestep_features_keep_neighbours_apart_in_bf16():
    torch.manual_seed(0)
    embedding = TimestepEmbedding(16).to(torch.bfloat16)
    near = embedding(torch.tensor([0.7500, 0.7512]))  # the same number in bf16, whose step there is 0.004
    assert near.dtype == torch.bfloat16 and not torch.equal(near[0], near[1])


# -- rotation ---------------------------------------------------------------------------------------------------------


def test_rotate_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])[None, :, None]  # one token of one head, K = 4
    turned = rotate(x, torch.tensor([[torch.pi / 2, 0.0]]))
    torch.testing.assert_close(turned.flatten(), torch.tensor([-3.0, 2.0, 1.0, 4.0]))


def test_scores_of_rotated_tokens_depend_on_where_they_are_from_each_other():
    h, w, channels = 4, 5, 16
    query, key = (randn(1, 1, 1, channels, seed=seed).expand(1, h * w, 1, channels) for seed in (1, 2))
    angles = rotary_angles(h, w, channels)
    query, key = rotate(query, angles)[0, :, 0], rotate(key, angles)[0, :, 0]
    scores = (query @ key.T).view(h, w, h, w)
    torch.testing.assert_close(scores[1:, :-1, 1:, :-1], scores[:-1, 1:, :-1, 1:])
    apart = scores[0, 0].flatten()
    assert (apart[:, None] - apart).abs().add(torch.eye(h * w)).min() > 1e-3, "every place is another one"
    torch.testing.assert_close(query.norm(dim=-1), query.norm(dim=-1)[:1].expand(h * w))


# -- modulation -------------------------------------------------------------------------------------------------------


def test_modulate_by_hand():
    x, shift, scale = randn(2, 5, 8), randn(2, 1, 8, seed=1), randn(2, 1, 8, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulate(x, shift, scale), normed * (1 + scale) + shift)


def test_modulate_does_not_lose_small_scales_in_bf16():
    x = randn(4, 64, 64).bfloat16()
    scale = torch.full((4, 1, 64), 0.0015, dtype=torch.bfloat16)  # 1 + scale is 1 in bf16
    assert (1 + scale == 1).all()
    shift = torch.zeros_like(scale)
    wanted = modulate(x.float(), shift.float(), scale.float())
    got, without = modulate(x, shift, scale), modulate(x, shift, 0 * scale)
    assert got.dtype == torch.bfloat16
    ratio = (got.double() * wanted).sum() / (without.double() * wanted).sum()
    assert ratio == pytest.approx(1.0015, abs=2e-4)


def test_add_gated_rounds_once():
    x, gate, update = (randn(2, 50, 8, seed=seed).bfloat16() for seed in (1, 2, 3))
    wanted = (x.double() + gate[:, :1].double() * update.double()).bfloat16()
    assert torch.equal(add_gated(x, gate[:, :1], update), wanted)


def test_modulation_starts_at_zero_and_gives_vectors():
    from lidit.model import _initialize

    modulation = Modulation(8, 3)
    modulation.apply(_initialize)
    vectors = modulation(randn(2, 8))
    assert [tuple(vector.shape) for vector in vectors] == [(2, 1, 8)] * 3
    assert all((vector == 0).all() for vector in vectors)


# -- text -------------------------------------------------------------------------------------------------------------


def test_masked_mean():
    tokens, real = randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    tokens = tokens.masked_fill(~real[..., None], 0)
    wanted = torch.stack([tokens[0, :2].mean(0), torch.zeros(2), tokens[2, [1, 3]].mean(0)])
    torch.testing.assert_close(masked_mean(tokens, real), wanted)
    assert masked_mean(tokens[:, :0], real[:, :0]).eq(0).all()


def test_masked_mean_of_many_bf16_tokens_is_summed_in_fp32():
    tokens = torch.ones(1, 3000, 1, dtype=torch.bfloat16)  # in bf16, 256 + 1 is 256
    assert masked_mean(tokens, torch.ones(1, 3000, dtype=torch.bool)) == 1


def test_normed_projection_does_not_care_how_large_states_are():
    torch.manual_seed(0)
    projection, states = NormedProjection(8, 4), randn(3, 8)
    torch.testing.assert_close(projection(1000 * states), projection(states), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(projection(torch.zeros(1, 8))).all()


# -- attention layers -------------------------------------------------------------------------------------------------


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_hand(layer, q, k, v):
    """(B, S, D), (B, L, D) x 2 of the projections -> what the layer gives, head by head."""
    heads = []
    channels = q.shape[-1] // layer.heads
    for head in range(layer.heads):
        own = slice(head * channels, (head + 1) * channels)
        scores = rms(q[..., own], layer.norm_q.weight) @ rms(k[..., own], layer.norm_k.weight).transpose(1, 2)
        heads.append((scores / channels**0.5).softmax(-1) @ v[..., own])
    return torch.cat(heads, dim=-1) @ layer.out.weight.T


def test_self_attention_by_hand():
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2), randn(2, 5, 16)
    torch.nn.init.normal_(layer.norm_q.weight)
    wanted = by_hand(layer, *(x @ layer.to_qkv.weight.T).chunk(3, dim=-1))
    torch.testing.assert_close(layer(x), wanted)


def test_cross_attention_by_hand():
    torch.manual_seed(0)
    layer, x, others = CrossAttention(16, 2), randn(2, 5, 16), randn(2, 3, 16, seed=1)
    torch.nn.init.normal_(layer.norm_k.weight)
    wanted = by_hand(layer, x @ layer.to_q.weight.T, *(others @ layer.to_kv.weight.T).chunk(2, dim=-1))
    torch.testing.assert_close(layer(x, others, Keys(torch.ones(2, 3, dtype=torch.bool))), wanted)


def test_queries_and_keys_are_normalized():
    """So attention cannot saturate, however large the projections grow: the QK-norm of the paper."""
    torch.manual_seed(0)
    layer, x = CrossAttention(16, 2), randn(2, 5, 16)
    keys = Keys(torch.ones(2, 5, dtype=torch.bool))
    before = layer(x, x, keys)
    with torch.no_grad():
        layer.to_q.weight *= 100
        layer.to_kv.weight[:16] *= 100
    torch.testing.assert_close(layer(x, x, keys), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 3])
def test_cross_attention_to_nothing_adds_exactly_zero(length):
    torch.manual_seed(0)
    layer, keys = CrossAttention(16, 2), Keys(torch.zeros(2, length, dtype=torch.bool))
    update = layer(randn(2, 5, 16), randn(2, length, 16), keys)
    assert update.eq(0).all()
    update.sum().backward()
    assert all(weight.grad is not None and weight.grad.eq(0).all() for weight in layer.parameters())


# -- ResBlock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (8, 8)])
@pytest.mark.parametrize("width", [32, 48, 24])
def test_res_block_takes_any_grid(size, width):
    assert ResBlock(width)(randn(2, width, *size)).shape == (2, width, *size)


def test_res_block_is_two_convolutions_and_a_skip():
    torch.manual_seed(0)
    block, x = ResBlock(32), randn(2, 32, 5, 7)
    y = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        groups = y.unflatten(1, (32, 1)).flatten(2)
        normed = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        y = normed.view_as(y) * norm.weight[:, None, None] + norm.bias[:, None, None]
        y = F.conv2d(F.pad(y * y.sigmoid(), (1, 1, 1, 1)), conv.weight, conv.bias)
    torch.testing.assert_close(block(x), x + y, atol=1e-5, rtol=1e-5)


def test_res_block_tells_edges_from_the_middle():
    """The only thing that gives the model positions: equal tokens differ near the edges after it, and only there."""
    torch.manual_seed(0)
    block = ResBlock(32)
    torch.nn.init.normal_(block.norm1.bias)
    torch.nn.init.normal_(block.norm2.bias)
    out = block(torch.ones(1, 32, 9, 9))
    middle = out[..., 2:7, 2:7]
    torch.testing.assert_close(middle, middle[..., :1, :1].expand_as(middle))
    assert (out[..., 0, 0] - out[..., 4, 4]).abs().max() > 0.1
    assert (out[..., 1, 4] - out[..., 4, 4]).abs().max() > 0.01
