"""Codecs: what goes in comes out within the stated tolerance, from a column and its field alone."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from lidit.store import codec, columns
from lidit.store.codec import (
    CODECS,
    TOLERANCE,
    bytes_per_token,
    decode,
    decode_bytes,
    decode_latents,
    encode,
    encode_latents,
    finite_values,
)

pytestmark = pytest.mark.unit


def states(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random states whose channels span many orders of magnitude, with one outlier channel as LLMs have."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=draw) * 10 ** (4 * torch.rand(tokens, width, generator=draw) - 3)
    values[:, 0] *= 300
    return values


def within_tolerance(made: np.ndarray, wanted: np.ndarray, name: str) -> bool:
    of_value, of_largest = TOLERANCE[name]
    largest = np.abs(wanted).max(axis=1, keepdims=True, initial=0)
    return bool((np.abs(made - wanted) <= of_value * np.abs(wanted) + of_largest * largest).all())


def field(name: str, width: int) -> pa.Field:
    return pa.field("e", pa.large_binary(), metadata={columns.META_CODEC: name, columns.META_WIDTH: str(width)})


def pack(values: torch.Tensor, name: str) -> bytes:
    return encode(values, name).numpy().tobytes()


def test_all_fp8_values_are_torchs():
    torchs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(codec._fp8_values(), torchs)
    # Through the decoder as well: every code as one token of 256 channels, scale 1.
    data = bytes(range(256)) + np.float32(1).tobytes()
    np.testing.assert_array_equal(decode_bytes(data, "fp8_e4m3", 256)[0], torchs)


def test_bf16_is_torchs_bit_for_bit():
    values = states(7, 33)
    np.testing.assert_array_equal(decode_bytes(pack(values, "bf16"), "bf16", 33), values.bfloat16().float().numpy())


def test_fp32_keeps_every_bit():
    values = states(7, 33)
    np.testing.assert_array_equal(decode_bytes(pack(values, "fp32"), "fp32", 33), values.numpy())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("tokens, width", [(0, 8), (1, 1), (1, 4096), (50, 33), (200, 64)])
def test_round_trip_within_tolerance(name, tokens, width):
    values = states(tokens, width)
    packed = encode(values, name)
    assert packed.shape == (tokens, bytes_per_token(name, width)) and packed.dtype == torch.uint8
    made = decode_bytes(packed.numpy().tobytes(), name, width)
    assert made.shape == (tokens, width) and made.dtype == np.float32
    assert within_tolerance(made, values.numpy(), name)


@pytest.mark.parametrize("name", CODECS)
def test_round_trip_of_bf16_input_and_of_a_view(name):
    values = states(12, 24).bfloat16()
    view = values[1::2, :]  # not contiguous
    made = decode_bytes(pack(view, name), name, 24)
    assert within_tolerance(made, view.float().numpy(), name)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_of_a_strided_view(name, dtype):
    """An empty tensor counts as contiguous whatever its strides."""
    for view in (states(5, 8).to(dtype).T[:0], states(5, 10).to(dtype)[:0, ::2]):
        assert encode(view, name).shape == (0, bytes_per_token(name, 5))


def test_tolerance_is_tight():
    """A tolerance ten times too wide would let a wrong decoder through."""
    values = states(500, 64)
    for name in ("bf16", "fp8_e4m3"):
        made = decode_bytes(pack(values, name), name, 64)
        error = np.abs(made - values.numpy()) / np.abs(values.numpy())
        large = np.abs(values.numpy()) > 0.1 * np.abs(values.numpy()).max(axis=1, keepdims=True)
        assert error[large].max() > 0.8 * TOLERANCE[name][0]


def test_zeros_outliers_and_extremes_survive_fp8():
    values = torch.zeros(5, 8)
    values[1, 3] = 1e30  # one huge channel
    values[2] = torch.tensor([1e-30, -1e-30, 0, 0, 0, 0, 0, 0])
    values[3] = torch.tensor([448.0, -448, 1, -1, 0.5, 2**-9, 0, 3])
    values[4] = -5.0
    made = decode_bytes(pack(values, "fp8_e4m3"), "fp8_e4m3", 8)
    assert np.isfinite(made).all()
    assert (made[0] == 0).all() and (made[1, [0, 1, 2, 4]] == 0).all()
    assert within_tolerance(made, values.numpy(), "fp8_e4m3")
    np.testing.assert_array_equal(made[3], values[3].numpy())


def test_one_tokens_outlier_leaves_the_others_alone():
    values = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with_outlier = values.clone()
    with_outlier[1, 0] = 1e6
    quiet, loud = (decode_bytes(pack(v, "fp8_e4m3"), "fp8_e4m3", 16) for v in (values, with_outlier))
    np.testing.assert_array_equal(quiet[[0, 2]], loud[[0, 2]])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_decode_column(name, binary):
    rows = [states(tokens, 6, seed=tokens) for tokens in (3, 0, 1, 5)]
    packed = [pack(row, name) for row in rows]
    column = pa.array([packed[0], None, packed[1], packed[2], None, packed[3]], binary)
    made = decode(column, field(name, 6))
    assert [None if row is None else row.shape for row in made] == [(3, 6), None, (0, 6), (1, 6), None, (5, 6)]
    for got, wanted in zip([made[0], made[2], made[3], made[5]], rows):
        assert within_tolerance(got, wanted.numpy(), name)
    # Slices (an offset into the buffers) and chunks give the same rows.
    for cut in (pa.chunked_array([column[:2], column[2:2], column[2:]]), column[0:6]):
        for again, once in zip(decode(cut, field(name, 6)), made, strict=True):
            assert (again is None) == (once is None)
            assert once is None or (again == once).all()
    sliced = decode(column.slice(2, 2), field(name, 6))
    assert sliced[0].shape == (0, 6) and (sliced[1] == made[3]).all()
    assert decode(column[:0], field(name, 6)) == []


def test_decode_says_which_metadata_is_missing():
    column = pa.array([b""], pa.large_binary())
    for metadata in (None, {columns.META_CODEC: "bf16"}, {columns.META_WIDTH: "4", "other": "x"}):
        with pytest.raises(ValueError, match=r"column 'e': expected field metadata 'lidit:codec' and 'lidit:width'"):
            decode(column, pa.field("e", pa.large_binary(), metadata=metadata))


@pytest.mark.parametrize("name", CODECS)
def test_decode_refuses_half_a_token(name):
    data = pack(states(2, 8), name)
    for cut in (data[:-1], data + b"\0", data[: bytes_per_token(name, 8) // 2]):
        with pytest.raises(ValueError, match=rf"expected a multiple of {bytes_per_token(name, 8)} bytes"):
            decode_bytes(cut, name, 8)
    with pytest.raises(ValueError, match="expected a multiple"):
        decode(pa.array([data[:-1]], pa.large_binary()), field(name, 8))


def test_unknown_codec_is_refused_with_the_names_of_all():
    for use in (lambda: encode(torch.zeros(1, 2), "fp16"), lambda: decode_bytes(b"", "fp16", 2)):
        with pytest.raises(ValueError, match=r"bf16, fp32, fp8_e4m3, received 'fp16'"):
            use()


@pytest.mark.parametrize("name", ["bf16", "fp32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finite_values(name, bad):
    values = states(4, 5)
    assert finite_values(pack(values, name), name, 5)
    assert finite_values(b"", name, 5)
    assert finite_values(pa.py_buffer(pack(values, name)), name, 5)
    values[2, 4] = bad
    assert not finite_values(pack(values, name), name, 5)


def test_finite_values_of_fp8():
    good = pack(states(3, 5), "fp8_e4m3")
    assert finite_values(good, "fp8_e4m3", 5) and finite_values(b"", "fp8_e4m3", 5)
    for code in (0x7F, 0xFF):
        broken = bytearray(good)
        broken[9 + 2] = code  # a channel of the second token
        assert not finite_values(bytes(broken), "fp8_e4m3", 5)
    for scale in (np.nan, np.inf):
        broken = bytearray(good)
        broken[9 + 5 : 9 + 9] = np.float32(scale).tobytes()
        assert not finite_values(bytes(broken), "fp8_e4m3", 5)
    # The bytes of a scale may look like a NaN code without being one.
    fine = bytearray(good)
    fine[5:9] = b"\x7f\x7f\x7f\x3f"
    assert finite_values(bytes(fine), "fp8_e4m3", 5)


def test_largest_values_of_each_codec_are_finite():
    values = torch.full((1, 4), torch.finfo(torch.float32).max)
    assert finite_values(pack(values, "fp32"), "fp32", 4)
    assert finite_values(pack(values, "fp8_e4m3"), "fp8_e4m3", 4)
    assert not finite_values(pack(values, "bf16"), "bf16", 4)  # rounds up to Inf, and is told


# -- latents -------------------------------------------------------------------------------------------------------------


def latents_field(codec, channels=3, **metadata):
    metadata = {"lidit:codec": codec, "lidit:channels": str(channels), "lidit:downscale": "8", **metadata}
    return pa.field("latents", pa.large_binary(), metadata=metadata)


@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11)])
def test_latents_come_back(codec, tolerance):
    torch.manual_seed(0)
    wide, tall = torch.randn(2, 3, 2, 4), torch.randn(1, 3, 5, 1)
    packed = [*encode_latents(wide, codec), *encode_latents(tall, codec)]
    column = pa.array([row.numpy().tobytes() for row in packed] + [None], pa.large_binary())
    values = decode_latents(column, latents_field(codec), ["16x32", "16x32", "40x8", None])
    assert values[3] is None
    for value, wanted in zip(values, [*wide, *tall]):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, wanted.numpy(), rtol=tolerance, atol=1e-6 if tolerance else 0)


def test_latents_of_arrow_columns_and_moments():
    moments = torch.arange(12.0).reshape(1, 6, 1, 2)
    column = pa.chunked_array(
        [pa.array([row.numpy().tobytes() for row in encode_latents(moments, "fp32")], pa.large_binary())]
    )
    stored = latents_field("fp32", **{"lidit:moments": "mean,deviation"})
    (value,) = decode_latents(column, stored, pa.chunked_array([["8x16"]]))
    assert np.array_equal(value, moments[0].numpy())
    assert encode_latents(torch.zeros(0, 4, 2, 2), "bf16").shape == (0, 0)


@pytest.mark.parametrize("codec", ["int8", "fp8_e4m3", ""])
def test_unknown_codec_of_latents(codec):
    with pytest.raises(ValueError, match="codec of latents: expected one of bf16, fp16, fp32"):
        encode_latents(torch.zeros(1, 1, 1, 1), codec)


def test_latents_of_another_size_than_their_bucket():
    column = pa.array([bytes(3 * 2 * 4 * 4)], pa.large_binary())
    for bucket, message in (
        ("16x40", r"expected 120 bytes, received 96"),
        (None, "no bucket"),
        ("wide", "HEIGHTxWIDTH"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_latents(column, latents_field("fp32"), [bucket])
    with pytest.raises(ValueError, match="lidit:downscale, received"):
        decode_latents(column, pa.field("latents", pa.large_binary(), metadata={"lidit:codec": "fp32"}), ["16x32"])
    with pytest.raises(ValueError):
        decode_latents(column, latents_field("fp32"), [])


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp32"])
def test_latents_are_packed_alike_on_a_gpu(codec):
    torch.manual_seed(0)
    latents = torch.randn(2, 3, 4, 4)
    assert torch.equal(encode_latents(latents.cuda(), codec).cpu(), encode_latents(latents, codec))
