"""Prompt embeddings and latents as bytes: `encode` on the model's device, `decode` from a column and its field alone.

A row holds its L tokens one after the other, each of `bytes_per_token(codec, E)` bytes, little-endian:

| codec      | one token of width E                         | rms error on LLM states |
|------------|----------------------------------------------|-------------------------|
| `fp32`     | E float32                                    | none                    |
| `bf16`     | E bfloat16                                   | 0.17 %                  |
| `fp8_e4m3` | E float8_e4m3fn, then one float32 scale      | 2.7 %                   |

The value of an fp8 token is `float8 * scale`, with `scale = max|x| / 448`, so that one token's outliers never spoil
another token. L is the number of bytes over `bytes_per_token`; a prompt of no tokens is an empty value, not a null.

Latents (C, H, W) lie channel by channel, row by row, each value a `bf16`, `fp16` or `fp32`; their height and width follow
from the row's bucket.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

from lidit.store import columns
from lidit.store.buckets import parse_bucket

if TYPE_CHECKING:
    import pyarrow as pa

CODECS = ("bf16", "fp32", "fp8_e4m3")
LATENT_CODECS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_MAX = 448.0  # largest finite float8_e4m3fn

# How far a decoded value may lie from what was encoded, as (share of the value, share of the token's largest value):
# half a unit in the last place of the format, and for fp8 also half the spacing of its subnormals.
TOLERANCE = {"fp32": (0.0, 0.0), "bf16": (2.0**-8, 0.0), "fp8_e4m3": (2.0**-4, 2.0**-10 / FP8_MAX * 1.01)}

# Rounding of a model's own arithmetic when batches and prefix are cut differently, as a share of a token's largest value.
ARITHMETIC = {"fp32": 1e-4, "bf16": 5e-2}


def excess(value: np.ndarray, again: np.ndarray, codec: str, dtype: str) -> float:
    """Returns how far two (L, E) arrays differ beyond what codec and arithmetic explain, as a share of a token's largest value.

    Args:
        value: as stored and decoded.
        again: the same made once more.
        codec: that `value` was stored by.
        dtype: that the model computes in, a key of `ARITHMETIC`.
    """
    if not value.size:
        return 0.0
    relative, of_largest = TOLERANCE[codec]
    largest = np.abs(again).max(axis=1, keepdims=True)
    allowed = relative * np.abs(again) + (of_largest + ARITHMETIC[dtype]) * largest
    return float(((np.abs(value - again) - allowed) / np.maximum(largest, 1e-30)).max())


def check_codec(codec: str) -> str:
    """Returns `codec`, or raises ValueError naming the ones that exist."""
    if codec not in CODECS:
        raise ValueError(f"codec: expected one of {', '.join(CODECS)}, received {codec!r}")
    return codec


def bytes_per_token(codec: str, width: int) -> int:
    """Bytes of one token of `width` channels."""
    return {"bf16": 2 * width, "fp32": 4 * width, "fp8_e4m3": width + 4}[check_codec(codec)]


def encode(prompt_embeds: torch.Tensor, codec: str) -> torch.Tensor:
    """`prompt_embeds` (T, E) float, on any device -> (T, bytes_per_token) uint8 on the same device.

    Non-finite values are the caller's to catch before: they do not survive fp8.
    """
    tokens, width = prompt_embeds.shape
    if check_codec(codec) == "fp32":
        # Flat first: `contiguous` leaves an empty tensor its strides, which `view` then refuses.
        packed = prompt_embeds.float().reshape(-1).view(torch.uint8)
    elif codec == "bf16":
        packed = prompt_embeds.bfloat16().reshape(-1).view(torch.uint8)
    else:
        states = prompt_embeds.float()
        scale = states.abs().amax(dim=1, keepdim=True) / FP8_MAX  # (T, 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).contiguous()
        values = (states / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
        packed = torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=1)
    return packed.reshape(tokens, bytes_per_token(codec, width))


def decode_bytes(data: bytes | memoryview | np.ndarray, codec: str, width: int) -> np.ndarray:
    """The bytes of one row -> float32 (L, E). Raises ValueError where they are no whole number of tokens."""
    raw = np.frombuffer(data, dtype=np.uint8)
    per_token = bytes_per_token(codec, width)
    if raw.size % per_token:
        raise ValueError(
            f"{codec} embeddings of width {width}: expected a multiple of {per_token} bytes, received {raw.size}; "
            f"the column and its metadata do not belong together"
        )
    raw = raw.reshape(-1, per_token)
    if codec == "fp32":
        return raw.view("<f4").copy()
    if codec == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    scale = np.ascontiguousarray(raw[:, width:]).view("<f4")  # (L, 1)
    return _fp8_values()[raw[:, :width]] * scale


def decode(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> list[np.ndarray | None]:
    """A column of embeddings -> one float32 (L, E) per row, None where the row is null.

    Needs only the field's metadata (`lidit:codec`, `lidit:width`), as every table of the store carries it.
    """
    metadata = field.metadata or {}
    codec, width = metadata.get(columns.META_CODEC.encode()), metadata.get(columns.META_WIDTH.encode())
    if codec is None or width is None:
        raise ValueError(
            f"column {field.name!r}: expected field metadata {columns.META_CODEC!r} and {columns.META_WIDTH!r}, "
            f"received {sorted(key.decode() for key in metadata)}; pass the field of the table's own schema"
        )
    return [
        None if not value.is_valid else decode_bytes(value.as_buffer() or b"", codec.decode(), int(width))
        for value in column
    ]


def finite_values(data: bytes | memoryview | pa.Buffer, codec: str, width: int) -> bool:
    """Tells whether the bytes of one row hold neither NaN nor Inf, by the exponent bits."""
    raw = np.frombuffer(data, np.uint8)
    if codec == "bf16":
        return not bool(((raw.view("<u2") & 0x7F80) == 0x7F80).any())
    if codec == "fp32":
        return bool(np.isfinite(raw.view("<f4")).all())
    raw = raw.reshape(-1, bytes_per_token(codec, width))
    scale = np.ascontiguousarray(raw[:, width:]).view("<f4")
    return bool(((raw[:, :width] & 127) != 127).all() and np.isfinite(scale).all())


def bytes_per_value(codec: str) -> int:
    """Bytes of one value of latents. ValueError where there is no such codec."""
    if codec not in LATENT_CODECS:
        raise ValueError(f"codec of latents: expected one of {', '.join(LATENT_CODECS)}, received {codec!r}")
    return LATENT_CODECS[codec].itemsize


def encode_latents(latents: torch.Tensor, codec: str) -> torch.Tensor:
    """`latents` (B, C, H, W) float, on any device -> (B, C * H * W * bytes_per_value) uint8 on the same device.

    Values beyond fp16's range become Inf: the caller's to catch.
    """
    size = bytes_per_value(codec)
    packed = latents.to(LATENT_CODECS[codec]).contiguous().view(torch.uint8)
    return packed.reshape(latents.shape[0], latents[0].numel() * size if len(latents) else 0)


def decode_latents(
    column: pa.Array | pa.ChunkedArray, field: pa.Field, buckets: pa.Array | pa.ChunkedArray | list[str | None]
) -> list[np.ndarray | None]:
    """A column of latents and its rows' buckets -> one float32 (C, H, W) per row, None where the row is null.

    Needs only the field's metadata (`lidit:codec`, `lidit:channels`, `lidit:downscale`) and `HEIGHTxWIDTH` of every row.
    Of a column of moments a row is (2C, H, W): mean, then deviation.

    Raises:
        ValueError: the field is not of latents, or a value does not have the size that its bucket says.
    """
    metadata = columns.metadata_of(field)
    wanted = (columns.META_CODEC, columns.META_CHANNELS, columns.META_DOWNSCALE)
    if any(key not in metadata for key in wanted):
        raise ValueError(
            f"column {field.name!r}: expected field metadata {', '.join(wanted)}, received {sorted(metadata)}; pass the field "
            f"of the table's own schema"
        )
    codec, downscale = metadata[columns.META_CODEC], int(metadata[columns.META_DOWNSCALE])
    planes = int(metadata[columns.META_CHANNELS]) * len(metadata.get(columns.META_MOMENTS, "mean").split(","))
    names = buckets if isinstance(buckets, list) else buckets.to_pylist()
    return [
        None
        if not value.is_valid
        else decode_latents_bytes(value.as_buffer(), codec, (planes, *_latent_size(name, downscale)))
        for value, name in zip(column, names, strict=True)
    ]


def decode_latents_bytes(data: bytes | memoryview | pa.Buffer, codec: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The bytes of one row -> float32 of that shape (C, H, W). ValueError where they are not as many as it takes."""
    raw, size = np.frombuffer(data, np.uint8), bytes_per_value(codec)
    if raw.size != np.prod(shape) * size:
        raise ValueError(
            f"{codec} latents of shape {shape}: expected {np.prod(shape) * size:,} bytes, received {raw.size:,}; the column, "
            f"its bucket and its metadata do not belong together"
        )
    if codec == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return raw.view("<f2" if codec == "fp16" else "<f4").astype(np.float32).reshape(shape)


def _latent_size(bucket: str | None, downscale: int) -> tuple[int, int]:
    """(H, W) of the latents of a bucket."""
    if bucket is None:
        raise ValueError("a row has latents and no bucket: expected both or neither")
    height, width = parse_bucket(bucket)
    return height // downscale, width // downscale


@functools.cache
def _fp8_values() -> np.ndarray:
    """The 256 values of float8_e4m3fn: 4 exponent bits (bias 7), 3 of mantissa, no infinities, 0x7F and 0xFF NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0), mantissa / 8 * 2.0**-6)
    values[(code & 127) == 127] = np.nan
    return (values * np.where(code < 128, 1, -1)).astype(np.float32)
