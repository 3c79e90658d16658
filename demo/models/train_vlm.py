"""Train the demo's vision-language model: a tiny LLaVA that describes rendered scenes.

    python -m demo.models.train_vlm                       # about an hour on one CPU thread
    python -m demo.models.train_vlm --out /tmp/vlm --see_steps 20 --say_steps 20

First the vision tower alone learns to see (what each patch of an image shows, from the scene's truth), then the whole
model learns to say it. Run it again after any kind of end: it goes on from its last checkpoint, and the weights equal
those of an unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlavaProcessor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from demo.models.optimization import schedule
from demo.models.train_encoders import restore, save_checkpoint
from demo.models.vlm_card import vlm_card
from demo.models.vlm_exam import examine
from demo.models.vlm_examples import vlm_batch
from demo.models.vlm_model import build_processor, build_vlm
from demo.models.vlm_optimization import PATCH_WEIGHT, VlmStudent, build_vlm_optimizers


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights. A checkpoint of another recipe is never continued."""

    width: int = 128
    """Width of the tower and of the language model."""
    vision_blocks: int = 4
    """Blocks of the vision tower."""
    text_blocks: int = 3
    """Blocks of the language model."""
    see_steps: int = 1500
    """Steps in which the vision tower learns to see."""
    say_steps: int = 3500
    """Steps, after those, in which the whole model learns to say it."""
    batch: int = 32
    """Images per step."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    tokenizer_texts: int = 2000
    """Training scenes whose texts the tokenizer learns from."""
    seed: int = 0
    """Decides initialization, data and their order."""
    threads: int = 1
    """Torch threads; the weights are equal between runs of the same number."""

    @property
    def steps(self) -> int:
        return self.see_steps + self.say_steps


@dataclass(frozen=True)
class TrainVlmConfig:
    """The recipe, where the model goes, and how it is examined."""

    recipe: Recipe = Recipe()
    """All that decides the weights."""
    out: Path = Path("demo/vlm")
    """Folder of the finished model."""
    work: Path = Path(".work/vlm")
    """Folder of the checkpoint."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    stop_after_steps: int | None = None
    """End this run after so many steps, with a checkpoint: for slots of limited time."""
    exam_scenes: int = 200
    """Held-out scenes of the exam."""


def main(config: TrainVlmConfig) -> None:
    """Train, save and examine the model, unless it is finished."""
    recipe = config.recipe
    if finished(config):
        print(f"{config.out}: finished already")
        return
    torch.set_num_threads(recipe.threads)
    processor = build_processor(recipe.tokenizer_texts, recipe.seed)
    torch.manual_seed(recipe.seed)
    student = VlmStudent(build_vlm(processor, recipe.width, recipe.vision_blocks, recipe.text_blocks))
    result = train(config, processor, student)
    if result is None:
        print(f"stopped after {config.stop_after_steps} steps; run again to go on")
        return
    publish(config, processor, student, result)


def train(config: TrainVlmConfig, processor: LlavaProcessor, student: VlmStudent) -> dict[str, float] | None:
    """Train in place, from the checkpoint if there is one; wall seconds and last loss, or None if stopped."""
    recipe, path = config.recipe, config.work / "vlm.pt"
    student.train()
    optimizers = build_vlm_optimizers(student, recipe.learning_rate)
    first, seconds, recent = restore(path, asdict(recipe), student, optimizers)
    started = saved = time.monotonic()

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "loss {task.fields[loss]:.3f}")
    timing = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, *timing) as progress:
        bar = progress.add_task("vlm", total=recipe.steps, completed=first, loss=recent[-1] if recent else math.nan)
        for step in range(first, recipe.steps):
            # data: a function of seed and step alone
            batch = vlm_batch(processor, recipe.batch, recipe.seed, step)

            # step
            speak = step >= recipe.see_steps
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate * schedule(step, recipe.warmup_steps, recipe.steps)
            seeing, saying = student(batch, speak)
            loss = seeing if saying is None else saying + PATCH_WEIGHT * seeing
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(f"loss or gradient not finite at step {step}; lower the learning rate.")
            for optimizer in optimizers:
                optimizer.step()
            student.zero_grad()

            # bookkeeping: the loss of what is being learned
            recent = [*recent[-49:], (seeing if saying is None else saying).item()]
            progress.update(bar, advance=1, loss=sum(recent) / len(recent), description="say" if speak else "see")
            done, now = step + 1, time.monotonic()
            stopping = config.stop_after_steps is not None and done - first >= config.stop_after_steps
            if stopping or done in (recipe.see_steps, recipe.steps) or now - saved >= config.checkpoint_seconds:
                elapsed = seconds + now - started
                save_checkpoint(path, asdict(recipe), student, optimizers, done, elapsed, recent)
                progress.console.print(
                    f"{'say' if speak else 'see'}: step {done}/{recipe.steps}, loss {sum(recent) / len(recent):.4f}, "
                    f"{elapsed:.0f} s"
                )
                saved = now
            if stopping and done < recipe.steps:
                return None
    return {"seconds": seconds + time.monotonic() - started, "loss": sum(recent) / len(recent)}


def publish(config: TrainVlmConfig, processor: LlavaProcessor, student: VlmStudent, result: dict[str, float]) -> None:
    """Save in bfloat16, examine what was saved, write record and card, and move the folder into place."""
    folder, partial, model = config.out, config.out.with_name(f"{config.out.name}.partial"), student.model
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.bfloat16().save_pretrained(partial)
    processor.save_pretrained(partial)

    began = time.monotonic()
    (partial / "model.safetensors").chmod(0o644)
    weights = (partial / "model.safetensors").read_bytes()
    record: dict[str, Any] = {
        "name": folder.name,
        "architecture": type(model).__name__,
        "vocabulary": len(processor.tokenizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
        **result,
        "recipe": asdict(config.recipe),
        "exam_scenes": config.exam_scenes,
        "figures": examine(partial, config.exam_scenes),
    }
    (partial / "README.md").write_text(vlm_card(record))
    # Last, because it is what says that the folder is complete.
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, folder)
    figures = record["figures"]
    shares = ", ".join(f"{name} {figures[name]:.1%}" for name in ("objects", "relations", "right", "declined"))
    print(f"{folder}: {shares}, examined in {time.monotonic() - began:.0f} s")


def finished(config: TrainVlmConfig) -> bool:
    """Whether the model stands complete in `out`; refuses one that was made by another recipe."""
    path = config.out / "training.json"
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text())["recipe"], asdict(config.recipe)
    if found != wanted:
        raise ValueError(
            f"{path.parent} was made by another recipe: expected {wanted}, found {found}. "
            "Delete the folder to train it anew, or name another --out folder."
        )
    return True


def parse(arguments: list[str] | None = None) -> TrainVlmConfig:
    """The config of a command line (or of a YAML file given as --config, overridden by the command line)."""
    parser = ArgumentParser(prog="python -m demo.models.train_vlm", description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainVlmConfig)
    values: dict[str, Any] = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config")
    return TrainVlmConfig(**values)


if __name__ == "__main__":
    set_verbosity_error()
    disable_progress_bar()  # transformers' own bars would tear ours
    main(parse())
