"""Train the demo's vision-language model: a tiny LLaVA that describes rendered scenes.

    python -m demo.models.train_vlm                       # about an hour on one CPU thread
    python -m demo.models.train_vlm --out /tmp/vlm --see_steps 20 --say_steps 20

First the vision tower alone learns to see (what each patch of an image shows, from the scene's truth), then the whole
model learns to say it. Run it again after any kind of end: it goes on from its last checkpoint, and the weights equal
those of an unbroken run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from demo.models import training
from demo.models.training import FitConfig, finished, fit, publish
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
    if finished(config.out, asdict(recipe), "recipe"):
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
    save_vlm(config, processor, student, result)


def train(config: TrainVlmConfig, processor: LlavaProcessor, student: VlmStudent) -> dict[str, float] | None:
    """Trains in place, from the checkpoint if there is one; returns wall seconds and last loss, or None if stopped."""
    recipe = config.recipe

    def loss_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is learned now is what is shown: to see, then to say."""
        batch = vlm_batch(processor, recipe.batch, recipe.seed, step)
        seeing, saying = student(batch, step >= recipe.see_steps)
        return (seeing, seeing) if saying is None else (saying + PATCH_WEIGHT * seeing, saying)

    fit_config = FitConfig(
        config.work / "vlm.pt", asdict(recipe), [("see", recipe.see_steps), ("say", recipe.steps)], recipe.warmup_steps,
        config.checkpoint_seconds, config.stop_after_steps,
    )  # fmt: skip
    return fit(fit_config, student, build_vlm_optimizers(student, recipe.learning_rate), loss_of)


def save_vlm(config: TrainVlmConfig, processor: LlavaProcessor, student: VlmStudent, result: dict[str, float]) -> None:
    """Saves in bfloat16, examines what was saved, writes record and card, and moves the folder into place."""
    model = student.model

    def save(folder: Path) -> None:
        model.bfloat16().save_pretrained(folder)
        processor.save_pretrained(folder)

    def describe(folder: Path, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": config.out.name,
            "architecture": type(model).__name__,
            "vocabulary": len(processor.tokenizer),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **weights,
            **result,
            "recipe": asdict(config.recipe),
            "exam_scenes": config.exam_scenes,
            "figures": examine(folder, config.exam_scenes),
        }

    figures = publish(config.out, save, describe, vlm_card)["figures"]
    shares = ", ".join(f"{name} {figures[name]:.1%}" for name in ("objects", "relations", "right", "declined"))
    print(f"{config.out}: {shares}")


def parse(arguments: list[str] | None = None) -> TrainVlmConfig:
    """Returns the config of a command line."""
    return training.parse(TrainVlmConfig, "demo.models.train_vlm", __doc__, arguments)


if __name__ == "__main__":
    set_verbosity_error()
    disable_progress_bar()  # transformers' own bars would tear ours
    main(parse())
