"""Train the demo's encoder-only text model: the baseline of the paper's tables, T5's encoder at the demo's size.

    python -m demo.models.train_t5

It learns to fill in masked tokens of the texts that the demo's LLMs are trained on. Run it again after any kind of end: it
goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from demo.models.language_model import CONTEXT
from demo.models.optimization import build_optimizers
from demo.models.training import FitConfig, finished, fit, publish
from demo.world.language import HELD_OUT_SEEDS, TRAIN_SEEDS, draw_scene, plain_text

FOLDER = Path(__file__).resolve().parent.parent / "encoders"
MASK, EOS, PAD = "<mask>", "</s>", "<pad>"
MASKED = 0.3  # share of tokens
TEXTS, LONGEST = 16, 160  # of a batch; tokens of a text
LEARNING_RATE, WARMUP_STEPS, SAVE_SECONDS = 6e-3, 30, 20.0  # seconds between checkpoints
CARD = """---
license: apache-2.0
language: en
---
# t5-base

T5's encoder ({parameters:,} parameters, 6 blocks of width 128) for the lidit demo's closed world: the encoder-only baseline
of `demo/ablations.py`. Trained by `python -m demo.models.train_t5` to fill in masked tokens ({masked:.0%} of them) of texts
about training scenes, the texts and the tokenizer's words being those of `llama-base`.

| | |
|---|---|
| steps | {steps:,} of {texts} texts |
| wall time | {seconds:.0f} s on one CPU thread |
| loss at the end | {loss:.3f} nats per masked token |
| masked tokens of held-out texts filled in right | {accuracy:.1%} |
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The words of `llama-base`, used as T5 does: no start, `</s>` at the end; and a mask."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "llama-base" / "tokenizer.json"))
    tokenizer.add_special_tokens([MASK])
    end = (EOS, tokenizer.token_to_id(EOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, mask_token=MASK, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(vocabulary: int, pad: int) -> T5EncoderModel:
    """Six blocks as wide as `llama-base`'s."""
    config = T5Config(
        vocab_size=vocabulary, d_model=128, d_kv=32, num_heads=4, d_ff=384, num_layers=6, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=pad, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def batch(
    tokenizer: PreTrainedTokenizerFast, seeds: range, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts of scenes -> tokens, tokens with masks, which ones are masked, which ones are real: (B, L) each."""
    texts = [plain_text(draw_scene(rng, seeds), rng) for _ in range(TEXTS)]
    made = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    tokens, real = made["input_ids"], made["attention_mask"].bool()
    drawn = torch.from_numpy(rng.random(tuple(tokens.shape)) < MASKED)
    masked = drawn & real & (tokens != tokenizer.eos_token_id)
    return tokens, tokens.masked_fill(masked, tokenizer.mask_token_id), masked, real


def predict(model: T5EncoderModel, given: Tensor, masked: Tensor, real: Tensor) -> Tensor:
    """Logits of the masked tokens, (T, V), by the tied embeddings."""
    states = model(input_ids=given, attention_mask=real.long()).last_hidden_state[masked]  # T D
    return states @ model.shared.weight.T * model.config.d_model**-0.5


def recipe_of(steps: int) -> dict[str, Any]:
    """Returns all that decides the weights."""
    return {"steps": steps, "texts": TEXTS, "masked": MASKED, "learning_rate": LEARNING_RATE}


def train(tokenizer: PreTrainedTokenizerFast, steps: int, work: Path) -> tuple[T5EncoderModel, dict[str, Any]]:
    """Returns the trained model, and what is to be said of its training."""
    torch.manual_seed(0)
    model, recipe = build_model(len(tokenizer), tokenizer.pad_token_id), recipe_of(steps)

    def loss_of(step: int) -> tuple[Tensor, Tensor]:
        tokens, given, masked, real = batch(tokenizer, TRAIN_SEEDS, np.random.default_rng([0, 8, step]))
        loss = F.cross_entropy(predict(model, given, masked, real), tokens[masked])
        return loss, loss

    fit_config = FitConfig(work / "t5-base.pt", recipe, [("t5-base", steps)], WARMUP_STEPS, SAVE_SECONDS)
    result = fit(fit_config, model, build_optimizers(model, LEARNING_RATE), loss_of)
    assert result is not None, "it is never stopped"
    return model, {**recipe, **result}


@torch.no_grad()
def accuracy(model: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, batches: int = 25) -> float:
    """Share of masked tokens of held-out texts that the model fills in right."""
    right, count = 0, 0
    for number in range(batches):
        tokens, given, masked, real = batch(tokenizer, HELD_OUT_SEEDS, np.random.default_rng([0, 9, number]))
        right += int((predict(model, given, masked, real).argmax(dim=-1) == tokens[masked]).sum())
        count += int(masked.sum())
    return right / count


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / "t5-base", help="folder to write (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".work/encoders"), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1200, help="of training (default %(default)s)")
    values = parser.parse_args(argv)
    if finished(values.out, recipe_of(values.steps), key=None):
        print(f"{values.out}: finished already, skipped")
        return
    torch.set_num_threads(1)
    disable_progress_bar()
    tokenizer = build_tokenizer()
    model, result = train(tokenizer, values.steps, values.work)
    model = model.bfloat16().float().eval()  # what will be read back

    def save(folder: Path) -> None:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    facts = {
        "accuracy": accuracy(model, tokenizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    record = publish(
        values.out, save, lambda folder, weights: {**result, **facts}, lambda record: CARD.format(**record)
    )
    print(f"{values.out}: {record['accuracy']:.1%} of held-out masked tokens right, loss {record['loss']:.3f}")


if __name__ == "__main__":
    main()
