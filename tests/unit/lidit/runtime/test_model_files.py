"""Model folders: what is missing or damaged is said before anything is loaded."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.runtime.model_files import (
    check_model_folder,
    resolve_model,
    split_revision,
    tokenizer_digest,
    weights_digest,
)

pytestmark = pytest.mark.unit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_shards(folder):
    """Splits model.safetensors into two shards with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{1 + (place % 2):05d}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_good_folder(llama_folder):
    assert resolve_model(str(llama_folder), None) == llama_folder.resolve()


def digest_in(refusal):
    return re.search(r"received (sha256:[0-9a-f]{64})", str(refusal.value))[1]


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_folder_of_another_digest_is_refused(llama_folder, tmp_path, changed):
    folder = shutil.copytree(llama_folder, tmp_path / "mine")
    with pytest.raises(ValueError, match="expected sha256:00, received sha256:") as refusal:
        resolve_model(str(folder), "sha256:00")
    pinned = digest_in(refusal)
    assert resolve_model(*split_revision(f"{folder}@{pinned}")) == folder.resolve()
    PromptEncoder(EncoderConfig("one", str(folder), revision=pinned, dtype="fp32"))
    if changed == "model.safetensors":
        weights = load_file(folder / changed)
        weights[min(weights)] += 1
        save_file(weights, folder / changed, metadata={"format": "pt"})
    else:
        (folder / changed).write_text(
            json.dumps({"changed": True, **json.loads((llama_folder / "config.json").read_text())})
        )
    with pytest.raises(ValueError, match=f"model folder .*mine: expected {pinned}, received sha256:"):
        PromptEncoder(EncoderConfig("one", str(folder), revision=pinned, dtype="fp32"))


def test_relative_path_from_the_working_directory(llama_folder, monkeypatch):
    monkeypatch.chdir(llama_folder.parent)
    assert resolve_model("llama", None) == llama_folder.resolve()
    assert resolve_model("./llama", None) == llama_folder.resolve()


@pytest.mark.parametrize("name", ["missing", "./missing", "/nowhere/at/all", "~/missing", "a/b/c"])
def test_nothing_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder with config\.json, or a hub id"):
        resolve_model(name, None)


@pytest.mark.parametrize("revision", [None, "", "main", "v1.0", COMMIT[:7], COMMIT[:-1], COMMIT + "0", COMMIT.upper()])
def test_hub_id_needs_a_full_commit(revision):
    with pytest.raises(ValueError, match=r"'owner/name' is no local folder.* full commit hash .*40 hex digits"):
        resolve_model("owner/name", revision)


def test_hub_id_that_is_not_in_the_cache(tmp_path):
    """In a process of its own, since the hub client reads its settings at import."""
    import subprocess
    import sys

    code = f"from lidit.runtime.model_files import resolve_model; resolve_model('owner/name', '{COMMIT}')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "ValueError: model 'owner/name' at 0123456789ab: expected to find it" in process.stderr


def test_no_config(own_llama):
    folder = own_llama()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected config.json, received the folder holds .*model.safetensors"):
        resolve_model(str(folder), None)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"expected config\.json, received the folder is empty"):
        resolve_model(str(tmp_path), None)


def test_no_tokenizer(own_llama):
    folder = own_llama()
    for path in [*folder.glob("tokenizer*"), *folder.glob("special*"), *folder.glob("chat*")]:
        path.unlink()
    with pytest.raises(ValueError, match="expected a tokenizer"):
        resolve_model(str(folder), None)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_weights_cut_short(own_llama, keep):
    path = own_llama() / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model.safetensors: file is cut short or damaged \([\d,]+ bytes\)"):
        resolve_model(str(path.parent), None)


def test_shards(own_llama):
    folder = own_llama()
    make_shards(folder)
    check_model_folder(folder)
    encoder = PromptEncoder(EncoderConfig("one", str(folder), template="plain", dtype="fp32"), device="cpu")
    assert torch.isfinite(encoder(["a cat"])[0]).all()
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: file is cut short"):
        check_model_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"missing model-00002-of-00002\.safetensors"):
        check_model_folder(folder)


@pytest.mark.timeout(30)
def test_weights_that_are_a_pipe_are_none(own_llama):
    path = own_llama() / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"missing \*\.safetensors"):
        resolve_model(str(path.parent), None)


def test_pickled_weights_alone(own_llama):
    folder = own_llama()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    check_model_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing \*\.safetensors .*pytorch_model\.bin.*convert pickled ones first"):
        check_model_folder(folder)


def test_digests_follow_content_alone(own_llama, tmp_path):
    folder = own_llama()
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert weights_digest(copy) == weights_digest(folder) and tokenizer_digest(copy) == tokenizer_digest(folder)
    before = weights_digest(copy), tokenizer_digest(copy)
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights_digest(copy) != before[0] and tokenizer_digest(copy) == before[1]
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert tokenizer_digest(copy) != before[1]
    assert weights_digest(folder) == before[0]


def test_digest_follows_the_template_file(own_llama):
    folder = own_llama()
    before = tokenizer_digest(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(folder) != before


def test_digest_follows_file_names(own_llama, tmp_path):
    """Two shards that change places are other weights files, though the same bytes."""
    folder = own_llama()
    make_shards(folder)
    swapped = shutil.copytree(folder, tmp_path / "swapped")
    one, two = (swapped / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    one.rename(swapped / "x")
    two.rename(one)
    (swapped / "x").rename(two)
    assert weights_digest(swapped) != weights_digest(folder)
