"""The loader: the plan's batches in order, the same from any start and for any number of ranks; and its ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lidit.diffusion import Flow
from lidit.store import columns
from lidit.store.features import Features
from trainer.config import DataConfig, PhaseConfig, TrainConfig
from trainer.data.assemble import DROPPED
from trainer.data.loader import Batches, BatchSlice, read_steps
from trainer.data.plan import Plan
from trainer.data.survey import Survey, survey
from trainer.data.tables import PhaseTable, Tables

pytestmark = pytest.mark.unit

BOTH = {columns.CAPTION: 0.5, columns.CAPTION_ORIGINAL: 0.5}
DATA = DataConfig(encoders=("one", "two"), text_mix=BOTH, pad_multiple=4, block_rows=4, block_steps=4, read_threads=2)

WHOLE = BatchSlice(microbatch_size=8)


class Loader:
    """A store's features, survey and plan, and loaders of them."""

    def __init__(self, uri: str, data: DataConfig = DATA, global_batch_size: int = 8):
        self.features = Features(uri, data.encoders, data.text_mix)
        self.survey, self.data = survey(self.features), data
        self.plan = Plan(self.survey.rows, global_batch_size, 3, data.block_rows, data.block_steps)

    def __call__(
        self,
        first_step: int = 0,
        last_step: int = 20,
        part: BatchSlice = WHOLE,
        with_noise: bool = False,
        **options: Any,
    ) -> Batches:
        table, steps = PhaseTable(self.features, self.survey, self.plan, Flow()), range(first_step, last_step)
        return Batches(table, self.data, 11, part, steps, with_noise=with_noise, **options)


@pytest.fixture(scope="module")
def loader(store: Any) -> Loader:
    return Loader(store.uri)


def samples(batches: list[Any]) -> list[dict[str, Any]]:
    """What each sample of some batches is, without the padding that depends on its neighbours."""
    found = []
    for batch in batches:
        for index in range(len(batch)):
            found.append(
                {
                    "step": batch.step,
                    "number": int(batch.image_numbers[index]),
                    "row": int(batch.rows[index]),
                    "text": int(batch.texts[index]),
                    "bucket": batch.bucket,
                    "latents": batch.latents[index].numpy().tobytes(),
                    **{
                        name: batch.prompt_embeds[name][index][batch.prompt_mask[name][index]].float().numpy().tobytes()
                        for name in batch.prompt_embeds
                    },
                }
            )
    return found


def test_batches_are_the_plans_in_order(loader: Loader, store: Any) -> None:
    with loader() as batches:
        made = list(batches)
    assert [batch.step for batch in made] == list(range(20))
    for batch in made:
        planned = loader.plan.batch(batch.step)
        assert np.array_equal(batch.rows, planned.rows) and batch.bucket == loader.survey.rows.buckets[planned.bucket]
        assert np.array_equal(batch.image_numbers, batch.step * 8 + np.arange(8))
        for index, row in enumerate(batch.rows.tolist()):
            np.testing.assert_array_equal(batch.latents[index].numpy(), store.latents[row])
            for name in ("one", "two"):
                text = int(batch.texts[index])
                states = (
                    store.embeds[loader.features.texts[text], name][row] if text != DROPPED else store.null_embeds[name]
                )
                mask = batch.prompt_mask[name][index]
                np.testing.assert_array_equal(batch.prompt_embeds[name][index][mask].float().numpy(), states)
    assert {int(text) for batch in made for text in batch.texts} == {DROPPED, 0, 1}


