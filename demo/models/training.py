"""The loop of the demo's trainers: it goes on from its last checkpoint, and a finished folder appears in one move.

Data, noise and learning rate are functions of seed and step alone, so that the weights equal those of an unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class FitConfig:
    """How long to train, and where the checkpoint is.

    Args:
        recipe: all that decides the weights. A checkpoint of another recipe is never continued.
        phases: (name, step at which it is over), in order; each ends with a checkpoint.
        stop_after_steps: end this run after so many steps, with a checkpoint.
    """

    checkpoint: Path
    recipe: dict[str, Any]
    phases: Sequence[tuple[str, int]]
    warmup_steps: int
    checkpoint_seconds: float
    stop_after_steps: int | None = None

    def phase(self, step: int) -> str:
        """The name of the phase that a step belongs to."""
        return next(name for name, end in self.phases if step < end)


def fit(
    config: FitConfig,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[int], tuple[Tensor, Tensor]],
    before_update: Callable[[], None] = lambda: None,
) -> dict[str, float] | None:
    """Trains the model in place; returns wall seconds and the mean of the last losses, or None if it was stopped.

    Args:
        optimizers: with the peak learning rate of each group.
        loss_of: a step -> (the loss to take the gradient of, the loss to show).
        before_update: called between the gradient's clipping and the update.

    Raises:
        ValueError: the checkpoint is one of another recipe.
        FloatingPointError: a loss or a gradient is not finite.
    """
    model.train()
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    first, seconds, recent = restore(config, model, optimizers)
    steps = config.phases[-1][1]
    started = saved = time.monotonic()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "loss {task.fields[loss]:.4f}")
    with Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()) as progress:
        bar = progress.add_task(
            config.phases[0][0], total=steps, completed=first, loss=recent[-1] if recent else math.nan
        )
        for step in range(first, steps):
            name, done = config.phase(step), step + 1
            for group, peak in zip((g for optimizer in optimizers for g in optimizer.param_groups), peaks):
                group["lr"] = peak * schedule(step, config.warmup_steps, steps)
            loss, shown = loss_of(step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"{name}: loss or gradient not finite at step {step}; lower the learning rate."
                )
            before_update()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()

            recent = [*recent[-49:], shown.item()]
            mean, now = sum(recent) / len(recent), time.monotonic()
            progress.update(bar, advance=1, loss=mean, description=name)
            stopping = config.stop_after_steps is not None and done - first >= config.stop_after_steps
            if stopping or any(done == end for _, end in config.phases) or now - saved >= config.checkpoint_seconds:
                elapsed, saved = seconds + now - started, now
                save_checkpoint(config, model, optimizers, {"step": done, "seconds": elapsed, "recent": recent})
                progress.console.print(f"{name}: step {done}/{steps}, loss {mean:.4f}, {elapsed:.0f} s")
            if stopping and done < steps:
                return None
    return {"seconds": seconds + time.monotonic() - started, "loss": sum(recent) / len(recent)}


def schedule(step: int, warmup_steps: int, steps: int) -> float:
    """Returns the fraction of the peak learning rate: linear warm-up, constant, and a linear fall over the last third.

    The long constant part is what gets the model off the plateaus on which it has yet to learn one more look-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.02, min(1.0, (steps - step) / max(1, steps - 2 * steps // 3)))


def save_checkpoint(
    config: FitConfig, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict[str, Any]
) -> None:
    """Replaces the checkpoint in one move: a kill while writing leaves the former one."""
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    config.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = config.checkpoint.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save({**state, **progress, "recipe": json.dumps(config.recipe)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, config.checkpoint)


def restore(
    config: FitConfig, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float, list[float]]:
    """Loads the checkpoint if there is one; returns the step to go on from, wall seconds so far, and the last losses."""
    if not config.checkpoint.exists():
        return 0, 0.0, []
    state = torch.load(config.checkpoint, weights_only=True)
    if json.loads(state["recipe"]) != config.recipe:
        raise ValueError(
            f"{config.checkpoint} belongs to another recipe: expected {config.recipe}, found {state['recipe']}. "
            "Delete it to begin anew, or name another --work folder."
        )
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return state["step"], state["seconds"], state["recent"]


def publish(
    folder: Path,
    save: Callable[[Path], None],
    describe: Callable[[Path, dict[str, Any]], dict[str, Any]],
    card: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Writes a finished model, its record and its card beside the folder, and moves them into place.

    Args:
        save: writes weights, and all that belongs to them, into a folder.
        describe: (what was saved, size and digest of the weights) -> the record, of which `training.json` is made.
        card: the record -> README.md.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    (weights,) = partial.glob("*.safetensors")
    weights.chmod(0o644)
    data = weights.read_bytes()
    record = describe(partial, {"weight_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    (partial / "README.md").write_text(card(record))
    # Last, because it is what says that the folder is complete.
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, folder)
    return record


def finished(folder: Path, recipe: dict[str, Any], key: str | None = "config") -> bool:
    """Tells whether a model stands complete in a folder; refuses one that was made by another recipe.

    Args:
        key: of the recipe in the model's record; None: it stands there entry by entry.
    """
    path = folder / "training.json"
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    found = record[key] if key is not None else {name: record.get(name) for name in recipe}
    if found != recipe:
        raise ValueError(
            f"{folder} was made by another recipe: expected {recipe}, found {found}. "
            "Delete the folder to train it anew, or name another --out folder."
        )
    return True


def parse(config: type[ConfigT], module: str, description: str | None, arguments: Sequence[str] | None) -> ConfigT:
    """Returns the config of a command line, or of a YAML file given as --config, overridden by the command line."""
    parser = ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config)
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config")
    return config(**values)
