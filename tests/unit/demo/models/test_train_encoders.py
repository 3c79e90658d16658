"""Training the encoders: a run that is stopped or killed and run again ends as an unbroken one does."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from demo.models.train_encoders import TrainEncodersConfig, main, parse
from demo.models.training import schedule

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[4]
ALL = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def quiet_and_single_threaded():
    threads = torch.get_num_threads()
    disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def tiny(folder: Path, **changes) -> TrainEncodersConfig:
    config = TrainEncodersConfig(
        encoders=("llama-base", "llama-tuned"),
        out=folder / "encoders",
        work=folder / "work",
        base_steps=6,
        tuned_steps=6,
        rows=1,
        row_length=256,
        warmup_steps=2,
        tokenizer_texts=50,
        exam_captions=2,
        exam_tasks=1,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    main(tiny(folder))
    return folder


def assert_same(folder: Path, reference: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for file in ALL:
            found = (folder / "encoders" / name / file).read_bytes()
            assert found == (reference / "encoders" / name / file).read_bytes(), f"{name}/{file} differs"


def test_stopped_and_resumed_equals_unbroken(tmp_path, unbroken, capsys):
    for _ in range(10):
        main(tiny(tmp_path, stop_after_steps=4))
        if (tmp_path / "encoders" / "llama-tuned" / "training.json").exists():
            break
    assert_same(tmp_path, unbroken, ("llama-base", "llama-tuned"))
    assert "llama-base: stopped after 4 steps" in capsys.readouterr().out


def test_killed_and_resumed_equals_unbroken(tmp_path, unbroken):
    arguments = ["--out", str(tmp_path / "encoders"), "--work", str(tmp_path / "work"), "--encoders", "[llama-base]"]
    arguments += ["--base_steps", "6", "--rows", "1", "--row_length", "256", "--warmup_steps", "2"]
    arguments += ["--tokenizer_texts", "50", "--checkpoint_seconds", "0", "--exam_captions", "2", "--exam_tasks", "1"]
    process = subprocess.Popen([sys.executable, "-m", "demo.models.train_encoders", *arguments], cwd=ROOT)
    checkpoint = tmp_path / "work" / "llama-base.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    main(tiny(tmp_path, encoders=("llama-base",)))
    assert_same(tmp_path, unbroken, ("llama-base",))


def test_torn_write_leaves_the_former_checkpoint(tmp_path, unbroken):
    config = tiny(tmp_path, encoders=("llama-base",))
    main(replace(config, stop_after_steps=3))
    (tmp_path / "work" / "llama-base.partial").write_bytes(b"torn")
    (tmp_path / "encoders" / "llama-base.partial").mkdir(parents=True)
    main(config)
    assert_same(tmp_path, unbroken, ("llama-base",))


def test_finished_encoders_are_skipped_and_other_recipes_refused(unbroken, capsys):
    main(tiny(unbroken))
    assert capsys.readouterr().out.count("finished already") == 2
    with pytest.raises(ValueError, match="made by another recipe"):
        main(tiny(unbroken, base_steps=7))


def test_checkpoint_of_another_recipe_is_refused(tmp_path):
    main(tiny(tmp_path, stop_after_steps=1))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        main(tiny(tmp_path, seed=1))


def test_tuned_needs_its_base(tmp_path):
    with pytest.raises(ValueError, match="train llama-base first"):
        main(tiny(tmp_path, encoders=("llama-tuned",)))


def test_record_and_card_carry_the_figures(unbroken):
    folder = unbroken / "encoders" / "llama-tuned"
    record = json.loads((folder / "training.json").read_text())
    assert record["figures"]["perplexity"] > 1
    assert set(record["figures"]["accuracy"]) == {"inventory", "colour", "size", "texture", "count", "where", "list"}
    assert f"**{record['figures']['perplexity']:.3f}**" in (folder / "README.md").read_text()


def test_schedule_warms_up_holds_and_falls():
    shares = [schedule(step, 10, 90) for step in range(90)]
    assert shares[0] == 0.1 and shares[9:60] == [1.0] * 51
    assert shares[60:] == sorted(shares[60:], reverse=True) and 0.02 <= shares[-1] < 0.05


def test_command_line(tmp_path):
    config = parse(["--encoders", "[qwen-base]", "--base_steps", "3", "--out", str(tmp_path)])
    assert config == TrainEncodersConfig(encoders=("qwen-base",), base_steps=3, out=tmp_path)
    with pytest.raises(ValueError, match="Unknown encoders"):
        TrainEncodersConfig(encoders=("t5-base",))


def test_context_weight_is_part_of_a_tuned_recipe_where_it_is_another(tmp_path, unbroken):
    config = tiny(tmp_path, context_weight=0.5)
    assert config.recipe("base") == tiny(tmp_path).recipe("base")
    assert config.recipe("tuned") == {**tiny(tmp_path).recipe("tuned"), "context_weight": 0.5}
    with pytest.raises(ValueError, match="another recipe"):
        main(tiny(unbroken, context_weight=0.5))
    main(config)
    weights = [
        (folder / "encoders" / "llama-tuned" / "model.safetensors").read_bytes() for folder in (tmp_path, unbroken)
    ]
    assert weights[0] != weights[1]
    record = json.loads((tmp_path / "encoders" / "llama-tuned" / "training.json").read_text())
    assert record["context_weight"] == 0.5
