"""Weights: whole or not there, strict, readable by others, and one copy in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import lidit
from lidit.diffusion import Flow, objective_to_dict
from lidit.model import LIDiT
from lidit.weights import INDEX_FILE, SINGLE_FILE, expected_shapes, load_weights, read_config, save_weights

pytestmark = pytest.mark.unit

EXTRA = {
    "objective": objective_to_dict(Flow(shift=3.0)),
    "encoders": {"one": {"config": {"name": "one", "model": "encoders/one"}, "fingerprint": {"layer": 4}}},
    "vae": {"model": "vae", "revision": None, "fingerprint": {"weights": "abc"}},
    "image_size": [256, 192],
    "training": {"step": 7, "ema": 0.9999},
}
LARGEST = 4 * 32 * 9 * 32  # bytes of the tiny model's largest weight, the modulation's


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture
def folder(tmp_path, model):
    """A weights folder that the test may damage."""
    return save_weights(tmp_path / "weights", model, extra=EXTRA)


@pytest.fixture
def sharded(tmp_path, model):
    return save_weights(tmp_path / "sharded", model, shard_bytes=LARGEST)


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def rewrite(folder, change):
    """Applies `change` to the tensors of the one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_FILE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


# -- there and back ---------------------------------------------------------------------------------------------------


def test_round_trip(folder, model, make_inputs):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SINGLE_FILE]
    loaded = lidit.from_pretrained(folder)
    assert isinstance(loaded, LIDiT) and loaded.config == model.config and not loaded.training
    assert_same_weights(loaded, model)
    inputs = make_inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), model(**inputs))


def test_config_holds_what_belongs_to_the_weights(folder, model):
    config = read_config(folder)
    assert config == {"format": 1, "model": model.config.to_dict(), **EXTRA}
    assert json.loads((folder / "config.json").read_text()) == config


