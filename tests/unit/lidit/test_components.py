"""What weights were trained with: found where it was or where it is now, and refused where it computes something else."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from lidit.components import Components
from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.runtime.model_files import split_revision

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def encoder(llama_folder):
    return PromptEncoder(EncoderConfig("one", str(llama_folder), template="plain", dtype="fp32"), "cpu")


class TinyVAE:
    """Stands for a loaded autoencoder: what is compared is its fingerprint."""

    def __init__(self, **changes):
        self.values = {
            "autoencoder": "AutoencoderKL",
            "weights": "abc",
            "dtype": "fp32",
            "scaling_factor": 0.5,
            **changes,
        }

    def fingerprint(self):
        return self.values


@pytest.fixture
def weights(tmp_path, encoder):
    """A folder with a config.json, which is all that is read here."""
    folder = tmp_path / "weights"
    folder.mkdir()
    config = {
        "format": 1,
        "model": {},
        "encoders": {"one": {"config": dataclasses.asdict(encoder.config), "fingerprint": encoder.fingerprint()}},
        "vae": {"model": "vae", "fingerprint": TinyVAE().fingerprint()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_encoder_of_training_is_found(weights, encoder):
    found = Components(weights).encoder("one", None, "cpu")
    assert found.config == encoder.config and found.folder == encoder.folder


def test_an_encoder_that_was_moved(weights, encoder, tmp_path, edit_json):
    moved = shutil.copytree(encoder.folder, tmp_path / "moved" / "llama")
    for instead in (str(moved), dataclasses.replace(encoder.config, model=str(moved))):
        assert Components(weights).encoder("one", instead, "cpu").folder == moved
    assert Components(weights).encoder("one", encoder, "cpu") is encoder
    saved = json.loads((weights / "config.json").read_text())["encoders"]
    saved["one"]["config"]["model"] = "../moved/llama"  # counts from the weights folder
    edit_json(weights / "config.json", encoders=saved)
    assert Components(weights).encoder("one", None, "cpu").folder == moved


@pytest.mark.parametrize(
    "key, change",
    [
        ("layer", {"layer_index": 1}),
        ("instruction", {"instruction": "Describe:"}),
        ("template", {"template": "chat"}),
        ("max_prompt_tokens", {"max_prompt_tokens": 9}),
    ],
)
def test_an_encoder_that_is_put_differently_is_refused(weights, encoder, key, change):
    config = dataclasses.replace(encoder.config, **change)
    with pytest.raises(ValueError) as caught:
        Components(weights).encoder("one", config, "cpu")
    said = str(caught.value)
    assert f"encoder one is not the one that the weights in {weights} were trained with" in said
    assert f"  {key}: expected {encoder.fingerprint()[key]!r}, received " in said
    assert "layer:" not in said or key == "layer", "names a key that does not differ"
    assert "encoders={'one': ...}, or check=False" in said
    assert Components(weights, check=False).encoder("one", config, "cpu").config == config


def test_an_encoder_with_other_weights_is_refused(weights, own_llama):
    with pytest.raises(ValueError, match=r"weights: expected '[0-9a-f]{64}', received '[0-9a-f]{64}'") as caught:
        Components(weights).encoder("one", str(own_llama(seed=5)), "cpu")
    assert "layer" not in str(caught.value) and "tokenizer" not in str(caught.value)


@pytest.mark.parametrize("change", [{"dtype": "bf16"}, {"codec": "fp8_e4m3"}])
def test_rounding_may_differ(weights, encoder, change):
    config = dataclasses.replace(encoder.config, **change)
    assert Components(weights).encoder("one", config, "cpu").config == config


def test_weights_that_do_not_say_what_they_need(weights, edit_json, encoder):
    edit_json(weights / "config.json", encoders={}, vae={})
    with pytest.raises(ValueError, match=r"does not say what encoder one is; pass encoders=\{'one': EncoderConfig"):
        Components(weights).encoder("one", None, "cpu")
    with pytest.raises(ValueError, match="does not say what encoder one is"):
        Components(weights).encoder("one", str(encoder.folder), "cpu")
    with pytest.raises(ValueError, match=r"names no VAE; pass vae="):
        Components(weights).vae(None, "cpu")
    assert Components(weights).encoder("one", encoder.config, "cpu").config == encoder.config


def test_vae(weights):
    same = TinyVAE(dtype="bf16")
    assert Components(weights).vae(same, "cpu") is same
    other = TinyVAE(scaling_factor=0.3)
    with pytest.raises(
        ValueError, match=r"VAE is not the one .*\n  scaling_factor: expected 0.5, received 0.3\n.* vae="
    ):
        Components(weights).vae(other, "cpu")
    assert Components(weights, check=False).vae(other, "cpu") is other
    with pytest.raises(ValueError, match=r"new: expected None, received 1"):
        Components(weights).vae(TinyVAE(new=1), "cpu")


def test_revision_of_a_hub_id(tmp_path):
    commit = "a" * 40
    assert split_revision(f"owner/name@{commit}") == ("owner/name", commit)
    assert split_revision("owner/name") == ("owner/name", None)
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert split_revision(str(folder)) == (str(folder), None)
    assert split_revision("") == ("", None)


def test_weights_trained_before_a_key_was_recorded_are_used_with_a_warning(weights, encoder, own_llama, edit_json):
    saved = json.loads((weights / "config.json").read_text())["encoders"]
    del saved["one"]["fingerprint"]["model_config"]
    edit_json(weights / "config.json", encoders=saved)
    with pytest.warns(UserWarning, match=r"encoder one of the weights in .*: model_config could not be compared"):
        Components(weights).encoder("one", None, "cpu")
    with pytest.raises(ValueError, match="weights: expected"):
        Components(weights).encoder("one", str(own_llama(seed=5)), "cpu")


def test_an_encoder_whose_config_was_edited_is_refused(weights, encoder, tmp_path, edit_json):
    folder = shutil.copytree(encoder.folder, tmp_path / "edited")
    edit_json(folder / "config.json", rms_norm_eps=1e-2)
    with pytest.raises(ValueError, match=r"\n  model_config: expected '[0-9a-f]{64}', received '[0-9a-f]{64}'\n"):
        Components(weights).encoder("one", str(folder), "cpu")


@pytest.mark.parametrize("download", [False, True])
def test_a_hub_id_that_the_weights_name_is_fetched_only_where_that_is_asked_for(weights, tmp_path, download):
    """Offline, with an empty cache: what is tried shows in what is said."""
    code = (
        "import sys; from lidit.components import Components\n"
        f"Components(sys.argv[1], download={download}).encoder('one', sys.argv[2] or None, 'cpu')"
    )
    commit = "a" * 40
    saved = json.loads((weights / "config.json").read_text())
    saved["encoders"]["one"]["config"] |= {"model": "owner/name", "revision": commit}
    (weights / "config.json").write_text(json.dumps(saved))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    for instead in ("", f"owner/name@{commit}"):
        command = [sys.executable, "-c", code, str(weights), instead]
        said = subprocess.run(command, env=env, capture_output=True, text=True).stderr
        fetched = "expected to find it in the local hub cache or on the hub" in said
        assert fetched == (download or bool(instead)), said
        assert fetched or ("is named by data, not by you" in said and "--download_models" in said)
