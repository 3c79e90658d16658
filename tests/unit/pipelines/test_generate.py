"""The generate stage without Ray: one window in, images out; and what it refuses."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lidit.sampler import SamplerConfig
from pipelines.engine.pool import ActorsConfig
from pipelines.generate import GenerateConfig, GenerateImages, check_input, fingerprint, main
from pipelines.generation.prompt_sets import Prompt

pytestmark = pytest.mark.unit

CPU = ActorsConfig(num_gpus=0.0)
FEW = SamplerConfig(num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture
def config(scene_weights, tmp_path):
    def make(**changes):
        values = {"weights": str(scene_weights), "prompt": "a", "sampler": FEW, "actors": CPU, **changes}
        return GenerateConfig(store=str(tmp_path / "generated"), **values)

    return make


@pytest.fixture(scope="module")
def stage(scene_weights):
    return GenerateImages(GenerateConfig(weights=str(scene_weights), prompt="a", sampler=FEW, actors=CPU))


def window(*rows):
    return pa.RecordBatch.from_pydict({"prompt": [row[0] for row in rows], "seed": [row[1] for row in rows]})


def made(stage, *rows):
    names = [field.name for field in stage.writes(stage.config)]
    arrays = stage(window(*rows), names).arrays
    return {name: arrays[name].to_pylist() for name in names}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def some(*texts):
    return [Prompt(number, text, {"prompt": text}, str(number)) for number, text in enumerate(texts)]


def test_columns_say_what_made_the_image(stage):
    columns = made(stage, ("a red circle", 3))
    assert pixels(columns["image"][0]).shape == (16, 24, 3)
    assert (columns["height"], columns["width"]) == ([16], [24])
    assert (columns["guidance_scale"], columns["num_inference_steps"]) == ([2.0], [2])
    assert len(columns["weights_digest"][0]) == 64


def test_an_image_depends_on_prompt_and_seed_alone(stage):
    alone = made(stage, ("a red circle", 3))["image"][0]
    crowd = [(f"a {'very ' * length}long prompt", length) for length in range(5)]
    among = made(stage, *crowd, ("a red circle", 3))["image"][-1]
    assert np.abs(pixels(alone) - pixels(among)).max() <= 1  # rounding of the last of 256 levels
    assert np.abs(pixels(alone) - pixels(made(stage, ("a red circle", 4))["image"][0])).max() > 8
    assert np.abs(pixels(alone) - pixels(made(stage, ("blue squares", 3))["image"][0])).max() > 1


def test_everything_that_changes_an_image_is_in_the_fingerprint(config):
    base = json.dumps(fingerprint(config()), sort_keys=True)
    for changes in (
        {"sampler": SamplerConfig(num_inference_steps=3, guidance_scale=2.0)},
        {"sampler": SamplerConfig(num_inference_steps=2, guidance_scale=3.0)},
        {"height": 32},
    ):
        assert json.dumps(fingerprint(config(**changes)), sort_keys=True) != base
    for changes in ({"batch_size": 3}, {"rows_per_fragment": 7}, {"seed": 9}, {"prompt": "b"}):
        assert json.dumps(fingerprint(config(**changes)), sort_keys=True) == base


def test_prompts_that_are_too_long_are_said_or_cut_and_counted(config):
    prompts = some("a circle", "a circle and " * 40 + "a star")
    with pytest.raises(ValueError, match=r"1 of 2 prompts are longer than the 48 tokens.*prompt 1.*long_prompts cut"):
        check_input(config(), prompts)
    assert check_input(config(long_prompts="cut"), prompts) == 1
    assert check_input(config(), prompts[:1]) == 0


@pytest.mark.parametrize("height, width", [(20, 24), (4, 24), (16, 25)])
def test_sizes_that_cannot_be_made(config, height, width):
    with pytest.raises(ValueError, match="multiples of 8"):
        check_input(config(height=height, width=width), some("a"))


def test_encoders_that_are_not_those_of_training(config):
    with pytest.raises(ValueError, match="encoder llama is not the one"):
        check_input(config(encoders={"llama": "demo/encoders/qwen-tuned"}), some("a"))
    with pytest.raises(ValueError, match="expected names among llama, qwen"):
        check_input(config(encoders={"t5": "demo/encoders/llama-base"}), some("a"))


def test_config_says_what_it_expects(config):
    with pytest.raises(ValueError, match="either --prompts FILE or --prompt"):
        config(prompts="x.txt")
    with pytest.raises(ValueError, match="layout: expected geneval, t2i-compbench, dpg, drawbench or flat"):
        config(layout="coco")
    with pytest.raises(ValueError, match="images_per_prompt: expected a whole number >= 1 or null"):
        config(images_per_prompt=0)
    with pytest.raises(ValueError, match="some words"):
        main(config(prompt="  "))


def test_defaults_are_the_layout_s(config):
    assert (config(layout="t2i-compbench").count, config(layout="t2i-compbench").first_seed) == (10, 42)
    assert (config(layout="geneval").count, config(layout="geneval", seed=7).first_seed) == (4, 7)


def test_a_dry_run_of_a_new_store_changes_nothing(config, tmp_path):
    summary = main(config(prompt="a circle", layout="geneval", dry_run=True))
    assert summary.ok and "1 prompts x 4 images of 16 x 24 pixels" in summary.plan[0]
    assert not (tmp_path / "generated").exists()
