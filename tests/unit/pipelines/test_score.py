"""The score stage and its metrics without Ray."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from demo.prompts import exam_prompts, plain_scene
from demo.scenes import render
from lidit import columns
from pipelines.pool import ActorsConfig
from pipelines.score import ScoreConfig, ScoreImages, Scores
from pipelines.score_clip import ClipScore
from pipelines.score_fid import Moments, frechet_distance, moments, open_features
from pipelines.score_intervals import estimate, mean_of_means
from pipelines.score_scenes import Scenes

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
    figures = Scenes.summarise(rows)
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
    figures = Scenes.summarise(rows)
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


def test_frechet_distance_of_gaussians_that_are_known():
    draw = np.random.default_rng(0)
    first, second = Moments(), Moments()
    scale = np.array([1.0, 2.0, 0.5])
    values = draw.standard_normal((200_000, 3))
    for part in np.array_split(values, 7):
        first.add(part)
        second.add(part * scale + [1.0, 0, -2])
    expected = 5 + ((scale - 1) ** 2).sum()  # of diagonal covariances: squared differences of means and deviations
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(first.covariance, np.cov(values.T), atol=1e-9)


def test_frechet_distance_needs_two_images():
    one = Moments()
    one.add(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(one, one)


def test_fid_features_grow_with_noise(clip_folder):
    features = open_features(clip_folder, "cpu")
    clean = [np.asarray(render(plain_scene(seed), 48, 48)) for seed in range(24)]
    draw = np.random.default_rng(0)

    def noisy(level):
        return [np.clip(image + draw.normal(0, level, image.shape), 0, 255).astype(np.uint8) for image in clean]

    real = moments(iter([clean[:10], clean[10:]]), features)
    assert real.count == 24
    small, large = (frechet_distance(real, moments(iter([noisy(level)]), features)) for level in (10, 80))
    assert 0 <= small < large


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
    scores = Scores("s", {"scenes": {"overall": figure}, "fid": {"value": 12.5}}, None)
    assert "overall" in scores.to_text() and "[0.400, 0.600]" in scores.to_text()
    assert json.loads(scores.to_json())["scores"]["fid"]["value"] == 12.5


def test_config_refuses_unknown_metrics():
    with pytest.raises(ValueError, match="metrics: expected some of"):
        ScoreConfig(metrics=("psnr",))
