"""Rows of the table -> a batch: which prompt a sample gets, what is read for it, and how it all becomes padded tensors.

Which of its texts a sample is shown with, whether its prompt is dropped, and what is drawn from latent moments are functions
of (seed, image number) alone: see `lidit.diffusion.sample_rng`.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lidit.diffusion import Objective, draw, sample_rng
from lidit.store.codec import decode_bytes
from lidit.store.features import EmbedsFormat, Features
from trainer.config import DataConfig
from trainer.data.plan import Rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # codecs whose bytes are the tensor's
TAKE_BYTES = 8 << 20  # of one call; beyond it Lance's copies cost more than another call
DROPPED = -1
SIZE_CLASS = 1 << 20  # bytes; buffers of about one size are interchangeable
ALIGNMENT = 64  # bytes, of what torch allocates on a CPU


@dataclass(frozen=True)
class Batch:
    """A microbatch of one rank, as the model gets it."""

    step: int
    microbatch: int  # of the step's, on this rank
    bucket: str  # HEIGHTxWIDTH
    latents: Tensor  # (B, C, H, W) float32
    prompt_embeds: dict[str, Tensor]  # encoder -> (B, L, E), in the dtype of the column's codec
    prompt_mask: dict[str, Tensor]  # encoder -> (B, L) bool, true for real tokens
    instruction_embeds: dict[str, Tensor]  # encoder -> (P, E) float32, the same in every batch
    image_numbers: np.ndarray  # (B,) int64, the samples' places in the run: what their randomness depends on
    rows: np.ndarray  # (B,) int64, of the table
    texts: np.ndarray  # (B,) int8, number of the text in `Features.texts`; DROPPED: the empty prompt
    timestep: Tensor | None = None  # (B,) float32, where the loader was given an objective
    noise: Tensor | None = None  # (B, C, H, W) float32

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> Batch:
        """Moves the batch to a device, asynchronously from pinned memory. The instruction's states stay where they are."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        return replace(
            self,
            latents=moved(self.latents),
            prompt_embeds={name: moved(value) for name, value in self.prompt_embeds.items()},
            prompt_mask={name: moved(value) for name, value in self.prompt_mask.items()},
            timestep=None if self.timestep is None else moved(self.timestep),
            noise=None if self.noise is None else moved(self.noise),
        )

    def tensors(self) -> list[Tensor]:
        """Returns all tensors that `to` moves."""
        optional = [self.latents, *self.prompt_embeds.values(), *self.prompt_mask.values(), self.timestep, self.noise]
        return [value for value in optional if value is not None]


@dataclass(frozen=True)
class Read:
    """One request to the table: rows of a fragment, all shown with the same text."""

    fragment: int
    rows: np.ndarray  # (n,) ascending, of the fragment
    text: int  # DROPPED: latents alone
    members: np.ndarray  # (n,) which of the samples asked for


