"""Batches of the plan, read ahead by threads: the trainer's loader.

A feeder walks the plan ahead of the training. Rows of one block group that this rank will need are asked for together, so that
whole blocks are read; samples wait as Arrow values until their batch is due, and are then copied once, into padded tensors.
Nothing here draws a random number of its own, so a loader that starts at step n gives what an unbroken one gives at n.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.config import DataConfig
from trainer.data.assemble import DROPPED, Assembler, Batch, Values
from trainer.data.survey import Survey
from trainer.data.tables import PhaseTable

__all__ = ["DROPPED", "Batch", "BatchSlice", "Batches"]

ASSEMBLERS = 2  # threads that copy rows into batches: two batches at once


@dataclass(frozen=True)
class BatchSlice:
    """The part of every batch that one rank trains on, and in what microbatches."""

    microbatch_size: int
    """Samples of a microbatch; divides the rank's part of a batch."""
    rank: int = 0
    """Which of the equal parts."""
    world_size: int = 1
    """Parts of a batch: the number of ranks."""


@dataclass(frozen=True)
class _Requested:
    """A sample that has been requested from the table."""

    source: Future[dict[str, Values]]
    index: int  # in the source
    row: int
    text: int


class Batches:
    """An iterator over this rank's microbatches, from one step to another; close it, or use it in a `with`.

    Args:
        table: the pinned table, what is in it, and its order.
        data: mix, drops, threads, memory.
        seed: of the run.
        part: which samples of every batch are this rank's.
        steps: of the plan.
        first_image: images seen before the plan's step 0, that is in earlier phases.
        device: where the batches are given; with CUDA they are copied while the one before is in use.
        with_noise: whether batches come with timestep and noise.

    Raises:
        RuntimeError: while iterating, where the table cannot be read.
    """

    def __init__(
        self,
        table: PhaseTable,
        data: DataConfig,
        seed: int,
        part: BatchSlice,
        steps: range,
        *,
        first_image: int = 0,
        device: torch.device | str = "cpu",
        with_noise: bool = True,
    ):
        self.plan, self.device = table.plan, torch.device(device)
        objective, pin = table.objective if with_noise else None, self.device.type == "cuda"
        self._assembler = Assembler(table.features, table.survey.rows, data, seed, objective, pin)
        self._places = np.arange(*self.plan.share(part.rank, part.world_size))  # ours, in every batch
        self._microbatch_size = part.microbatch_size
        self._steps = steps
        self._first_image = first_image
        self._sample_bytes = table.survey.sample_bytes
        share = len(self._places)
        assert share % part.microbatch_size == 0, "the microbatch must divide the rank's share"
        self.read_steps = read_steps(data, table.survey, share)
        self._ahead_steps = self.read_steps + data.ahead_steps
        self.wait_seconds = 0.0  # that `next` has waited for data so far
        self._held: dict[tuple[int, int], _Requested] = {}  # (bucket, visit) -> sample; the feeder's alone
        self._ready: queue.Queue[Future[Batch] | None] = queue.Queue(data.ahead_steps * (share // part.microbatch_size))
        self._closed = threading.Event()
        # Two pools: a batch whose rows are there must not queue behind the reads of a later block group.
        self._readers = ThreadPoolExecutor(data.read_threads, "batches-read", initializer=self._start_thread)
        self._assemblers = ThreadPoolExecutor(ASSEMBLERS, "batches-assemble", initializer=self._start_thread)
        self._instruction = {name: v.to(self.device) for name, v in self._assembler.instruction_embeds.items()}
        self._coming: Batch | None = None  # with CUDA: on its way to the device
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._feeder = threading.Thread(target=self._feed, name="batches-feeder", daemon=True)
        self._feeder.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            batch = self._next_on_host() if self._copying is None else self._next_on_device()
        finally:
            self.wait_seconds += time.perf_counter() - start
        if batch is None:
            raise StopIteration
        return replace(batch, instruction_embeds=self._instruction)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and frees what they hold."""
        self._closed.set()
        while self._feeder.is_alive():  # it may wait for room
            self._drain()
            self._feeder.join(0.01)
        self._drain()
        for pool in (self._readers, self._assemblers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()

    # -- the consumer's side ------------------------------------------------------------------------------------------

    def _next_on_host(self) -> Batch | None:
        if self._closed.is_set():
            return None
        future = self._ready.get()
        if future is None:
            self._ready.put(None)  # so that asking again ends again
            return None
        return future.result()

    def _next_on_device(self) -> Batch | None:
        """Returns the batch whose copy to the device was started last time, and starts the copy of the next one."""
        assert self._copying is not None
        batch = self._coming or self._copy(self._next_on_host())
        if batch is None:
            return None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copying)
        for tensor in batch.tensors():
            tensor.record_stream(current)  # its memory was allocated for the other stream
        self._coming = self._copy(self._next_on_host())
        return batch

    def _copy(self, batch: Batch | None) -> Batch | None:
        if batch is None:
            return None
        with torch.cuda.stream(self._copying):
            return batch.to(self.device)

    # -- the feeder's side --------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinned memory must not open a context on every rank's GPU 0

    def _feed(self) -> None:
        self._start_thread()
        try:
            next_step = self._steps.start
            for step in self._steps:
                while next_step < min(step + self._ahead_steps, self._steps.stop):
                    self._ask(next_step)
                    next_step += 1
                for microbatch in range(len(self._places) // self._microbatch_size):
                    self._put(self._submit(step, microbatch))
                    if self._closed.is_set():
                        return
            self._put(None)
        except BaseException as error:  # whatever it is, it is the consumer's to see
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            self._put(failed)

    def _put(self, item: Future[Batch] | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _ask(self, step: int) -> None:
        """Requests the rows of a step, and the rows of the same block groups that later batches of the bucket need."""
        bucket, number = self.plan.bucket_at(step)
        visits, missing = self._missing(bucket, number)
        if not missing.any():
            return
        visits = visits[missing]
        groups, images = self.plan.groups_of(bucket, visits), [self._image_numbers(step, self._places[missing])]
        requested = [visits]
        for later in range(number + 1, number + self.read_steps):
            visits, missing = self._missing(bucket, later)
            missing &= np.isin(self.plan.groups_of(bucket, visits), groups)
            later_step = self.plan.step_of(bucket, later) if missing.any() else self._steps.stop
            if later_step >= self._steps.stop:
                break
            requested.append(visits[missing])
            images.append(self._image_numbers(later_step, self._places[missing]))
        self._read(bucket, np.concatenate(requested), np.concatenate(images))

    def _missing(self, bucket: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (this rank's visits in a batch of the bucket, a mask of those that were not requested yet)."""
        visits = number * self.plan.global_batch_size + self._places
        return visits, np.array([(bucket, visit) not in self._held for visit in visits.tolist()])

    def _read(self, bucket: int, visits: np.ndarray, image_numbers: np.ndarray) -> None:
        rows = self.plan.rows_of(bucket, visits)
        texts = self._assembler.choose_texts(rows, image_numbers)
        for read in self._assembler.reads(rows, texts, self._sample_bytes):
            source = self._readers.submit(self._assembler.fetch, read)
            for index, member in enumerate(read.members.tolist()):
                self._held[bucket, int(visits[member])] = _Requested(source, index, int(rows[member]), read.text)

    def _submit(self, step: int, microbatch: int) -> Future[Batch]:
        bucket, number = self.plan.bucket_at(step)
        first = microbatch * self._microbatch_size
        places = self._places[first : first + self._microbatch_size]
        visits = number * self.plan.global_batch_size + places
        requested = [self._held.pop((bucket, visit)) for visit in visits.tolist()]
        rows = np.array([sample.row for sample in requested])
        texts = np.array([sample.text for sample in requested], np.int8)
        images, name = self._image_numbers(step, places), self.plan.rows.buckets[bucket]

        def work() -> Batch:
            sources = [(sample.source.result(), sample.index) for sample in requested]
            return self._assembler.assemble(step, microbatch, name, rows, images, texts, sources)

        return self._assemblers.submit(work)

    def _image_numbers(self, step: int, places: np.ndarray) -> np.ndarray:
        return self._first_image + step * self.plan.global_batch_size + places

    def _drain(self) -> None:
        while True:
            try:
                future = self._ready.get_nowait()
            except queue.Empty:
                return
            if future is not None:
                future.cancel()


def read_steps(data: DataConfig, survey: Survey, share: int) -> int:
    """Returns how many batches of a bucket are read at once: `block_steps`, or as many as `buffer_mb` has room for.

    Held are at most one such block group for each bucket that is in use, and one on its way.
    """
    used = int((survey.rows.counts > 0).sum())
    step_bytes = max(1.0, share * survey.sample_bytes)
    return int(np.clip(data.buffer_mb * 2**20 // (step_bytes * (used + 1)), 1, data.block_steps))
