"""What is loaded from a model folder: by one way, which runs no code of the folder, whoever answers on the terminal."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from lidit.frozen.loading import load_config, load_model, load_tokenizer

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[4]
ALLOWED = {
    ("lidit/frozen/loading.py", "loader"): "the one way",
    ("lidit/frozen/vae.py", "getattr(diffusers, kind)"): "a class of a fixed list; diffusers runs no code of a folder",
    ("lidit/sample.py", "TextToImage"): "our own",
    ("pipelines/generate.py", "TextToImage"): "our own",
}  # fmt: skip
CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import {base}
class Own({base}):
    model_type = "own"
"""


def test_nothing_else_loads():
    found = {}
    for folder in ("lidit", "pipelines", "trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "pipeline"):
                    found[str(path.relative_to(ROOT)), ast.unparse(node.value)] = node.lineno
    assert found.keys() == ALLOWED.keys(), {key: line for key, line in found.items() if key not in ALLOWED}


@pytest.fixture
def hostile(llama_folder, tmp_path, edit_json):
    """`hostile(part)`: a model folder, a part of which wants code of its own; and the file that the code would write."""

    def make(part):
        folder, mark = tmp_path / part, tmp_path / f"ran-{part}"
        shutil.copytree(llama_folder, folder)
        base = {"config": "LlamaConfig", "tokenizer": "PreTrainedTokenizerFast", "model": "LlamaModel"}[part]
        (folder / "own.py").write_text(CODE.format(mark=str(mark), base=base))
        if part == "tokenizer":
            edit_json(
                folder / "tokenizer_config.json",
                tokenizer_class="Own",
                auto_map={"AutoTokenizer": [None, "own.Own"]},
            )
        elif part == "config":
            edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
        else:
            names = ("AutoModel", "AutoModelForCausalLM")
            edit_json(folder / "config.json", auto_map=dict.fromkeys(names, "own.Own"))
        return folder, mark

    return make


@pytest.mark.parametrize("part", ["config", "tokenizer", "model"])
def test_code_of_a_folder_does_not_run_though_somebody_says_yes(part, hostile):
    """As `yes | lidit ...`, through the encoder, the independent path of verify and the captioner."""
    folder, mark = hostile(part)
    script = (
        "import sys\n"
        "from pipelines.captioning.transformers_engine import Captioner, VlmConfig\n"
        "from lidit.frozen.text import EncoderConfig, PromptEncoder\n"
        "from pipelines.verify import PlainEncoder\n"
        "config = EncoderConfig('one', sys.argv[1], template='plain', dtype='fp32')\n"
        "for use in (lambda: PromptEncoder(config, 'cpu').model, lambda: PlainEncoder(config),\n"
        "            lambda: Captioner(VlmConfig(sys.argv[1]), 9, 9, 9, 'cpu').load()):\n"
        "    try:\n"
        "        use()\n"
        "    except ValueError as error:\n"
        "        print('refused', type(error).__name__)\n"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), "the folder's code ran"
    if part == "config":
        assert done.stdout.count("refused") == 3


def test_a_refusal_says_that_no_code_is_run(hostile):
    folder, _ = hostile("config")
    with pytest.raises(
        ValueError, match=r"expected a config that this version of transformers has a class for .code that comes"
    ):
        load_config(folder)


def test_what_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_clip_of_fewer_tensors_is_no_model(tmp_path):
    """Such as one whose shard is missing: transformers would draw the rest at random."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path)
    assert load_model(transformers.CLIPModel, tmp_path).projection_dim == 8
    state = {name: weight for name, weight in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"do not fit.*1 tensors are missing.*visual_projection\.weight"):
        load_model(transformers.CLIPModel, tmp_path)
