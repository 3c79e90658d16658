"""Attention over ragged keys: both backends against a loop over samples, forward and backward."""

import pytest
import torch

from lidit.attention import Keys, attention, fast_backend

pytestmark = pytest.mark.unit

BACKENDS = ["sdpa", "varlen"]
MASKS = {
    "ragged": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "whole": [[1, 1, 1, 1, 1]] * 3,
    "holes": [[0, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0]],
    "one sample has none": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]],
    "none at all": [[0, 0, 0, 0, 0]] * 3,
}
S, N, K = 4, 2, 8


def draw(length, seed=0):
    """query, key, value that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, S, N, K), (3, length, N, K), (3, length, N, K)]
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def by_loop(query, key, value, real, causal=False):
    """Each query of each sample over the keys it may see, one at a time."""
    rows = []
    for sample in range(len(query)):
        for place in range(query.shape[1]):
            seen = real[sample].clone()
            if causal:
                seen[place + 1 :] = False
            scores = torch.einsum("nk, lnk -> nl", query[sample, place], key[sample, seen]) / K**0.5
            rows.append(torch.einsum("nl, lnk -> nk", scores.softmax(-1), value[sample, seen]))
    return torch.stack(rows).view(query.shape)


def run(query, key, value, keys):
    if keys.backend == "varlen":
        key, value = (keys.pack(tokens.flatten(2)).unflatten(-1, (N, K)) for tokens in (key, value))
    return attention(query, key, value, keys)


def gradients(out, *inputs):
    torch.manual_seed(9)
    return torch.autograd.grad((out * torch.randn_like(out)).sum(), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_loop_forward_and_backward(name, backend):
    real, inputs = torch.tensor(MASKS[name], dtype=torch.bool), draw(5)
    out, wanted = run(*inputs, Keys(real, backend=backend)), by_loop(*inputs, real)
    torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(gradients(out, *inputs), gradients(wanted, *inputs)):
        torch.testing.assert_close(ours, theirs)
    dead = ~real.any(dim=1)
    assert out[dead].eq(0).all(), "exactly 0, not nearly"


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_not_real_get_no_gradient(backend):
    real, (query, key, value) = torch.tensor(MASKS["holes"], dtype=torch.bool), draw(5)
    _, of_key, of_value = gradients(run(query, key, value, Keys(real, backend=backend)), query, key, value)
    assert of_key[~real].eq(0).all() and of_value[~real].eq(0).all()
    assert of_key[real].ne(0).any() and of_value[real].ne(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 5])
def test_nothing_to_attend_to_gives_gradients_of_zero(backend, length):
    """Of zero, not none: every rank of a sharded model must have one for every weight."""
    inputs = draw(length)
    out = run(*inputs, Keys(torch.zeros(3, length, dtype=torch.bool), backend=backend))
    assert out.shape == (3, S, N, K) and out.eq(0).all()
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), inputs), inputs):
        assert gradient.shape == tensor.shape and gradient.eq(0).all()


@pytest.mark.parametrize("name", MASKS)
def test_causal(name):
    real, (query, key, value) = torch.tensor(MASKS[name], dtype=torch.bool), draw(5)
    query = torch.randn(3, 5, N, K, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out, wanted = attention(query, key, value, Keys(real, causal=True)), by_loop(query, key, value, real, causal=True)
    torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(gradients(out, query, key, value), gradients(wanted, query, key, value)):
        torch.testing.assert_close(ours, theirs)


def test_without_keys_all_are_seen():
    inputs = draw(5)
    torch.testing.assert_close(attention(*inputs), by_loop(*inputs, torch.ones(3, 5, dtype=torch.bool)))


def test_packing_takes_the_real_tokens_row_by_row():
    real = torch.tensor(MASKS["one sample has none"], dtype=torch.bool)
    tokens = torch.arange(15.0).view(3, 5, 1)
    keys = Keys(real, backend="varlen")
    # The sample of none packs its first token, so that no kernel meets a row of no keys; the result is cleared after.
    assert keys.pack(tokens).flatten().tolist() == [0, 1, 5, 11, 12]
    assert keys.starts.tolist() == [0, 2, 3, 5] and keys.starts.dtype == torch.int32
    assert Keys(real).pack(tokens) is tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_joined_keys_are_those_of_the_concatenated_tokens(backend):
    parts = [torch.tensor(MASKS[name], dtype=torch.bool) for name in ("holes", "ragged")]
    joined = Keys.join([Keys(part, backend=backend) for part in parts])
    assert torch.equal(joined.real, torch.cat(parts, dim=1)) and joined.backend == backend
    assert not Keys.join([Keys(parts[0], causal=True)]).causal, "cross-attention to others has no order"


def test_the_fast_backend_is_asked_for_only_where_it_runs():
    assert fast_backend(torch.device("cpu"), torch.bfloat16, 64) == "sdpa"
    assert fast_backend(torch.device("cuda"), torch.float32, 64) == "sdpa"
    assert fast_backend(torch.device("cuda"), torch.bfloat16, 512) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("channels", [64, 72])
def test_the_kernel_equals_masks_on_a_gpu(name, channels):
    real = torch.tensor(MASKS[name], dtype=torch.bool, device="cuda")
    torch.manual_seed(0)
    inputs = [
        torch.randn(3, length, N, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for length in (S, 5, 5)
    ]
    assert fast_backend(real.device, torch.bfloat16, channels) == "varlen"
    keys = Keys(real, backend="varlen")
    packed = [keys.pack(tokens.flatten(2)).unflatten(-1, (N, channels)) for tokens in inputs[1:]]
    out, wanted = attention(inputs[0], *packed, keys), attention(*inputs, Keys(real))
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
    for ours, theirs in zip(gradients(out, *inputs), gradients(wanted, *inputs)):
        torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)


def test_bf16_on_a_cpu_attends_in_fp32():
    """Its own kernel's backward pass is many times slower; the result is rounded once."""
    real = torch.tensor(MASKS["ragged"], dtype=torch.bool)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in draw(5)]
    wholes = [half.detach().float().requires_grad_() for half in halves]
    out, wanted = run(*halves, Keys(real)), run(*wholes, Keys(real))
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted.bfloat16())
    (out.float() * 3).sum().backward()
    (wanted * 3).sum().backward()
    for half, whole in zip(halves, wholes):
        assert half.grad.dtype == torch.bfloat16 and torch.equal(half.grad, whole.grad.bfloat16())