@pytest.mark.parametrize("start", [1, 7, 13, 19])
def test_a_start_in_the_middle_gives_the_same_from_there(loader: Loader, start: int) -> None:
    with loader() as whole, loader(first_step=start) as resumed:
        assert samples(list(whole))[start * 8 :] == samples(list(resumed))


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 2), (2, 4), (4, 1), (8, 1)])
def test_ranks_and_microbatches_change_nothing(loader: Loader, world_size: int, microbatch_size: int) -> None:
    with loader() as whole:
        expected = samples(list(whole))
    parts = []
    for rank in range(world_size):
        with loader(part=BatchSlice(microbatch_size, rank, world_size)) as batches:
            made = list(batches)
        assert len(made) == 20 * 8 // world_size // microbatch_size
        assert [batch.microbatch for batch in made[: 8 // world_size // microbatch_size]] == list(
            range(8 // world_size // microbatch_size)
        )
        parts += samples(made)
    assert sorted(parts, key=lambda sample: sample["number"]) == expected


def test_images_of_earlier_phases_are_counted(loader: Loader) -> None:
    with loader(last_step=2) as plain, loader(last_step=2, first_image=1000) as later:
        first, second = list(plain), list(later)
    assert np.array_equal(second[1].image_numbers, 1000 + first[1].image_numbers)
    assert np.array_equal(second[1].rows, first[1].rows)
    assert any(not np.array_equal(a.texts, b.texts) for a, b in zip(first, second))


def test_the_end_is_the_end(loader: Loader) -> None:
    with loader(last_step=1) as batches:
        next(batches)
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(batches)
    with loader(first_step=4, last_step=4) as batches:
        assert list(batches) == []


def test_timesteps_and_noise_if_asked(loader: Loader) -> None:
    with loader(last_step=1, with_noise=True) as batches, loader(last_step=1) as without:
        batch = next(batches)
        assert batch.timestep is not None and batch.timestep.shape == (8,)
        assert batch.noise is not None and batch.noise.shape == batch.latents.shape
        assert next(without).noise is None


def test_closing_early_leaves_no_thread(loader: Loader) -> None:
    before = threading.active_count()
    batches = loader(last_step=10_000)
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_waiting_for_data_is_measured(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    take = loader.features.take

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return take(*arguments)

    monkeypatch.setattr(loader.features, "take", slow)
    with loader(last_step=2) as batches:
        next(batches)
        assert batches.wait_seconds > 0.09


def test_a_table_that_is_gone_ends_the_training_with_a_word(make_writer: Callable[..., Any]) -> None:
    writer = make_writer(texts=tuple(BOTH))
    writer.fragment(["64x64"] * 16)
    loader = Loader(writer.store.uri)
    for path in Path(writer.store.samples.uri, "data").iterdir():
        path.unlink()
    with loader() as batches, pytest.raises(RuntimeError, match=r"cannot read version .* clean-up"):
        next(batches)


def test_rows_appended_meanwhile_change_nothing(make_writer: Callable[..., Any]) -> None:
    writer = make_writer(texts=tuple(BOTH))
    writer.fragment(["64x64"] * 24)
    loader = Loader(writer.store.uri)
    with loader(last_step=6) as batches:
        expected = samples(list(batches))
    loader = Loader(writer.store.uri)
    with loader(last_step=6) as batches:
        made = [next(batches)]
        writer.fragment(["64x64"] * 24)
        loader.features.table.checkout_version(loader.features.version + 1).optimize.compact_files()
        made += list(batches)
    assert samples(made) == expected


def test_windows_are_read_whole_and_each_row_once(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank asks for a block's rows together: far fewer requests than samples, and no row of a visit twice."""
    taken: list[int] = []
    take = loader.features.take
    monkeypatch.setattr(loader.features, "take", lambda f, rows, names: taken.append(len(rows)) or take(f, rows, names))
    with loader(last_step=16) as batches:
        list(batches)
    assert len(taken) < 16 * 8 / 2
    assert sum(taken) <= 16 * 8


def test_memory_decides_how_far_windows_are_read() -> None:
    rows = Plan(survey_rows([100, 50]), 8, 0).rows
    found = Survey(rows, 150, {}, sample_bytes=2**20)
    data = replace(DATA, block_rows=8, block_steps=8)
    assert read_steps(replace(data, buffer_mb=1000), found, share=8) == 8
    assert (
        read_steps(replace(data, buffer_mb=96), found, share=8) == 4
    )  # two buckets and the window on its way: 3 x 4 x 8 MB
    assert read_steps(replace(data, buffer_mb=1), found, share=8) == 1


def survey_rows(counts: list[int]) -> Any:
    from trainer.data.plan import Rows

    codes = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    return Rows(codes, [f"{16 * (number + 1)}x16" for number in range(len(counts))])


def test_little_memory_gives_the_same_batches(store: Any) -> None:
    loader = Loader(store.uri)
    with loader() as batches:
        expected = samples(list(batches))
    loader.survey.sample_bytes = 1e12
    with loader() as batches:
        assert batches.read_steps == 1
        assert samples(list(batches)) == expected


def test_phases_have_orders_of_their_own(store: Any) -> None:
    phase = PhaseConfig(steps=5, global_batch_size=64, resolution=64)
    config = TrainConfig(store=store.uri, data=DATA, phases=(phase, phase), seed=3)
    tables = Tables(config.run_phases, config.data, {})
    first, second = (tables.phase(number).plan for number in range(2))
    assert first.seed == 3 and not np.array_equal(first.batch(0).rows, second.batch(0).rows)
    assert first.block_steps == config.data.block_steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_gpu_as_they_are_on_the_cpu(loader: Loader) -> None:
    with loader() as plain, loader(device="cuda") as moved:
        for here, there in zip(plain, moved, strict=True):
            assert there.latents.is_cuda and torch.equal(there.latents.cpu(), here.latents)
            for name in here.prompt_embeds:
                assert torch.equal(there.prompt_embeds[name].cpu(), here.prompt_embeds[name])
                assert there.instruction_embeds[name].is_cuda
