"""A cell of the grid: its steps, what it is stopped and continued at, and what its exams say of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.ablation.cell import Cell, CellConfig, training_rows
from demo.ablation.cell_table import Prompts, States, encode_prompts, scene_latents
from demo.ablation.following import HIGH, HeldOutExam, SwapExam, losses, margin_figures
from demo.ablation.settings import SETTINGS
from demo.world.swaps import swaps
from lidit.frozen.vae import load_vae
from trainer.config import OptimizerConfig

ROOT = Path(__file__).resolve().parents[4]
SMALL = CellConfig(
    depth=1, width=32, heads=1, batch_size=8,
    optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=2),
)  # fmt: skip
SETTING = SETTINGS["refiner_full"]
NAMES = [one.name for one in SETTING.encoders]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Prompts]:
    folder = tmp_path_factory.mktemp("rows")
    vae = load_vae(str(ROOT / "demo" / "vae"), device="cpu")
    latents = scene_latents(folder, range(24), 32, vae, CPU)
    return latents, encode_prompts(folder, [f"{n} circles" for n in range(24)], SETTING.encoders, CPU)


def cell_of(rows: tuple[torch.Tensor, Prompts], config: CellConfig = SMALL, seed: int = 0) -> Cell:
    return Cell(config, NAMES, SETTING.model, seed, *rows)


def test_states_are_the_encoders_own_and_dropped_rows_are_empty(rows):
    from lidit.frozen.text import PromptEncoder

    latents, prompts = rows
    assert latents.shape == (24, 4, 8, 8)
    index = torch.tensor([3, 20, 3])
    embeds, mask = prompts.states[NAMES[0]].rows(index)
    expected, real = PromptEncoder(SETTING.encoders[0], "cpu")([prompts.texts[row] for row in index])
    assert mask.tolist() == real.tolist()
    torch.testing.assert_close(embeds[mask], expected[real].bfloat16().float())
    _, dropped = prompts.states[NAMES[0]].rows(index, torch.tensor([True, False, True]))
    assert dropped.sum(dim=1).tolist() == [0, int(mask[1].sum()), 0]


def test_an_encoder_with_an_empty_prompt_of_its_own_gives_it_to_dropped_rows():
    states = States(
        torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 3]), torch.zeros(0, 2), torch.tensor([[6.0, 7.0]])
    )
    embeds, mask = states.rows(torch.tensor([1, 0]), torch.tensor([False, True]))
    assert embeds.tolist() == [[[2, 3], [4, 5]], [[6, 7], [0, 0]]] and mask.tolist() == [[True, True], [True, False]]


def test_a_cell_that_was_stopped_takes_the_same_steps(rows, tmp_path: Path):
    whole, part = cell_of(rows), cell_of(rows)
    whole.advance(6)
    part.advance(3)
    part.save(tmp_path / "cell.pt")
    again = cell_of(rows, seed=0)
    again.load(tmp_path / "cell.pt")
    again.advance(3)
    assert again.step == whole.step == 6
    for one, other in zip([*whole.parameters, *whole.average], [*again.parameters, *again.average], strict=True):
        assert torch.equal(one, other)
    other = cell_of(rows, dataclasses.replace(SMALL, batch_size=4))
    with pytest.raises(ValueError, match="was trained with"):
        other.load(tmp_path / "cell.pt")


def test_rows_come_once_in_a_pass():
    seen = np.concatenate([training_rows(1, range(first, first + 8), 24) for first in range(0, 48, 8)])
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24].tolist() != seen[24:].tolist()


def test_a_cell_learns_and_its_average_is_applied_for_a_while(rows):
    cell = cell_of(rows)
    before = losses(cell, *rows, HIGH).mean()
    cell.advance(30)
    own = [parameter.clone() for parameter in cell.parameters]
    with cell.averaged():
        assert not cell.model.training
        after = losses(cell, *rows, HIGH).mean()
    assert after < before
    assert cell.model.training and all(map(torch.equal, own, cell.parameters))


def test_bf16_is_near_fp32(rows):
    full, mixed = cell_of(rows), cell_of(rows, dataclasses.replace(SMALL, precision="bf16"))
    assert mixed.advance(4) == pytest.approx(full.advance(4), rel=0.02)


def test_exams_give_figures_of_every_kind(rows, tmp_path: Path):
    vae = load_vae(str(ROOT / "demo" / "vae"), device="cpu")
    asked = swaps(3)
    latents = scene_latents(tmp_path, [swap.seed for swap in asked], 32, vae, CPU)
    right, wrong = (
        encode_prompts(tmp_path, texts, SETTING.encoders, CPU)
        for texts in ([swap.right for swap in asked], [swap.wrong for swap in asked])
    )
    cell = cell_of(rows)
    figures = SwapExam(tuple(swap.kind for swap in asked), latents, right, wrong)(cell)
    assert set(figures) == {swap.kind for swap in asked}
    assert all(figure["margin"] == 0 for figure in figures.values())  # an untrained model predicts zeros
    held_out = HeldOutExam(latents, right)(cell)
    assert held_out["told"] == 0 and 1 < held_out["loss"] < 6 and len(held_out["loss_by_timestep"]) == 3


def test_margins_count_scenes_on_the_right_side():
    figures = margin_figures(np.array([[1.0, 1.0, -3.0], [1.0, -0.5, 1.0]]))
    assert figures["margin"] == pytest.approx(0.25 / 3, abs=1e-6)
    assert figures["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert figures["by_timestep"] == pytest.approx([-1 / 3, 0.5], abs=1e-6)
    assert figures["error"] == pytest.approx(1.01036 / 3**0.5, abs=1e-4)
