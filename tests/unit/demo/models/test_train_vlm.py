"""Training the demo's VLM: it learns, it resumes exactly, it refuses another recipe; Muon makes matrices orthogonal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.models.train_vlm import Recipe, TrainVlmConfig, main, parse, train
from demo.models.training import finished
from demo.models.vlm_examples import vlm_batch
from demo.models.vlm_model import build_processor, build_vlm
from demo.models.vlm_optimization import Muon, VlmStudent, patch_accuracy

pytestmark = pytest.mark.unit
TINY = Recipe(
    width=32, vision_blocks=1, text_blocks=1, see_steps=3, say_steps=3, batch=4, warmup_steps=1, tokenizer_texts=40
)


@pytest.fixture(scope="module")
def processor():
    return build_processor(40, 0)


def config(tmp_path: Path, **changes: object) -> TrainVlmConfig:
    return TrainVlmConfig(
        recipe=TINY, out=tmp_path / "vlm", work=tmp_path / "work", checkpoint_seconds=0.0, exam_scenes=2, **changes
    )


def is_finished(config: TrainVlmConfig) -> bool:
    return finished(config.out, dataclasses.asdict(config.recipe), "recipe")


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = config(tmp_path / "whole"), config(tmp_path / "parts", stop_after_steps=2)
    main(whole)
    for _ in range(3):  # 2 steps of seeing, the third and the first of saying, the rest
        assert not is_finished(parts)
        main(parts)
    assert is_finished(parts) and is_finished(whole)
    one, other = (load_file(made.out / "model.safetensors") for made in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    record = json.loads((whole.out / "training.json").read_text())
    assert record["recipe"] == dataclasses.asdict(TINY) and 0 <= record["figures"]["objects"] <= 1
    with pytest.raises(ValueError, match="made by another recipe"):
        main(dataclasses.replace(whole, recipe=dataclasses.replace(TINY, seed=1)))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, processor) -> None:
    begun = config(tmp_path, stop_after_steps=1)
    student = VlmStudent(build_vlm(processor, 32, 1, 1))
    assert train(begun, processor, student) is None
    other = dataclasses.replace(begun, recipe=dataclasses.replace(TINY, learning_rate=1.0))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        train(other, processor, VlmStudent(build_vlm(processor, 32, 1, 1)))


def test_the_language_model_is_untouched_while_the_tower_learns_to_see(processor) -> None:
    torch.manual_seed(0)
    student = VlmStudent(build_vlm(processor, 32, 1, 1))
    seeing, saying = student(vlm_batch(processor, 2, 0, 0), speak=False)
    seeing.backward()
    assert saying is None
    named = dict(student.named_parameters())
    assert all(named[name].grad is None for name in named if ".language_model." in name or "projector" in name)
    assert any(named[name].grad is not None for name in named if ".vision_tower." in name)


def test_the_losses_fall(processor) -> None:
    torch.manual_seed(0)
    student = VlmStudent(build_vlm(processor, 32, 1, 1))
    batch = vlm_batch(processor, 8, 0, 0)
    matrices = [p for name, p in student.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in student.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, 0.01), torch.optim.AdamW(others, 0.01)]
    losses = []
    for _ in range(40):
        seeing, saying = student(batch, speak=True)
        (seeing + saying).backward()
        for optimizer in optimizers:
            optimizer.step()
        student.zero_grad()
        losses.append((seeing.item(), saying.item()))
    assert losses[-1][0] < 0.7 * losses[0][0] and losses[-1][1] < 0.4 * losses[0][1]
    states = student.model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-1]
    assert patch_accuracy(student.head(states), batch)["colour"] > 0.6


def test_what_is_taught_is_what_generation_reads(processor) -> None:
    """The student's own path (no padding mask, padding on the right) gives the model's own loss."""
    torch.manual_seed(0)
    student = VlmStudent(build_vlm(processor, 32, 1, 1))
    for parameter in student.model.parameters():  # blocks begin as the identity: make them count
        torch.nn.init.normal_(parameter, std=0.05)
    batch = vlm_batch(processor, 3, 0, 1)
    _, saying = student(batch, speak=True)
    mask = batch.tokens != processor.tokenizer.pad_token_id
    output = student.model(
        input_ids=batch.tokens, pixel_values=batch.pixels, attention_mask=mask.long(), labels=batch.targets
    )
    torch.testing.assert_close(saying, output.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (20, 20)])
def test_muon_makes_a_matrix_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    made = Muon.orthogonal(matrix)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape and values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((made * (u @ v)).sum() / made.norm() / (u @ v).norm()) > 0.97, "the nearest one, not any"


def test_muon_leaves_alone_what_has_no_gradient() -> None:
    still, moved = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon([still, moved], 0.1)
    moved.grad = torch.eye(4)
    optimizer.step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, torch.ones(4, 4))


def test_command_line() -> None:
    made = parse(["--recipe.see_steps", "7", "--out", "/tmp/x", "--stop_after_steps", "3"])
    assert made.recipe.see_steps == 7 and made.recipe.say_steps == Recipe().say_steps and made.out == Path("/tmp/x")
