"""States of texts, pooled, for every way to use an encoder: all layers in one pass, by hooks on the encoder's blocks.

Letters: N texts, L tokens of one, E the encoder's width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lidit.frozen.batching import plan_batches
from lidit.frozen.early_exit import blocks_of
from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.frozen.truncation import beginnings

MOST_WORDS = 4096  # the control's vocabulary: the most frequent tokens
EPS = 1e-6


@dataclass(frozen=True)
class Way:
    """One way to use an encoder: instruction, layers, norm."""

    encoder: str
    instruction: bool
    """Put the instruction before the text."""
    layers: tuple[int, ...]
    """Hidden states, from 1; several: their mean. None at all: the control, the tokens' identities."""
    norm: bool
    """Scale each token to mean square 1 first."""

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.encoder}: words alone"
        layers = (
            f"layer {self.layers[0]}" if len(self.layers) == 1 else f"mean of layers {', '.join(map(str, self.layers))}"
        )
        parts = [
            f"{self.encoder}: {layers}",
            *(["instruction"] if self.instruction else []),
            *(["norm"] if self.norm else []),
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Pooled:
    """States of all texts, used in one way: pooling -> (N, E) float32 on the CPU."""

    way: Way
    vectors: dict[str, Tensor]


def ways_of(
    config: EncoderConfig,
    layers: Sequence[int] | Literal["all", "own"],
    averages: Sequence[Sequence[int]],
    both_instructions: bool,
    both_norms: bool,
    device: str | None,
) -> list[Way]:
    """The ways to use an encoder that are asked for. Raises ValueError where a layer does not exist."""
    encoder = PromptEncoder(config, device)
    if layers == "own":
        sets = [(encoder.layer,)]
    elif layers == "all":
        sets = [(layer,) for layer in range(1, encoder.num_blocks + 1)]
    else:
        sets = [(_layer(config, layer),) for layer in layers]
    norms = (False, True) if both_norms else (False,)
    means = [(tuple(_layer(config, layer) for layer in average), True) for average in averages]
    chosen = [*((one, norm) for one in sets for norm in norms), *means]
    own = encoder.is_decoder and bool(config.instruction)
    instructions = (True, False) if own and both_instructions else (own,)
    return [Way(config.name, given, one, norm) for given in instructions for one, norm in dict.fromkeys(chosen)]


def pooled_states(
    config: EncoderConfig,
    ways: Sequence[Way],
    texts: Sequence[str],
    spans: Sequence[tuple[int, int]] | None,
    batch_tokens: int,
    device: str | None,
) -> Iterator[Pooled]:
    """Every way's states of the texts, by pooling: `text` (mean over tokens), `last token`, and `part` where spans are given.

    The control comes first: how often each token stands in the text, is its last token, or stands in the part.

    Raises:
        ValueError: a text has no tokens, or a span holds none; or states are not finite.
    """
    tokenised = _Tokens(PromptEncoder(config, device), texts, spans)
    yield Pooled(Way(config.name, False, (), False), tokenised.words())
    for given in dict.fromkeys(way.instruction for way in ways):
        asked = [way for way in ways if way.instruction == given]
        used = dataclasses.replace(config, instruction=config.instruction if given else "")
        vectors: dict[Way, dict[str, Tensor]] = {way: {} for way in asked}
        for rows, states, mask in _all_layers(
            used, tokenised.ids, sorted({n for w in asked for n in w.layers}), batch_tokens, device
        ):
            for way in asked:
                for pooling, pooled in tokenised.pool(rows, _combined(states, way), mask).items():
                    store = vectors[way].setdefault(pooling, torch.zeros(len(texts), pooled.shape[1]))
                    store[rows] = pooled
        for way in asked:
            if not all(bool(torch.isfinite(values).all()) for values in vectors[way].values()):
                raise ValueError(f"encoder {way}: states are not finite; is its dtype too narrow?")
            yield Pooled(way, vectors[way])


class _Tokens:
    """The texts' tokens, and which of them belong to the part that is asked about."""

    def __init__(self, encoder: PromptEncoder, texts: Sequence[str], spans: Sequence[tuple[int, int]] | None):
        self.ids, _ = encoder.tokenize(list(texts))
        if empty := [text for text, ids in zip(texts, self.ids) if not ids]:
            raise ValueError(f"encoder {encoder.config.name}: the text {empty[0]!r} has no tokens")
        self.parts: np.ndarray | None = None
        if spans is not None:
            self.parts = self._parts(encoder, list(texts), spans)
        self.end = 0 if encoder.is_decoder else 1  # an encoder-only model's end token is not of the text

    def pool(self, rows: np.ndarray, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """States (B, L, E) and mask (B, L) of these texts -> pooling -> (B, E) on the CPU."""
        last = mask.sum(dim=1) - 1 - self.end
        found = {
            "text": _mean(states, mask),
            "last token": states[torch.arange(len(states), device=states.device), last.clamp(min=0)],
        }
        if self.parts is not None:
            part = torch.from_numpy(self.parts[rows][:, : mask.shape[1]]).to(mask.device)
            found["part"] = _mean(states, part)
        return {name: pooled.float().cpu() for name, pooled in found.items()}

    def words(self) -> dict[str, Tensor]:
        """The control's vectors, of the most frequent tokens."""
        values, counts = np.unique(np.concatenate([np.array(ids) for ids in self.ids]), return_counts=True)
        kept = np.sort(values[np.argsort(-counts, kind="stable")[:MOST_WORDS]])
        found = {name: torch.zeros(len(self.ids), len(kept)) for name in ("text", "last token")}
        if self.parts is not None:
            found["part"] = torch.zeros(len(self.ids), len(kept))
        for row, ids in enumerate(self.ids):
            place = np.searchsorted(kept, ids).clip(max=len(kept) - 1)
            known = kept[place] == np.array(ids)
            chosen = {"text": known, "last token": known & (np.arange(len(ids)) == len(ids) - 1 - self.end)}
            if self.parts is not None:
                chosen["part"] = known & self.parts[row, : len(ids)]
            for name, use in chosen.items():
                found[name][row].index_add_(0, torch.from_numpy(place[use]), torch.ones(int(use.sum())))
        return found

    def _parts(self, encoder: PromptEncoder, texts: list[str], spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """Marks the tokens of the part that is asked about, (N, longest L) bool."""
        texts = beginnings(encoder.tokenizer, texts, encoder.max_prompt_tokens)
        given: Any = encoder.tokenizer(texts, add_special_tokens=not encoder.is_decoder, return_offsets_mapping=True)
        parts = np.zeros((len(texts), max(map(len, self.ids))), bool)
        for row, (offsets, (first, last)) in enumerate(zip(given["offset_mapping"], spans)):
            for place, (begin, end) in enumerate(offsets[: len(self.ids[row])]):
                parts[row, place] = begin < last and end > first and end > begin
            if not parts[row].any():
                raise ValueError(
                    f"encoder {encoder.config.name}: no token of {texts[row]!r} is in its part {[first, last]}"
                )
        return parts


def _all_layers(
    config: EncoderConfig, ids: list[list[int]], layers: Sequence[int], batch_tokens: int, device: str | None
) -> Iterator[tuple[np.ndarray, dict[int, Tensor], Tensor]]:
    """Batch by batch: (which texts, layer -> states (B, L, E), mask (B, L))."""
    encoder = PromptEncoder(dataclasses.replace(config, layer_index=layers[-1]), device)
    seen: dict[int, Tensor] = {}
    blocks = blocks_of(encoder.model, encoder.layer if encoder.is_decoder else encoder.num_blocks)  # a decoder is cut
    for layer in layers[:-1]:
        blocks[layer - 1].register_forward_hook(functools.partial(_keep, seen, layer))
    for rows in plan_batches(np.array([len(tokens) for tokens in ids]), batch_tokens):
        states, mask = encoder.forward([ids[row] for row in rows])
        yield np.asarray(rows), {**seen, layers[-1]: states}, mask


def _keep(seen: dict[int, Tensor], layer: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
    seen[layer] = output[0] if isinstance(output, tuple) else output


def _combined(states: dict[int, Tensor], way: Way) -> Tensor:
    """States of the way's layers, their mean where there are several, (B, L, E) float32."""
    parts = [states[layer].float() for layer in way.layers]
    if way.norm:
        parts = [part * (part.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() for part in parts]
    return torch.stack(parts).mean(dim=0)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Averages the states over the mask's tokens: (B, L, E), (B, L) -> (B, E)."""
    weights = mask.to(states.dtype)
    return torch.einsum("ble,bl->be", torch.where(mask[..., None], states, 0), weights) / weights.sum(
        dim=1, keepdim=True
    )


def _layer(config: EncoderConfig, layer: int) -> int:
    return PromptEncoder(dataclasses.replace(config, layer_index=layer), "cpu").layer
