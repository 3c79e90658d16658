"""Attention over padded batches: one function, and the `Keys` that say which tokens may be attended to.

Backends, equal up to rounding:

- `sdpa`: torch's scaled dot product attention with a mask. Runs everywhere; a mask costs it its flash kernel.
- `varlen`: the keys' real tokens packed one row after the other, and torch's flash attention for rows of different length.
  For cross-attention to ragged prompts on CUDA in bf16: keeps the fast kernel, and padding costs nothing. On a CPU, which has
  no such kernel, the packed rows are attended to one by one: slow, and there so that the packing can be tested.

Shape notation: B samples, S queries, L keys (padding included), T real keys of all samples, N heads, K channels per head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["sdpa", "varlen"]


class Keys:
    """Marks the tokens of a padded batch that may be attended to; prepared once, read by every layer that attends to them.

    A sample without any real token is allowed: attention to it gives 0 (never NaN), forward and backward.

    Args:
        real: (B, L) bool, true for real tokens; false ones may stand anywhere.
        causal: queries are these same tokens, and each sees itself and those before it. `sdpa` only.
        backend: how attention to them is computed. `varlen` makes the host wait for the device once, here.
    """

    def __init__(self, real: Tensor, causal: bool = False, backend: Backend = "sdpa"):
        assert real.dtype == torch.bool and real.ndim == 2, f"expected (B, L) bool, received {real.dtype} {real.shape}"
        assert not (causal and backend == "varlen"), "causal attention is offered with sdpa only"
        self.real, self.causal, self.backend = real, causal, backend
        if backend == "varlen":
            self._prepare_packing()
        else:
            self._prepare_mask()

    @classmethod
    def join(cls, parts: Sequence[Keys]) -> Keys:
        """Keys of the parts' tokens, concatenated along L."""
        return cls(torch.cat([part.real for part in parts], dim=1), backend=parts[0].backend)

    def pack(self, tokens: Tensor) -> Tensor:
        """Padded tokens (B, L, D) -> as `attention` takes them: unchanged, or for `varlen` the real ones, (T, D)."""
        if self.backend == "sdpa":
            return tokens
        return tokens.flatten(0, 1).index_select(0, self.positions)

    def _prepare_mask(self) -> None:
        allowed = self.real[:, None, None, :]  # B 1 1 L
        if self.causal:
            length = self.real.shape[1]
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=self.real.device).tril()
        # What a kernel makes of a query with nothing to see differs between them: let it see all, and clear it after.
        self.blind = ~allowed.any(dim=-1, keepdim=True)  # B 1 (1 or L) 1
        self.allowed = allowed | self.blind

    def _prepare_packing(self) -> None:
        length = self.real.shape[1]
        blind = ~self.real.any(dim=1, keepdim=True)  # B 1
        first = torch.arange(length, device=self.real.device) == 0
        packed = self.real | (blind & first)  # no kernel meets a row of no keys
        self.blind = blind[:, :, None, None]  # B 1 1 1
        self.positions = packed.flatten().nonzero().squeeze(1)  # T
        self.starts = F.pad(packed.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)  # B + 1


def attention(query: Tensor, key: Tensor, value: Tensor, keys: Keys | None = None) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(K).

    Args:
        query: (B, S, N, K).
        key, value: (B, L, N, K); or (T, N, K), where they were made of tokens that `keys.pack` packed.
        keys: which of them may be attended to; None: all.

    Returns:
        (B, S, N, K). 0 for queries that have nothing to attend to.
    """
    if key.shape[-3] == 0:
        return _attend_to_nothing(query, key, value)
    if keys is None:
        return _sdpa(query, key, value)
    if keys.backend == "varlen":
        return _varlen(query, key, value, keys).masked_fill(keys.blind, 0)
    blind = keys.blind.transpose(1, 2)  # B (1 or S) 1 1
    return _sdpa(query, key, value, keys.allowed).masked_fill(blind, 0)


def fast_backend(device: torch.device, dtype: torch.dtype, head_channels: int) -> Backend:
    """The backend to prefer for ragged keys."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_channels > 256:
        return "sdpa"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:  # torch before 2.10
        return "sdpa"
    return "varlen" if torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


def _sdpa(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    dtype = query.dtype
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # B N . K
    if query.device.type == "cpu":  # torch's CPU kernel: its backward pass takes nine times as long in bf16 as in fp32
        query, key, value = (tensor.float() for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2).to(dtype)


def _varlen(query: Tensor, key: Tensor, value: Tensor, keys: Keys) -> Tensor:
    batch, length = query.shape[:2]
    starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * length  # every row has all its queries
    packed = query.flatten(0, 1)  # (B S) N K
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(packed, key, value, starts, keys.starts, length, keys.real.shape[1])
        assert isinstance(out, Tensor)
    else:
        out = _varlen_by_rows(packed, key, value, starts, keys.starts)
    return out.unflatten(0, (batch, length))


def _varlen_by_rows(query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor) -> Tensor:
    """Computes what the kernel does, one row after the other: (., N, K) packed -> (., N, K) packed."""
    rows = []
    for q_first, q_end, k_first, k_end in zip(query_starts, query_starts[1:], key_starts, key_starts[1:]):
        own = slice(int(k_first), int(k_end))
        rows.append(_sdpa(query[None, int(q_first) : int(q_end)], key[None, own], value[None, own]))
    return torch.cat(rows, dim=1)[0]


def _attend_to_nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Zeros, by way of all three inputs: each gets a gradient (of zeros), as every rank of a sharded model must."""
    shape = (query.shape[0], 0, *query.shape[2:])
    weights = torch.einsum("bsnk, blnk -> bnsl", query, key.reshape(shape)).softmax(dim=-1)
    return torch.einsum("bnsl, blnk -> bsnk", weights, value.reshape(shape))
