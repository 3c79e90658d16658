"""Train the demo's prompt encoders: two tiny language models, each as a base and as an instruction-tuned variant.

    python -m demo.models.train_encoders                        # all four, about 40 minutes on one CPU thread
    python -m demo.models.train_encoders --encoders '[qwen-base]' --out /tmp/encoders

Run it again after any kind of end: finished encoders are skipped, the one in the middle goes on from its last
checkpoint, and the weights equal those of an unbroken run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from demo.models import training
from demo.models.card import model_card
from demo.models.exam import examine
from demo.models.language_model import CONTEXT, build_model
from demo.models.optimization import build_optimizers, weighted_loss
from demo.models.packing import CONTEXT_WEIGHT, packed_batch
from demo.models.training import FitConfig, finished, fit, publish
from demo.models.vocabulary import train_tokenizer, wrap

ENCODERS = ("llama-base", "llama-tuned", "qwen-base", "qwen-tuned")


@dataclass(frozen=True)
class TrainEncodersConfig:
    """Which encoders to train, how long, and where they go."""

    encoders: tuple[str, ...] = ENCODERS
    """Encoders to train, `<family>-<variant>`; a tuned one needs its base in `out` or before it in this list."""
    out: Path = Path("demo/encoders")
    """Folder of the finished encoders, one folder each."""
    work: Path = Path(".work/encoders")
    """Folder of the checkpoints."""
    base_steps: int = 1200
    """Optimizer steps of a base variant."""
    tuned_steps: int = 1500
    """Optimizer steps of a tuned variant, on top of its base."""
    rows: int = 6
    """Rows per step."""
    row_length: int = 320
    """Tokens per row; several whole texts share one."""
    learning_rate: float = 6e-3
    """Peak learning rate."""
    warmup_steps: int = 30
    """Steps of linear warm-up."""
    checkpoint_seconds: float = 20.0
    """Seconds between checkpoints."""
    stop_after_steps: int | None = None
    """End this run after so many steps, with a checkpoint: for slots of limited time."""
    context_weight: float = CONTEXT_WEIGHT
    """Loss weight of a dialogue's tokens outside the answers, for tuned variants: how much of the base's reading is kept."""
    tokenizer_texts: int = 4000
    """Training scenes whose texts a tokenizer learns from."""
    exam_captions: int = 400
    """Held-out captions for the perplexity."""
    exam_tasks: int = 200
    """Held-out tasks of each kind."""
    seed: int = 0
    """Decides initialization, data and their order."""
    threads: int = 1
    """Torch threads; the weights are equal between runs of the same number."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.encoders) - set(ENCODERS))
        if unknown:
            raise ValueError(f"Unknown encoders {unknown}; expected some of {list(ENCODERS)}.")
        if self.row_length > CONTEXT:
            raise ValueError(f"row_length must be at most the context of {CONTEXT} tokens, got {self.row_length}.")

    def recipe(self, variant: str) -> dict[str, Any]:
        """All that decides an encoder's weights. A checkpoint of another recipe is never continued."""
        kept = {"context_weight": self.context_weight}  # named where it is not what all encoders were made with before
        return {
            **(kept if variant == "tuned" and self.context_weight != CONTEXT_WEIGHT else {}),
            "steps": self.base_steps if variant == "base" else self.tuned_steps,
            "rows": self.rows,
            "row_length": self.row_length,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "schedule": "trapezoid",
            "tokenizer_texts": self.tokenizer_texts,
            "seed": self.seed,
            "threads": self.threads,
        }


def main(config: TrainEncodersConfig) -> None:
    """Train, save and examine every encoder of the config that is not finished yet."""
    torch.set_num_threads(config.threads)
    for name in config.encoders:
        family, variant = name.split("-")
        if finished(config.out / name, config.recipe(variant)):
            print(f"{name}: finished already, skipped")
            continue
        tokenizer, model, origin = start(config, family, variant)
        result = train(config, name, tokenizer, model, origin)
        if result is None:
            print(f"{name}: stopped after {config.stop_after_steps} steps; run again to go on")
            return
        save_encoder(config, name, tokenizer, model, result)


def start(
    config: TrainEncodersConfig, family: str, variant: str
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, str]:
    """Tokenizer, initial model and the digest of what it starts from: nothing for a base, the base for a tuned one."""
    if variant == "base":
        tokenizer = train_tokenizer(family, config.tokenizer_texts, config.seed)
        torch.manual_seed(config.seed)
        return tokenizer, build_model(family, tokenizer), "scratch"
    base = config.out / f"{family}-base"
    if not (base / "training.json").exists():
        raise ValueError(f"{family}-tuned continues from {base}, which is not there: train {family}-base first.")
    tokenizer = wrap(Tokenizer.from_file(str(base / "tokenizer.json")), family, chat=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return tokenizer, model, json.loads((base / "training.json").read_text())["sha256"]


def train(
    config: TrainEncodersConfig, name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, origin: str
) -> dict[str, float] | None:
    """Trains in place, from the checkpoint if there is one; returns wall seconds and last loss, or None if stopped."""
    family, variant = name.split("-")
    recipe = config.recipe(variant)

    def loss_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = packed_batch(
            tokenizer, family, variant, config.rows, config.row_length, config.seed, step, config.context_weight
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits  # (B, L, V)
        loss = weighted_loss(logits, batch)
        return loss, loss

    fit_config = FitConfig(
        config.work / f"{name}.pt", recipe | {"origin": origin}, [(name, recipe["steps"])], config.warmup_steps,
        config.checkpoint_seconds, config.stop_after_steps,
    )  # fmt: skip
    return fit(fit_config, model, build_optimizers(model, config.learning_rate), loss_of)


def save_encoder(
    config: TrainEncodersConfig,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    result: dict[str, float],
) -> None:
    """Saves in bfloat16, examines what was saved, writes record and card, and moves the folder into place."""
    family, variant = name.split("-")

    def save(folder: Path) -> None:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def describe(folder: Path, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "family": family,
            "variant": variant,
            "architecture": type(model).__name__,
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
            "heads": model.config.num_attention_heads,
            "kv_heads": model.config.num_key_value_heads,
            "vocabulary": len(tokenizer),
            "context": CONTEXT,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **weights,
            "context_weight": config.context_weight,
            **result,
            "config": config.recipe(variant),
            "exam": {"captions": config.exam_captions, "tasks_per_kind": config.exam_tasks},
            "figures": examine(folder, variant, config.exam_captions, config.exam_tasks),
        }

    base = None
    if variant == "tuned":
        base = json.loads((config.out / f"{family}-base" / "training.json").read_text())
    figures = publish(config.out / name, save, describe, lambda record: model_card(record, base))["figures"]
    print(
        f"{name}: perplexity {figures['perplexity']:.3f}, exact answers {figures['mean_accuracy']:.1%} "
        f"{figures['accuracy']}"
    )


def parse(arguments: list[str] | None = None) -> TrainEncodersConfig:
    """Returns the config of a command line."""
    return training.parse(TrainEncodersConfig, "demo.models.train_encoders", __doc__, arguments)


if __name__ == "__main__":
    set_verbosity_error()
    disable_progress_bar()  # transformers' own bars would tear ours
    main(parse())
