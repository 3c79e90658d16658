"""The score stage and its metrics without Ray."""

import hashlib
import io
import json
import shutil

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from demo.plugins import SceneMetric
from demo.world.prompts import exam_prompts, plain_scene
from demo.world.scenes import render
from lidit.store import columns
from pipelines.engine.pool import ActorsConfig
from pipelines.evaluation.clip import ClipScore
from pipelines.evaluation.fid import open_distance, open_features, result, update
from pipelines.evaluation.intervals import estimate, mean_of_means, wilson
from pipelines.score import ScoreConfig, ScoreImages, ScoreResult, main

pytestmark = pytest.mark.unit

CPU = ActorsConfig(num_gpus=0.0)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of transformers' own class, random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPVisionConfig,
        PreTrainedTokenizerFast,
    )

    words = ["<start>", "<end>", "red", "blue", "circle", "square", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<end>"
    )
    common = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, eos_token_id=1, bos_token_id=0, **common)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **common)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, fast).save_pretrained(folder)
    return str(folder)


def table_window(images, **texts):
    return pa.RecordBatch.from_pydict({columns.IMAGE: images, **texts}, pa.schema(
        [(columns.IMAGE, pa.large_binary()), *((name, pa.string()) for name in texts)]
    ))  # fmt: skip


def test_scenes_columns_of_good_empty_and_damaged_rows():
    scene = plain_scene(1_000_000)
    record = {
        "tag": "two_object", "prompt": "x",
        "include": [{"class": group.shape, "count": group.count} for group in scene.groups],
    }  # fmt: skip
    stage = ScoreImages(ScoreConfig(actors=CPU))
    window = table_window(
        [png(render(scene, 48, 48)), None, b"no image", png(render(scene, 48, 48))],
        prompt_record=[json.dumps(record), json.dumps(record), json.dumps(record), '{"prompt": "x"}'],
    )
    names = [field.name for field in stage.writes(stage.config)]
    made = stage(window, names)
    assert made.arrays["scenes_correct"].to_pylist() == [True, None, None, None]
    assert made.errors.keys() == {2} and "image" in made.errors[2]
    seen = json.loads(made.arrays["scenes_seen"].to_pylist()[3])
    assert seen["background"] == scene.background and len(seen["objects"]) == len(scene.objects)


def test_scenes_summary_has_the_six_tasks_and_their_mean():
    rows = []
    for record in exam_prompts(6):
        for image in range(2):
            right = record["tag"] != "position" and image == 0
            rows.append(
                {
                    "scenes_correct": right,
                    "scenes_strict": False,
                    "scenes_found": json.dumps([right]),
                    "prompt_record": json.dumps(record),
                }
            )
    figures = SceneMetric.summarise(rows)
    assert figures["counting"]["value"] == 0.5 and figures["position"]["value"] == 0
    assert figures["overall"]["value"] == pytest.approx(5 / 12)
    assert figures["overall (strict)"]["value"] == 0
    assert figures["counting"]["prompts"] == 6 and figures["counting"]["images"] == 12


def test_position_bias_is_told_by_quarter():
    record = {"tag": "position_bias", "prompt": "p", "include": [{}] * 4}
    rows = [
        {
            "scenes_correct": False,
            "scenes_strict": False,
            "scenes_found": json.dumps(found),
            "prompt_record": json.dumps({**record, "prompt": str(number)}),
        }
        for number, found in enumerate([[True, True, False, False], [True, False, False, False]])
    ]
    figures = SceneMetric.summarise(rows)
    assert [figures[f"position_bias, quarter {quarter}"]["value"] for quarter in (1, 2, 3, 4)] == [1, 0.5, 0, 0]


