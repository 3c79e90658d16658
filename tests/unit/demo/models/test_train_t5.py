"""The encoder-only baseline: how it is trained, and the committed one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.models import train_t5
from demo.world.language import TRAIN_SEEDS
from lidit.frozen.text import EncoderConfig, PromptEncoder

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[4] / "demo" / "encoders" / "t5-base"


def test_a_batch_hides_real_words_alone() -> None:
    tokenizer = train_t5.build_tokenizer()
    tokens, given, masked, real = train_t5.batch(tokenizer, TRAIN_SEEDS, np.random.default_rng(0))
    assert torch.equal(given == tokenizer.mask_token_id, masked) and torch.equal(given[~masked], tokens[~masked])
    assert not (masked & ~real).any() and not (masked & (tokens == tokenizer.eos_token_id)).any()
    assert 0.25 < masked.sum() / real.sum() < 0.35
    again = train_t5.batch(tokenizer, TRAIN_SEEDS, np.random.default_rng(0))
    assert all(torch.equal(one, other) for one, other in zip(again, (tokens, given, masked, real)))


def test_training_that_was_stopped_gives_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    tokenizer = train_t5.build_tokenizer()
    whole, _ = train_t5.train(tokenizer, 3, tmp_path / "whole")
    honest, calls = train_t5.batch, []

    def stops(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(train_t5, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(train_t5, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        train_t5.train(tokenizer, 3, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "t5-base.pt").exists()
    resumed, record = train_t5.train(tokenizer, 3, tmp_path / "stopped")
    assert len(calls) == 4 and record["steps"] == 3
    assert all(torch.equal(one, other) for one, other in zip(resumed.parameters(), whole.parameters()))


def test_the_committed_one_fills_in_what_its_card_says() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    assert train_t5.CARD.format(**record) == (FOLDER / "README.md").read_text()
    model = train_t5.T5EncoderModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    found = train_t5.accuracy(model, train_t5.build_tokenizer(), batches=25)
    assert found == pytest.approx(record["accuracy"], abs=0.005)
    assert (FOLDER / "model.safetensors").stat().st_size < 3_000_000


def test_it_encodes_prompts_as_an_encoder_does() -> None:
    """No start token, an end token, no instruction; the first word's states depend on the last one."""
    encoder = PromptEncoder(EncoderConfig("t5", str(FOLDER), instruction="", dtype="fp32"), "cpu")
    ids, _ = encoder.tokenize(["a red circle", "a red cross"])
    assert not encoder.is_decoder and all(tokens[-1] == encoder.tokenizer.eos_token_id for tokens in ids)
    embeds, mask = encoder(["a red circle", "a red cross"])
    assert embeds.shape[-1] == 128 and mask.sum() == sum(map(len, ids)) and torch.isfinite(embeds).all()
    assert not torch.allclose(embeds[0, 0], embeds[1, 0], atol=1e-3)
    assert len(encoder.instruction_embeds) == 0
