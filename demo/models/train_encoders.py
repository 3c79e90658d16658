"""Train the demo's prompt encoders: two tiny language models, each as a base and as an instruction-tuned variant.

    python -m demo.models.train_encoders                        # all four, about 40 minutes on one CPU thread
    python -m demo.models.train_encoders --encoders '[qwen-base]' --out /tmp/encoders

Run it again after any kind of end: finished encoders are skipped, the one in the middle goes on from its last
checkpoint, and the weights equal those of an unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from demo.models.card import model_card
from demo.models.exam import examine
from demo.models.language_model import CONTEXT, build_model
from demo.models.optimization import build_optimizers, schedule, weighted_loss
from demo.models.packing import CONTEXT_WEIGHT, packed_batch
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
        if finished(config, name):
            print(f"{name}: finished already, skipped")
            continue
        tokenizer, model, origin = start(config, family, variant)
        result = train(config, name, tokenizer, model, origin)
        if result is None:
            print(f"{name}: stopped after {config.stop_after_steps} steps; run again to go on")
            return
        publish(config, name, tokenizer, model, result)


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
    """Train `model` in place, from its checkpoint if there is one; wall seconds and last loss, or None if stopped."""
    family, variant = name.split("-")
    recipe = config.recipe(variant)
    path = config.work / f"{name}.pt"
    model.train()
    optimizers = build_optimizers(model, config.learning_rate)
    first, seconds, recent = restore(path, recipe | {"origin": origin}, model, optimizers)
    steps, started, saved = recipe["steps"], time.monotonic(), time.monotonic()

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "loss {task.fields[loss]:.3f}")
    timing = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, *timing) as progress:
        bar = progress.add_task(name, total=steps, completed=first, loss=recent[-1] if recent else math.nan)
        for step in range(first, steps):
            # data: a function of seed and step alone
            batch = packed_batch(
                tokenizer, family, variant, config.rows, config.row_length, config.seed, step, config.context_weight
            )

            # step
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = config.learning_rate * schedule(step, config.warmup_steps, steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits  # (B, L, V)
            loss = weighted_loss(logits, batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"{name}: loss or gradient not finite at step {step}; lower the learning rate."
                )
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()

            # bookkeeping
            recent = [*recent[-49:], loss.item()]
            progress.update(bar, advance=1, loss=sum(recent) / len(recent))
            done, now = step + 1, time.monotonic()
            stopping = config.stop_after_steps is not None and done - first >= config.stop_after_steps and done < steps
            if stopping or done == steps or now - saved >= config.checkpoint_seconds:
                elapsed = seconds + now - started
                save_checkpoint(path, recipe | {"origin": origin}, model, optimizers, done, elapsed, recent)
                progress.console.print(
                    f"{name}: step {done}/{steps}, loss {sum(recent) / len(recent):.4f}, {elapsed:.0f} s"
                )
                saved = now
            if stopping:
                return None
    return {"seconds": seconds + time.monotonic() - started, "loss": sum(recent) / len(recent)}


def save_checkpoint(
    path: Path,
    recipe: dict[str, Any],
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
    recent: list[float],
) -> None:
    """Replace the checkpoint in one move: a kill while writing leaves the former one."""
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"model": model.state_dict(), "optimizers": optimizer_states, "step": step, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state | {"recent": recent, "recipe": json.dumps(recipe)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def restore(
    path: Path, recipe: dict[str, Any], model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float, list[float]]:
    """Load the checkpoint if there is one; the step to go on from, wall seconds so far, and the last losses."""
    if not path.exists():
        return 0, 0.0, []
    state = torch.load(path, weights_only=True)
    if json.loads(state["recipe"]) != recipe:
        raise ValueError(
            f"{path} belongs to another recipe: expected {recipe}, found {state['recipe']}. "
            "Delete it to begin anew, or name another --work folder."
        )
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return state["step"], state["seconds"], state["recent"]


def publish(
    config: TrainEncodersConfig,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    result: dict[str, float],
) -> None:
    """Save in bfloat16, examine what was saved, write record and card, and move the folder into place."""
    family, variant = name.split("-")
    folder, partial = config.out / name, config.out / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)

    began = time.monotonic()
    (partial / "model.safetensors").chmod(0o644)
    weights = (partial / "model.safetensors").read_bytes()
    record = {
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
        "weight_bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "context_weight": config.context_weight,
        **result,
        "config": config.recipe(variant),
        "exam": {"captions": config.exam_captions, "tasks_per_kind": config.exam_tasks},
        "figures": examine(partial, variant, config.exam_captions, config.exam_tasks),
    }
    base = None
    if variant == "tuned":
        base = json.loads((config.out / f"{family}-base" / "training.json").read_text())
    (partial / "README.md").write_text(model_card(record, base))
    # Last, because it is what says that the folder is complete.
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, folder)
    figures = record["figures"]
    print(
        f"{name}: perplexity {figures['perplexity']:.3f}, exact answers {figures['mean_accuracy']:.1%} "
        f"{figures['accuracy']}, examined in {time.monotonic() - began:.0f} s"
    )


def finished(config: TrainEncodersConfig, name: str) -> bool:
    """Whether the encoder stands complete in `out`; refuses one that was made by another recipe."""
    path = config.out / name / "training.json"
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text())["config"], config.recipe(name.split("-")[1])
    if found != wanted:
        raise ValueError(
            f"{path.parent} was made by another recipe: expected {wanted}, found {found}. "
            "Delete the folder to train it anew, or name another --out folder."
        )
    return True


def parse(arguments: list[str] | None = None) -> TrainEncodersConfig:
    """The config of a command line (or of a YAML file given as --config, overridden by the command line)."""
    parser = ArgumentParser(prog="python -m demo.models.train_encoders", description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainEncodersConfig)
    values = parser.parse_args(arguments).as_dict()
    values.pop("config")
    return TrainEncodersConfig(**values)


if __name__ == "__main__":
    set_verbosity_error()
    disable_progress_bar()  # transformers' own bars would tear ours
    main(parse())