def test_clip_score_is_the_cosine_of_its_features(clip_folder):
    from transformers import AutoProcessor, CLIPModel

    config = ScoreConfig(metrics=("clip_score",), clip=clip_folder, actors=CPU, batch_size=2)
    images = [np.asarray(render(plain_scene(seed), 48, 48)) for seed in range(3)]
    prompts = ["a red circle", "blue square", "a " * 40]
    scores = ClipScore(config, "cpu")(images, prompts)["clip_score"]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), AutoProcessor.from_pretrained(clip_folder)
    for image, prompt, score in zip(images, prompts, scores):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            out = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds).item()
        assert score == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
    with pytest.raises(ValueError, match="expected --clip"):
        ScoreImages.writes(ScoreConfig(metrics=("clip_score",), actors=CPU))


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def test_fid_of_features_that_are_known(tmp_path):
    """A network whose features are the three channels' means: distances of two Gaussians can be written down."""

    network = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(network))
    digest = hashlib.sha256(network.read_bytes()).hexdigest()
    draw = np.random.default_rng(0)
    values = draw.normal(100, 10, (4000, 3)).round()
    moved = values * [1, 2, 0.5] + [20, -50, 30]

    def images(colours):
        return [np.full((2, 2 + index % 2, 3), colour).astype(np.uint8) for index, colour in enumerate(colours)]

    distance = open_distance(open_features(f"{network}@sha256:{digest}"))
    for part in np.array_split(values, 7):
        update(distance, images(part), real=True)
    update(distance, images(np.floor(moved)), real=False)
    found = result(distance)
    means = values.mean(0) - np.floor(moved).mean(0)
    expected = means @ means + 100 * (0 + 1 + 0.25)  # of diagonal covariances: squared differences of the deviations
    assert found == {"value": pytest.approx(expected, rel=0.02), "features": 3, "generated": 4000, "real": 4000}


class Writes(torch.nn.Module):
    """A feature network that writes a file as soon as it is asked."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (
            torch.from_file(self.path, shared=True, size=images.shape[0], dtype=torch.float32).fill_(1.0).unsqueeze(1)
        )


def test_a_feature_network_is_run_only_with_its_digest(tmp_path):
    network, written = tmp_path / "features.pt", tmp_path / "written"
    torch.jit.script(Writes(str(written))).save(str(network))
    digest = hashlib.sha256(network.read_bytes()).hexdigest()
    for model in (f"{network}", f"{network}@sha256:{'0' * 64}", f"{network}@{digest}"):
        config = ScoreConfig(
            store=str(tmp_path), metrics=("fid",), fid_model=model, fid_reference=str(tmp_path), actors=CPU
        )
        with pytest.raises(ValueError, match=f"fid_model {network}.*{digest}"):
            main(config)
        assert not written.exists()
    open_features(f"{network}@sha256:{digest}")(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert written.exists(), "the network of this test does nothing"


def test_fid_of_a_store_says_under_which_features(tmp_path):
    network = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(network))
    digest = f"sha256:{hashlib.sha256(network.read_bytes()).hexdigest()}"
    store = {columns.IMAGE_ID: [], columns.IMAGE: []}
    for seed in range(6):
        store[columns.IMAGE_ID].append(str(seed))
        store[columns.IMAGE].append(png(render(plain_scene(seed), 48, 48)))
    lance.write_dataset(pa.table(store), str(tmp_path / columns.SAMPLES_TABLE))
    (tmp_path / "scores.json").write_text(json.dumps({"scenes": {"overall": 1.0}}))
    made = main(
        ScoreConfig(
            store=str(tmp_path),
            metrics=("fid",),
            fid_model=f"{network}@{digest}",
            fid_reference=str(tmp_path),
            actors=CPU,
        )
    )
    assert made.scores["fid"]["value"] == pytest.approx(0, abs=1e-6) and made.scores["fid"]["model"] == digest
    assert digest in made.to_text() and json.loads(made.to_json())["scores"]["fid"]["model"] == digest
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert kept == {"scenes": {"overall": 1.0}, **made.scores}


def test_fid_needs_two_images():
    distance = open_distance(Means())
    update(distance, [np.zeros((2, 2, 3), np.uint8)], real=True)
    with pytest.raises(ValueError, match="at least 2 images on each side, received 0 generated and 1 real"):
        result(distance)


def test_fid_of_a_clip_grows_with_noise(clip_folder):
    clean = [np.array(render(plain_scene(seed), 48, 48)) for seed in range(24)]
    draw = np.random.default_rng(0)

    def distance_at(level):
        distance = open_distance(open_features(clip_folder))
        update(distance, clean[:10], real=True)
        update(distance, clean[10:], real=True)
        noisy = [np.clip(image + draw.normal(0, level, image.shape), 0, 255).astype(np.uint8) for image in clean]
        update(distance, noisy, real=False)
        found = result(distance)
        assert found["real"] == found["generated"] == 24
        return found["value"]

    assert -1e-6 <= distance_at(10) < distance_at(80)


def test_intervals_cover_and_shrink():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        groups = {str(number): list(draw.random(4) < 0.6) for number in range(60)}
        found = estimate(groups)
        covered += found.low <= 0.6 <= found.high
    assert covered >= 85
    few, many = ({str(n): [float(n % 2)] for n in range(count)} for count in (10, 1000))
    assert estimate(many).high - estimate(many).low < (estimate(few).high - estimate(few).low) / 3
    both = mean_of_means({"one": {"a": [1.0]}, "two": {"b": [0.0], "c": [0.0]}})
    assert both.value == 0.5 and both.images == 3
    none, all_ = (estimate({str(number): [value] for number in range(20)}) for value in (0.0, 1.0))
    assert (none.low, none.high) == pytest.approx((0, 0.161), abs=1e-3)
    assert (all_.low, all_.high) == pytest.approx((0.839, 1), abs=1e-3)
    with pytest.raises(ValueError, match="at least one image"):
        estimate({})


def test_scores_as_text_and_json():
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "prompts": 3, "images": 12}
    scores = ScoreResult("s", {"scenes": {"overall": figure}, "fid": {"value": 12.5}}, None)
    assert "overall" in scores.to_text() and "[0.400, 0.600]" in scores.to_text()
    assert json.loads(scores.to_json())["scores"]["fid"]["value"] == 12.5


OWN = """
import pyarrow as pa
from pipelines.evaluation.metric import Metric


