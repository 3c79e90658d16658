"""A model's files and its fingerprint agree: whatever changes a value changes the fingerprint, or is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.runtime.model_files import (
    HARMLESS_KEYS,
    OTHER_TOKENIZER_FILES,
    TOKENIZER_FILES,
    check_model_folder,
    config_digest,
    digest_of_files,
    tokenizer_digest,
)
from pipelines.captioning.transformers_engine import Captioner, VlmConfig

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[4]
DATA = Path(os.environ.get("LIDIT_TEST_DATA", ROOT.parent / "shared" / "data"))
ENCODERS = [*(ROOT / "demo" / "encoders" / name for name in ("llama-tuned", "qwen-tuned", "t5-base"))]
ENCODERS += [DATA / "models" / name for name in ("stories260K", "babyllama-tok105")]
PROMPTS = ["a red circle", "two blue squares on the left of a star"]


def opened(folder):
    return PromptEncoder(EncoderConfig("one", str(folder), template="plain", dtype="fp32"), "cpu")


def states(folder):
    prompt_embeds, prompt_mask = opened(folder)(PROMPTS)
    return prompt_embeds[prompt_mask].numpy()


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) else value * 2 + 0.1
    if isinstance(value, list):
        return value[:-1]
    return "float16" if "float" in str(value) else 3 if value is None else f"{value}x"


def one_key_changed(config, above=()):
    """(path of a key, the config with another value there) for every key, those of inner dictionaries too."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            for path, inner in one_key_changed(value, (*above, key)):
                yield path, {**config, key: inner}
        else:
            yield (*above, key), {**config, key: changed(value)}


@pytest.mark.parametrize("source", [*ENCODERS, ROOT / "demo" / "vlm"], ids=lambda path: path.name)
def test_every_key_of_the_config_counts_or_changes_nothing(source, tmp_path):
    if not source.is_dir():
        pytest.skip("needs the test data")
    folder = shutil.copytree(source, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    is_vlm, before = source.name == "vlm", config_digest(folder)
    right, harmless = None if is_vlm else states(folder), []
    for path, other in one_key_changed(config):
        (folder / "config.json").write_text(json.dumps(other))
        if config_digest(folder) != before:
            continue
        harmless.append(path[-1])
        if is_vlm:
            continue
        try:
            made = states(folder)
        except ValueError:
            continue  # refused
        np.testing.assert_array_equal(made, right, err_msg=str(path))
    assert set(harmless) <= HARMLESS_KEYS and "transformers_version" in harmless


def test_the_harmless_keys_of_a_vlm_change_no_caption(tmp_path, photo):
    from pipelines.captioning.request import CaptionRequest

    folder = shutil.copytree(ROOT / "demo" / "vlm", tmp_path / "vlm")
    config = json.loads((folder / "config.json").read_text())

    def said():
        engine = Captioner(VlmConfig(str(folder), dtype="fp32"), 16, 80, 4096, "cpu")
        return engine.fingerprint(), engine([CaptionRequest(photo(1, (80, 80)), "Describe the image.", 0, 0.0, False)])

    right = said()
    inner = {**config["text_config"], "use_cache": False, "initializer_range": 0.9, "dtype": "float16"}
    other = {
        **config,
        "text_config": inner,
        "transformers_version": "0",
        "dtype": "float16",
        "_name_or_path": "elsewhere",
    }
    (folder / "config.json").write_text(json.dumps(other, indent=9))
    assert said() == right
    inner["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(other))
    assert said()[0] != right[0] and said()[0]["model_config"] != right[0]["model_config"]


def test_the_fingerprint_is_the_same_before_and_after_loading():
    encoder = opened(ENCODERS[1])
    before = encoder.fingerprint()
    encoder(PROMPTS)
    assert encoder.text_config.num_hidden_layers == encoder.layer < 6, "the config object was changed"
    assert encoder.fingerprint() == before == opened(ENCODERS[1]).fingerprint()


def test_inner_dictionaries_that_are_no_sub_config_count_whole(tmp_path):
    def digest(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return config_digest(tmp_path)

    assert digest({"quantization_config": {"dtype": "a"}}) != digest({"quantization_config": {"dtype": "b"}})
    assert digest({"rope_parameters": {"dtype": "a"}}) != digest({"rope_parameters": {"dtype": "b"}})
    assert digest({"vision_config": {"dtype": "a", "x": 1}}) == digest({"vision_config": {"dtype": "b", "x": 1}})
    assert digest({"vision_config": {"inner_config": {"x": 1}}}) != digest(
        {"vision_config": {"inner_config": {"x": 2}}}
    )
    for wrong, message in (("{", "expected JSON"), ("[]", "expected a JSON object, received list")):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            config_digest(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(own_llama):
    """With peft installed transformers puts it on the weights, without it does not."""
    folder = own_llama()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected whole weights, received an adapter .* merge it"):
        check_model_folder(folder)


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_tokenizer_of_common_files_stays_what_it_was(own_llama):
    folder = own_llama()
    common = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    assert len(common) >= 2 and tokenizer_digest(folder) == digest_of_files(common)
    recorded = json.loads((ROOT / "demo" / "weights" / "config.json").read_text())["encoders"]
    for name in ("llama", "qwen"):
        made = tokenizer_digest(ROOT / "demo" / "encoders" / f"{name}-tuned")
        assert made == recorded[name]["fingerprint"]["tokenizer"]


@pytest.mark.parametrize(
    "name",
    [
        "sentencepiece.bpe.model", "spm.model", "cl100k_base.tiktoken", "vocab.bpe", "additional_chat_templates/tools.jinja",
        "tokenizer.4.0.json", "entity_vocab.json", "tekken.json",
    ],
)  # fmt: skip
def test_every_file_that_a_tokenizer_may_read_counts(own_llama, name):
    folder = own_llama()
    digests = [tokenizer_digest(folder)]
    for content in ("one", "two"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        digests.append(tokenizer_digest(folder))
    assert len(set(digests)) == 3
    (folder / "README.md").write_text("words")
    (folder / "training.json").write_text("{}")
    assert tokenizer_digest(folder) == digests[-1]


def test_all_files_of_the_tokenizer_classes_are_known(tmp_path):
    """`VOCAB_FILES_NAMES` of every class that transformers has."""
    names = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for block in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL | re.MULTILINE):
            names |= set(re.findall(r'": "([^"]+)"', block))
    assert {"sentencepiece.bpe.model", "tokenizer.json"} <= names
    for name in names:
        (tmp_path / name).write_text("x")
    known = {path.name for pattern in (*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES) for path in tmp_path.glob(pattern)}
    assert names - known == set()