class Values:
    """A binary column as offsets and bytes, without a copy."""

    def __init__(self, column: pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        _, offsets, data = array.buffers()
        self.null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
        self.offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        self.data = np.frombuffer(data if data is not None else b"", np.uint8)

    def __getitem__(self, index: int) -> np.ndarray:
        """The bytes of a row."""
        assert self.null is None or not self.null[index], "planned as present"
        return self.data[self.offsets[index] : self.offsets[index + 1]]


class HostBuffers:
    """Memory for batches: pinned for a GPU, or plain memory that is used again once nobody has the batch any more.

    Fresh memory costs more than the copy into it (the kernel clears its pages one by one); torch keeps pinned memory itself.
    """

    def __init__(self, pin: bool):
        self._pin = pin
        self._free: dict[int, collections.deque[np.ndarray]] = collections.defaultdict(collections.deque)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns an uninitialized tensor on the CPU."""
        if self._pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        size = int(np.prod(shape)) * dtype.itemsize
        if size < SIZE_CLASS:
            return torch.empty(shape, dtype=dtype)
        room = -(-size // SIZE_CLASS) * SIZE_CLASS
        free = self._free[room]
        try:
            whole = free.pop()
        except IndexError:
            whole = _aligned(room)
        part = whole[:size]  # the tensor holds this view, and nobody else does
        weakref.finalize(part, free.append, whole).atexit = False
        return torch.from_numpy(part).view(dtype).view(*shape)


class Assembler:
    """Reads the values of samples and assembles them into batches.

    Args:
        features: the pinned table.
        rows: its survey's, for the texts that a row has.
        data: the config; mix and drops.
        seed: of the run.
        objective: where given, batches come with timestep and noise.
        pin: batches in pinned memory.
        drop: whether prompts are dropped; validation does not.
    """

    def __init__(
        self,
        features: Features,
        rows: Rows,
        data: DataConfig,
        seed: int,
        objective: Objective | None = None,
        pin: bool = False,
        drop: bool = True,
    ):
        self.features, self.rows, self.seed, self.objective = features, rows, seed, objective
        self.drop_prob = data.prompt_drop_prob if drop else 0.0
        self.pad_multiple = data.pad_multiple
        self.buffers = HostBuffers(pin)
        self._thresholds = np.cumsum(features.shares)
        self._preferred = np.argsort(-features.shares, kind="stable")  # where the drawn text is null
        self.instruction_embeds = {
            name: torch.tensor(states.instruction_embeds) for name, states in features.encoders.items()
        }
        self._null = {
            name: self._stored(states.null_embeds, next(iter(features.embeds.values()))[name])
            for name, states in features.encoders.items()
        }

    def choose_texts(self, rows: np.ndarray, image_numbers: np.ndarray) -> np.ndarray:
        """(B,) int8: the text that each sample is shown with, or DROPPED."""
        texts = np.zeros(len(rows), np.int8)
        for index, number in enumerate(image_numbers.tolist()):
            if self.drop_prob and sample_rng(self.seed, number, "prompt_drop").random() < self.drop_prob:
                texts[index] = DROPPED
            elif self.rows.texts is not None:
                drawn = np.searchsorted(self._thresholds, sample_rng(self.seed, number, "caption").random(), "right")
                candidates = [min(int(drawn), len(self._thresholds) - 1), *self._preferred]
                has = int(self.rows.texts[rows[index]])
                texts[index] = next(text for text in candidates if has >> text & 1)
        return texts

    def reads(self, rows: np.ndarray, texts: np.ndarray, sample_bytes: float) -> list[Read]:
        """Groups rows (n,) with their texts (n,) into requests to the table, in the order in which they are first needed.

        Neighbors go together, as long as a request stays below `TAKE_BYTES`.
        """
        most = max(1, int(TAKE_BYTES // max(1.0, sample_bytes)))
        fragments, places = self.features.locate(rows)
        order = np.lexsort((places, texts, fragments))
        groups = np.flatnonzero(np.diff(fragments[order], prepend=-1) | np.diff(texts[order], prepend=-2))
        requests = []
        for start, end in zip(groups, [*groups[1:], len(order)]):
            for first in range(start, end, most):
                members = order[first : min(first + most, end)]
                requests.append(Read(int(fragments[members[0]]), places[members], int(texts[members[0]]), members))
        return sorted(requests, key=lambda read: int(read.members.min()))

    def fetch(self, read: Read) -> dict[str, Values]:
        """Column -> values, in the order of the request's rows."""
        names = [self.features.latents.column]
        if read.text != DROPPED:
            names += [form.column for form in self._formats(read.text).values()]
        rows, inverse = np.unique(read.rows, return_inverse=True)
        table = self.features.take(read.fragment, rows, names)
        if len(rows) < len(read.rows):  # a row twice: a bucket with fewer rows than a batch
            table = table.take(inverse)
        return {name: Values(table.column(name)) for name in names}

    def assemble(
        self,
        step: int,
        microbatch: int,
        bucket: str,
        rows: np.ndarray,
        image_numbers: np.ndarray,
        texts: np.ndarray,
        sources: Sequence[tuple[Mapping[str, Values], int]],
    ) -> Batch:
        """Copies the samples' values, (columns, index) each, into padded tensors."""
        latents = self._latents(bucket, image_numbers, sources)
        embeds, masks = {}, {}
        for name in self.features.encoders:
            embeds[name], masks[name] = self._prompts(name, texts, sources)
        timestep = noise = None
        if self.objective is not None:
            timestep, noise = draw(self.objective, self.seed, image_numbers.tolist(), latents.shape[1:])
        return Batch(
            step,
            microbatch,
            bucket,
            latents,
            embeds,
            masks,
            self.instruction_embeds,
            image_numbers,
            rows,
            texts,
            timestep,
            noise,
        )

    def read_now(self, bucket: str, rows: np.ndarray, image_numbers: np.ndarray) -> Batch:
        """Reads a batch of any rows of one bucket, synchronously: for validation."""
        texts = self.choose_texts(rows, image_numbers)
        sources: list[tuple[Mapping[str, Values], int]] = [({}, 0)] * len(rows)
        for read in self.reads(rows, texts, TAKE_BYTES / 8):
            values = self.fetch(read)
            for index, member in enumerate(read.members.tolist()):
                sources[member] = (values, index)
        return self.assemble(0, 0, bucket, rows, image_numbers, texts, sources)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _latents(
        self, bucket: str, image_numbers: np.ndarray, sources: Sequence[tuple[Mapping[str, Values], int]]
    ) -> Tensor:
        """(B, C, H, W) float32."""
        form = self.features.latents
        shape, size = form.shape(bucket), form.size(bucket)
        stored = self.buffers.empty((len(sources), *shape), DTYPES[form.codec])  # B C H W, or B 2C H W
        target = _bytes_of(stored)
        for row, (values, index) in zip(target, sources):
            value = values[form.column][index]
            if value.size != size:
                raise RuntimeError(
                    f"column {form.column!r}: expected {size} bytes for bucket {bucket} ({form.codec}, "
                    f"{'x'.join(map(str, shape))}), received {value.size}; latents and bucket do not belong together"
                )
            row[:] = value
        if not form.moments:
            return stored if stored.dtype == torch.float32 else self._float(stored)
        mean, deviation = stored.float().chunk(2, dim=1)  # B C H W
        eps = np.empty(mean.shape, np.float32)
        for row, number in zip(eps, image_numbers.tolist()):
            sample_rng(self.seed, number, "latents").standard_normal(dtype=np.float32, out=row)
        return self._float(torch.from_numpy(eps).mul_(deviation).add_(mean))

    def _prompts(
        self, name: str, texts: np.ndarray, sources: Sequence[tuple[Mapping[str, Values], int]]
    ) -> tuple[Tensor, Tensor]:
        """(B, L, E) and its mask (B, L)."""
        states = []  # (L, bytes of a token in the tensor) each, a view
        for text, (values, index) in zip(texts.tolist(), sources):
            if text == DROPPED:
                states.append(self._null[name])
            else:
                states.append(self._tokens(values, index, self._formats(text)[name]))
        lengths = np.array([len(tokens) for tokens in states])
        longest = -(-int(lengths.max()) // self.pad_multiple) * self.pad_multiple
        form = self._formats(0)[name]
        embeds = self.buffers.empty((len(states), longest, form.width), _dtype(form))
        for row, tokens in zip(_bytes_of(embeds), states):
            row[: tokens.size] = tokens.reshape(-1)
            row[tokens.size :] = 0
        mask = self.buffers.empty((len(states), longest), torch.bool)
        np.less(np.arange(longest), lengths[:, None], out=mask.numpy())
        return embeds, mask

    def _tokens(self, values: Mapping[str, Values], index: int, form: EmbedsFormat) -> np.ndarray:
        """Returns a prompt's states (L, bytes) uint8, in the tensor's memory layout."""
        stored = values[form.column][index]
        if form.codec in DTYPES:
            return stored.reshape(-1, form.bytes_per_token)
        return self._stored(decode_bytes(stored, form.codec, form.width), form)

    def _stored(self, states: np.ndarray, form: EmbedsFormat) -> np.ndarray:
        """Converts float32 (L, E) to (L, bytes) uint8 in the tensor's dtype."""
        return _bytes_of(torch.from_numpy(states.copy()).to(_dtype(form)))

    def _formats(self, text: int) -> dict[str, EmbedsFormat]:
        return self.features.embeds[self.features.texts[text]]

    def _float(self, values: Tensor) -> Tensor:
        return self.buffers.empty(values.shape, torch.float32).copy_(values)


def _aligned(size: int) -> np.ndarray:
    """(size,) uint8 that begins where torch's own tensors do: matrix products of the same numbers may differ in their last
    bits between memory that is aligned and memory that is not, and a resumed run is to be the unbroken one to the bit."""
    whole = np.empty(size + ALIGNMENT, np.uint8)
    return whole[-whole.ctypes.data % ALIGNMENT :][:size]


def _dtype(form: EmbedsFormat) -> torch.dtype:
    """Dtype of the tensor that a column becomes; fp8 with its scales has none of its own."""
    return DTYPES.get(form.codec, torch.bfloat16)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor (n, ...) -> the memory of it, (n, bytes) uint8."""
    size = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize
    return tensor.view(-1).view(torch.uint8).numpy().reshape(len(tensor), size)