class Brightness(Metric):
    name, reads, fields = "brightness", "prompt", {"brightness": pa.float64()}

    def __init__(self, config, device):
        pass

    @classmethod
    def fingerprint(cls, config):
        return {}

    def __call__(self, images, texts):
        return {"brightness": [float(image.mean()) for image in images]}

    @classmethod
    def summarise(cls, rows):
        return {"mean": sum(row["brightness"] for row in rows) / len(rows)}
"""


def test_a_metric_of_ones_own(tmp_path, monkeypatch, photo):
    (tmp_path / "own_metrics").mkdir()
    (tmp_path / "own_metrics" / "light.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = ScoreConfig(store=str(tmp_path), metrics=("own_metrics.light:Brightness",))
    (field,) = ScoreImages.writes(config)
    window = pa.record_batch({"image": pa.array([photo(1), photo(2)], pa.large_binary())})
    made = ScoreImages(config)(window, [field.name])
    assert field.name == "brightness" and all(0 < value < 255 for value in made.arrays["brightness"].to_pylist())


def test_config_refuses_unknown_metrics():
    with pytest.raises(ValueError, match="metrics: expected one of scenes, clip_score, fid, or package"):
        ScoreConfig(metrics=("psnr",))


@pytest.mark.parametrize(
    ("file", "key"),
    [("config.json", "model_config"), ("tokenizer.json", "tokenizer"), ("processor_config.json", "processor")],
)
def test_clip_score_knows_all_that_its_values_depend_on(clip_folder, tmp_path, file, key):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    before = ClipScore.fingerprint(ScoreConfig(metrics=("clip_score",), clip=str(folder), actors=CPU))
    assert before == ClipScore.fingerprint(ScoreConfig(metrics=("clip_score",), clip=clip_folder, actors=CPU))
    name = file if (folder / file).is_file() else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "other": 1}))
    after = ClipScore.fingerprint(ScoreConfig(metrics=("clip_score",), clip=str(folder), actors=CPU))
    assert {name for name in before if before[name] != after[name]} == {key}


def test_wilson():
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-3))
    assert wilson(50, 100) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
