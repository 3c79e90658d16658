"""A batch holds exactly what the table holds, whatever the codec; draws depend on seed and image number alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lidit.diffusion import Flow, draw, sample_rng
from lidit.store import columns
from lidit.store.features import Features
from trainer.config import DataConfig
from trainer.data.assemble import DROPPED, Assembler, HostBuffers
from trainer.data.survey import survey

pytestmark = pytest.mark.unit

BOTH = {columns.CAPTION: 0.5, columns.CAPTION_ORIGINAL: 0.5}
DATA = DataConfig(encoders=("one", "two"), text_mix=BOTH, pad_multiple=4, prompt_drop_prob=0.2)


def assembler(uri: str, data: DataConfig = DATA, seed: int = 0, **options: Any) -> Assembler:
    features = Features(uri, data.encoders, data.text_mix, latents=options.pop("latents", columns.LATENTS))
    return Assembler(features, survey(features).rows, data, seed, **options)


def check(batch: Any, store: Any, texts: tuple[str, ...], tolerance: float = 0.0) -> None:
    """Every value of the batch against what was written."""
    for index, row in enumerate(batch.rows.tolist()):
        assert store.buckets[row] == batch.bucket
        for name, embeds in batch.prompt_embeds.items():
            text, mask = int(batch.texts[index]), batch.prompt_mask[name][index]
            expected = store.null_embeds[name] if text == DROPPED else store.embeds[texts[text], name][row]
            assert mask.sum() == len(expected) and mask[: len(expected)].all()
            np.testing.assert_allclose(embeds[index][mask].float().numpy(), expected, rtol=tolerance, atol=0)
            assert (embeds[index][~mask] == 0).all()


@pytest.mark.parametrize("codec", ["bf16", "fp32", "fp8_e4m3"])
@pytest.mark.parametrize("latents_codec", ["bf16", "fp16", "fp32"])
def test_a_batch_is_what_was_written(make_writer: Callable[..., Any], codec: str, latents_codec: str) -> None:
    writer = make_writer(texts=(columns.CAPTION, columns.CAPTION_ORIGINAL), codec=codec, latents_codec=latents_codec)
    writer.fragment(["64x48"] * 12, {columns.CAPTION: [1], columns.CAPTION_ORIGINAL: [2]})
    writer.fragment(["64x48"] * 3)
    made = assembler(writer.store.uri)
    rows = np.array([14, 0, 1, 2, 7, 12, 1, 3])
    batch = made.read_now("64x48", rows, np.arange(8))
    assert batch.latents.dtype == torch.float32 and batch.latents.shape == (8, 4, 8, 6)
    assert batch.prompt_embeds["one"].dtype == (torch.float32 if codec == "fp32" else torch.bfloat16)
    assert batch.prompt_embeds["two"].shape[1] % 4 == 0
    for index, row in enumerate(rows.tolist()):
        np.testing.assert_array_equal(batch.latents[index].numpy(), writer.store.latents[row])
    check(batch, writer.store, made.features.texts, tolerance=2**-8 if codec == "fp8_e4m3" else 0)  # fp8 becomes bf16
    assert {name: tuple(value.shape) for name, value in batch.instruction_embeds.items()} == {
        "one": (3, 8),
        "two": (5, 16),
    }


def test_prompts_of_no_tokens_make_no_trouble(make_writer: Callable[..., Any]) -> None:
    """All prompts empty, and an empty prompt that is no token long: L is 0."""
    writer = make_writer(longest=0, null_tokens=0)
    writer.fragment(["64x64"] * 4)
    data = replace(DATA, text_mix={columns.CAPTION: 1.0}, prompt_drop_prob=0.5)
    batch = assembler(writer.store.uri, data).read_now("64x64", np.arange(4), np.arange(4))
    assert batch.prompt_embeds["one"].shape == (4, 0, 8) and batch.prompt_mask["two"].shape == (4, 0)


def test_dropped_prompts_are_the_real_empty_prompt(store: Any) -> None:
    made = assembler(store.uri, replace(DATA, prompt_drop_prob=1.0))
    rows = np.flatnonzero(made.rows.codes == 1)[:6]
    batch = made.read_now("64x64", rows, np.arange(6))
    assert (batch.texts == DROPPED).all()
    check(batch, store, made.features.texts)
    assert batch.prompt_mask["one"].sum(dim=1).tolist() == [1] * 6


def test_validation_drops_nothing(store: Any) -> None:
    made = assembler(store.uri, replace(DATA, prompt_drop_prob=1.0), drop=False)
    rows = np.flatnonzero(made.rows.codes == 1)[:6]
    assert (made.choose_texts(rows, np.arange(6)) != DROPPED).all()


def test_texts_are_drawn_by_the_mix_and_fall_back_where_null(store: Any) -> None:
    data = replace(DATA, text_mix={columns.CAPTION: 0.8, columns.CAPTION_ORIGINAL: 0.2}, prompt_drop_prob=0.1)
    made = assembler(store.uri, data)
    assert made.rows.texts is not None
    whole = np.flatnonzero((made.rows.codes != 255) & (made.rows.texts == 3))[:1]
    drawn = Counter(made.choose_texts(np.repeat(whole, 5000), np.arange(5000)).tolist())
    assert drawn[DROPPED] / 5000 == pytest.approx(0.1, abs=0.015)
    assert drawn[0] / (drawn[0] + drawn[1]) == pytest.approx(0.8, abs=0.02)
    for bits, text in ((1, 0), (2, 1)):
        row = np.flatnonzero((made.rows.codes != 255) & (made.rows.texts == bits))[:1]
        assert set(made.choose_texts(np.repeat(row, 200), np.arange(200)).tolist()) == {DROPPED, text}


def test_draws_are_functions_of_seed_and_image_number(store: Any) -> None:
    made, other = assembler(store.uri), assembler(store.uri, seed=1)
    rows = np.flatnonzero(made.rows.codes == 1)[:40].repeat(5)
    numbers = np.arange(200) + 10**12
    texts = made.choose_texts(rows, numbers)
    shuffled = np.random.default_rng(0).permutation(200)
    assert np.array_equal(made.choose_texts(rows[shuffled], numbers[shuffled]), texts[shuffled])
    assert not np.array_equal(other.choose_texts(rows, numbers), texts)
    assert not np.array_equal(made.choose_texts(rows, numbers + 200), texts)


def test_the_order_of_the_mix_in_a_file_does_not_matter(store: Any) -> None:
    turned = replace(DATA, text_mix=dict(reversed(list(BOTH.items()))))
    rows = np.flatnonzero(assembler(store.uri).rows.codes == 1)[:30]
    made = [assembler(store.uri, data).choose_texts(rows, np.arange(30)) for data in (DATA, turned)]
    assert np.array_equal(*made)


def test_moments_are_drawn_anew_for_every_image_number(make_writer: Callable[..., Any]) -> None:
    writer = make_writer(moments=True, latents_codec="bf16")
    writer.fragment(["64x64"] * 3)
    data = replace(DATA, text_mix={columns.CAPTION: 1.0})
    made = assembler(writer.store.uri, data, seed=5, latents=columns.LATENT_MOMENTS)
    batch = made.read_now("64x64", np.array([0, 1, 0]), np.array([7, 8, 9]))
    assert batch.latents.shape == (3, 4, 8, 8)
    for index, (row, number) in enumerate(zip((0, 1, 0), (7, 8, 9))):
        mean, deviation = np.split(writer.store.latents[row], 2)
        noise = sample_rng(5, number, "latents").standard_normal((4, 8, 8), dtype=np.float32)
        np.testing.assert_allclose(batch.latents[index].numpy(), mean + deviation * noise, rtol=1e-6, atol=1e-6)
    assert not torch.equal(batch.latents[0], batch.latents[2])


def test_noise_and_timesteps_come_with_the_batch_if_asked(store: Any) -> None:
    made = assembler(store.uri, objective=Flow(shift=3.0), seed=4)
    rows = np.flatnonzero(made.rows.codes == 1)[:3]
    batch = made.read_now("64x64", rows, np.array([11, 5, 3]))
    timestep, noise = draw(Flow(shift=3.0), 4, [11, 5, 3], (4, 8, 8))
    assert batch.noise is not None and batch.timestep is not None
    assert torch.equal(batch.timestep, timestep) and torch.equal(batch.noise, noise)


def test_neighbours_are_asked_for_together_and_texts_apart(store: Any) -> None:
    made = assembler(store.uri)
    rows = np.array([25, 21, 22, 60, 5, 6, 7, 22])
    texts = np.array([0, 0, 0, 0, 1, DROPPED, 1, 0], np.int8)
    reads = made.reads(rows, texts, sample_bytes=1000)
    asked = {(read.fragment, read.text): read.rows.tolist() for read in reads}
    assert asked == {(1, 0): [1, 2, 2, 5], (3, 0): [0], (0, 1): [5, 7], (0, DROPPED): [6]}
    assert sorted(np.concatenate([read.members for read in reads]).tolist()) == list(range(8))
    for read in reads:
        fragments, places = made.features.locate(rows[read.members])
        assert (fragments == read.fragment).all() and np.array_equal(places, read.rows)
        assert (texts[read.members] == read.text).all()
    large = made.reads(np.arange(20), np.zeros(20, np.int8), sample_bytes=4 << 20)
    assert [len(read.rows) for read in large] == [2] * 10  # at most 8 MB


def test_latents_of_another_size_than_the_bucket_says(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"] * 2)
    made = assembler(writer.store.uri, replace(DATA, text_mix={columns.CAPTION: 1.0}))
    with pytest.raises(
        RuntimeError, match=r"'latents': expected 768 bytes for bucket 64x48 \(fp32, 4x8x6\), received 1024"
    ):
        made.read_now("64x48", np.arange(2), np.arange(2))


def test_memory_is_used_again_once_a_batch_is_gone() -> None:
    buffers = HostBuffers(pin=False)
    first = buffers.empty((3, 1 << 20), torch.bfloat16)
    place, view = first.data_ptr(), first[1, :10]
    del first
    second = buffers.empty((3, 1 << 20), torch.bfloat16)
    assert second.data_ptr() != place  # a view of the first is still in use
    del view
    third = buffers.empty((6 << 20,), torch.uint8)
    assert third.data_ptr() == place and third.shape == (6 << 20,)
    assert buffers.empty((2, 0, 5), torch.float32).shape == (2, 0, 5)