def test_loaded_weights_can_be_trained_and_the_file_stays(folder, make_inputs):
    before = (folder / SINGLE_FILE).read_bytes()
    loaded = load_weights(folder)
    loaded(**make_inputs(loaded)).square().sum().backward()
    with torch.no_grad():
        for weight in loaded.parameters():
            assert weight.requires_grad and weight.grad is not None
            weight.sub_(weight.grad)
    assert (folder / SINGLE_FILE).read_bytes() == before
    assert_same_weights(load_weights(folder), load_weights(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(tmp_path, folder, model, dtype):
    loaded = load_weights(folder, dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    stored = save_weights(tmp_path / "stored", model, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(stored / SINGLE_FILE).values()} == {dtype}
    assert_same_weights(load_weights(stored), loaded)


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_laid_out_as_hugging_face_does(sharded, model):
    files = sorted(path for path in sharded.iterdir() if path.suffix == ".safetensors")
    count = len(files)
    assert count > 3
    assert [path.name for path in files] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    index = json.loads((sharded / INDEX_FILE).read_text())
    held = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == held and held.keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    for path in files:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= LARGEST
    assert_same_weights(load_weights(sharded), model)


@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_another_reader_gets_the_same(which, request, model):
    """huggingface_hub's loader, which knows nothing of lidit."""
    other = LIDiT(model.config)
    huggingface_hub.load_torch_model(other, request.getfixturevalue(which), strict=True, safe=True)
    assert_same_weights(other, model)


def test_a_tensor_above_the_limit_gets_a_file_of_its_own(tmp_path, model):
    folder = save_weights(tmp_path / "weights", model, shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == len(model.state_dict())
    assert_same_weights(load_weights(folder), model)


# -- the state as a stream --------------------------------------------------------------------------------------------


def test_weights_come_one_by_one(tmp_path, model):
    """As a sharded model gives them: one buffer for all, overwritten when the next is asked for; files appear meanwhile."""
    buffer = torch.empty(LARGEST // 4 + 1)
    written = []

    def gathered():
        for name, tensor in reversed(model.state_dict().items()):
            view = buffer[1 : 1 + tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)
            written.append(len(list(tmp_path.glob(".weights.new-*/*.part"))))

    folder = save_weights(tmp_path / "weights", model, state=gathered(), shard_bytes=LARGEST)
    assert_same_weights(load_weights(folder), model)
    assert written[-1] >= 3, "all was kept in memory until the end"
    assert written == sorted(written)


def test_state_instead_of_the_models_own(tmp_path, model):
    averaged = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    folder = save_weights(tmp_path / "ema", model, state=averaged.items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_weights(folder).state_dict().items())


def test_state_with_a_weight_twice(tmp_path, model):
    twice = [*model.state_dict().items(), next(iter(model.state_dict().items()))]
    with pytest.raises(ValueError, match=r"expected every weight once, received \S+ twice"):
        save_weights(tmp_path / "weights", model, state=iter(twice))
    assert list(tmp_path.iterdir()) == []


# -- whole or not there -----------------------------------------------------------------------------------------------


def broken_state(model, error):
    for number, item in enumerate(model.state_dict().items()):
        if number == 20:
            raise error
        yield item


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_save_that_failed(tmp_path, model, error):
    with pytest.raises(type(error)):
        save_weights(tmp_path / "deep" / "weights", model, state=broken_state(model, error), shard_bytes=LARGEST)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("stranger", ["photo.jpg", "README.md", "notes/todo.txt", "model.safetensors.bak", ".git/HEAD"])
def test_an_overwrite_deletes_nothing_but_weights(folder, model, stranger):
    path = folder / stranger
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"not replaced: it holds '{stranger.partition('/')[0]}'"):
        save_weights(folder, model, overwrite=True)
    assert path.read_text() == "mine" and (folder / SINGLE_FILE).exists()


def test_an_overwrite_looks_into_files_of_its_own_names(tmp_path, folder, model):
    """A folder of somebody else's model, of the same file names; a file; a link."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["Other"]}')
    (other / SINGLE_FILE).write_bytes((folder / SINGLE_FILE).read_bytes())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    for name, word in (("other", "config.json"), ("file", "is a file"), ("link", "is a link")):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=word):
            save_weights(tmp_path / name, model, overwrite=True)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (folder / SINGLE_FILE).write_text("no safetensors, and maybe all that somebody has")
    with pytest.raises(ValueError, match="no weights of lidit's"):
        save_weights(folder, model, overwrite=True)


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path, model):
    def weights():
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "mine.txt").write_text("mine")
        yield from model.state_dict().items()

    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"made by something else meanwhile|holds 'mine\.txt'"):
            save_weights(tmp_path / "weights", model, state=weights(), overwrite=overwrite)
        assert [path.name for path in tmp_path.rglob("*")] == ["weights", "mine.txt"]
        (tmp_path / "weights" / "mine.txt").unlink()
        (tmp_path / "weights").rmdir()


def test_a_failed_overwrite_leaves_the_old_weights(folder, model):
    with pytest.raises(OSError):
        save_weights(folder, model, state=broken_state(model, OSError("disk full")), overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]
    assert_same_weights(load_weights(folder), model)
    assert read_config(folder)["training"]["step"] == 7


def test_an_overwrite_whose_rename_fails(folder, model, make_model, monkeypatch):
    """The old weights are aside already: they come back."""
    rename = Path.rename

    def fail(path, target):
        if ".new-" in path.name and Path(target) == folder:
            raise OSError("quota")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="quota"):
        save_weights(folder, make_model(seed=1), overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]
    assert_same_weights(load_weights(folder), model)


def test_there_already(folder, model, make_model):
    with pytest.raises(ValueError, match="it is there already; give another one, or pass overwrite=True"):
        save_weights(folder, model)
    other = make_model(seed=1)
    save_weights(folder, other, overwrite=True)
    assert_same_weights(load_weights(folder), other)
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]


def test_a_model_over_the_files_that_it_reads(folder):
    """Loaded weights are the mapped file: overwriting it must not pull it away from under them."""
    loaded = load_weights(folder)
    with torch.no_grad():
        loaded.final.project.bias += 1
    save_weights(folder, loaded, overwrite=True)
    assert_same_weights(load_weights(folder), loaded)


KILLED = """
import os, sys, torch
from lidit.weights import load_weights, save_weights
torch.set_num_threads(1)
model = load_weights(sys.argv[1])
def state():
    for number, item in enumerate(model.state_dict().items()):
        if number == 30:
            os._exit(9)
        yield item
save_weights(sys.argv[2], model, state=state(), shard_bytes=40_000, overwrite=True)
"""


def test_killed_while_saving(folder, tmp_path, model):
    for target in (folder, tmp_path / "new"):
        command = [sys.executable, "-c", KILLED, str(folder), str(target)]
        assert subprocess.run(command, cwd=Path(__file__).parents[3]).returncode == 9
    assert_same_weights(load_weights(folder), model)
    assert not (tmp_path / "new").exists()
    save_weights(tmp_path / "new", model)
    assert_same_weights(load_weights(tmp_path / "new"), model)


# -- strict -----------------------------------------------------------------------------------------------------------


def test_load_reports_what_does_not_fit(folder):
    def change(tensors):
        del tensors["final.project.bias"], tensors["timestep.up.weight"]
        tensors["stranger"] = torch.zeros(2)
        tensors["timestep.out.bias"] = torch.zeros(5)

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        load_weights(folder)
    report = str(caught.value)
    assert f"weights in {folder} do not fit the model's config" in report
    assert "2 missing: timestep.up.weight (32, 256), final.project.bias (16,)" in report
    assert "1 unexpected: stranger (2,)" in report
    assert "1 of another shape: timestep.out.bias expected (32,), received (5,)" in report


def test_long_reports_are_cut(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[:20]])
    with pytest.raises(ValueError, match=r"20 missing: .* \.\.\.") as caught:
        load_weights(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("damage", ["missing", "another model's", "of another shape"])
def test_save_refuses_a_state_that_is_not_the_models(tmp_path, model, make_model, damage):
    state = dict(model.state_dict())
    if damage == "missing":
        del state["final.project.bias"]
    elif damage == "another model's":
        state = make_model(depth=3).state_dict()
    else:
        state["final.project.bias"] = torch.empty(0)  # what a sharded model's own state looks like
    with pytest.raises(ValueError, match=r"does the state belong to this model\?"):
        save_weights(tmp_path / "weights", model, state=state.items())
    assert list(tmp_path.iterdir()) == []


def test_another_models_config(folder, edit_json, make_model):
    edit_json(folder / "config.json", model=make_model(depth=3).config.to_dict())
    with pytest.raises(ValueError, match=r"missing: blocks\.2[^!]*is config.json another model's\?"):
        load_weights(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(folder, keep):
    path = folder / SINGLE_FILE
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(ValueError, match=r"model.safetensors: file is cut short or damaged"):
        load_weights(folder)


def test_a_missing_shard(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"missing {lost.name}"):
        load_weights(sharded)


def test_folders_that_hold_no_weights(tmp_path, folder, edit_json):
    with pytest.raises(ValueError, match="nothing is there"):
        load_weights(tmp_path / "none")
    with pytest.raises(ValueError, match="full commit hash"):
        load_weights("owner/name")
    with pytest.raises(ValueError, match=r"expected a weights folder, .* it has no config.json"):
        read_config(tmp_path)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="is it another project's model"):
        load_weights(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        load_weights(folder)


def test_a_later_format(folder, edit_json):
    edit_json(folder / "config.json", format=2)
    with pytest.raises(ValueError, match=r"format 2 is newer than this lidit reads \(1\): update lidit"):
        load_weights(folder)


@pytest.mark.parametrize(
    "extra, match",
    [
        ({"objectiv": {}}, "expected keys among objective, encoders, .* received also objectiv"),
        ({"encoders": {"four": {}}}, "encoder 'four' is none of the model's, which are one, two"),
        ({"training": {"step": torch.ones(1)}}, "values that JSON can hold"),
    ],
)
def test_extra_that_cannot_be(tmp_path, model, extra, match):
    with pytest.raises(ValueError, match=match):
        save_weights(tmp_path / "weights", model, extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_expected_shapes(model):
    assert expected_shapes(model.config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
