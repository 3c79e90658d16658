"""Filters: each does what its docstring says, is off by default, and knows real captions from what is none."""

import json
import time

import pytest

from pipelines.ingestion.filters import FiltersConfig, caption_kind

pytestmark = pytest.mark.unit


def test_nothing_is_filtered_by_default():
    filters = FiltersConfig()
    assert filters.size(1, 100_000) is None and filters.score(None) is None
    assert all(filters.caption(text) is None for text in (None, "", "https://example.com/a.jpg", "IMG_1.jpg"))


@pytest.mark.parametrize(
    "options, height, width, verdict",
    [
        ({"min_side": 256}, 256, 300, None),
        ({"min_side": 256}, 300, 255, "min_side"),
        ({"min_aspect": 0.5}, 100, 50, None),
        ({"min_aspect": 0.5}, 101, 50, "min_aspect"),
        ({"max_aspect": 2.0}, 50, 100, None),
        ({"max_aspect": 2.0}, 50, 101, "max_aspect"),
        ({"min_aspect": 0.5, "max_aspect": 2.0}, 80, 100, None),
    ],
)
def test_size(options, height, width, verdict):
    assert FiltersConfig(**options).size(height, width) == verdict


def test_score():
    filters = FiltersConfig(min_score=5.0)
    assert [filters.score(value) for value in (5.0, 6.1, 4.99, None, float("nan"))] == [
        None,
        None,
        "min_score",
        "no_score",
        "min_score",
    ]


def test_caption_length_counts_without_edge_spaces():
    filters = FiltersConfig(min_caption=5, max_caption=10)
    assert filters.caption("  abcd  ") == "min_caption" and filters.caption(" abcde ") is None
    assert filters.caption("a" * 11) == "max_caption" and filters.caption("a" * 10 + "  ") is None
    assert filters.caption(None) is None, "no caption is no bad caption"


def test_only_the_kinds_that_are_asked_for_count():
    assert FiltersConfig(captions=["url"]).caption("IMG_2034.jpg") is None
    assert FiltersConfig(captions=["url", "file_name"]).caption("IMG_2034.jpg") == "file_name"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"min_side": 0}, "min_side: expected a whole number >= 1 or null, received 0"),
        ({"max_aspect": -1.0}, "max_aspect: expected a number > 0 or null"),
        ({"min_aspect": 2.0, "max_aspect": 1.0}, "min_aspect <= max_aspect, received 2.0 and 1.0"),
        ({"min_caption": 9, "max_caption": 3}, "min_caption <= max_caption"),
        ({"captions": ["urls"]}, "any of url, file_name, tag_list; received 'urls'"),
        ({"near_duplicates": 12}, "filters.near_duplicates: expected a whole number >= 0 and <= 11"),
        ({"near_duplicates": -1}, "filters.near_duplicates: expected a whole number >= 0 and <= 11"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        FiltersConfig(**options)


KINDS = {
    "url": [
        "https://example.com/gallery/74491/star.png",
        "http://t.co/x",
        "www.photos.example/a b",
        "shop-online.com",
        "Image via https://images.example.org/1.jpg",
        " HTTPS://EXAMPLE.COM ",
    ],
    "file_name": [
        "IMG_2034.JPG",
        "IMG_2034",
        "DSC01234.jpeg",
        "DSCN 0042",
        "Screenshot 2021-03-04 at 10.11.12",
        "red car.jpg",
        "scan_0960.png",
        "20190817_123456",
        "a1b2c3d4e5f6",
        "Untitled-3",
        "photo (12).webp",
        "product-image-300x200.png",
        "Lebenslauf.pdf",
    ],
    "tag_list": [
        "green, square, dotted, blue, diamond, vector, clipart, free, 4k",
        "1girl, solo, long hair, blue eyes, school uniform",
        "wallpaper | nature | mountain | lake | 4k",
        "#sunset #beach #travel #nofilter",
        "wow #sunset #beach #travel #nofilter #sea",
        "猫、狗、房子、树、天空",
        "cat; dog; house; tree.",
    ],
    None: [
        "",
        "a dog",
        "bench",
        "Boeing 747",
        "F-16",
        "A red, blue, green, yellow and white flag",
        "a small red circle, a large blue square, a green star and a cat",
        "Two dogs, one cat and a bird sit on a bench, all of them asleep.",
        "The file was saved as holiday picture number one.jpg",
        "Visit https://example.com to see how the red boat left the harbour",
        "a photo of 12345678 people",
        "一只猫坐在红色的椅子上，看着窗外的雨。",
        "Paris, France",
        "New York, USA, 1965",
        "Hello, world, it is me!",
        "cafe.",
        "Section 3.2",
        "node.js",
    ],
}


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, texts in KINDS.items() for text in texts])
def test_kinds_of_captions(kind, text):
    assert caption_kind(text) == kind


def test_real_captions_and_prompts_are_none_of_it(data):
    """175 human captions, 1,632 PartiPrompts, 2,400 of T2I-CompBench, 553 of GenEval, 200 dense ones: not one is hit."""
    notes = json.loads((data / "coco-mini-cc" / "captions.json").read_text())["annotations"]
    texts = [note["caption"] for note in notes]
    parti = (data / "parti" / "PartiPrompts.tsv").read_text().splitlines()[1:]
    texts += [line.split("\t")[0] for line in parti]
    for path in (data / "t2i-compbench" / "dataset").glob("*_val.txt"):
        texts += path.read_text().splitlines()
    texts += (data / "geneval" / "generation_prompts.txt").read_text().splitlines()
    texts += (data / "drawbench" / "drawbench_upsampled.txt").read_text().splitlines()
    assert len(texts) > 4900
    assert [(caption_kind(text), text) for text in texts if caption_kind(text)] == []


@pytest.mark.parametrize("part", ["a.", "-a", " ", "\n \t", "a.com.", "www.a", ", ", "#a ", "a-1_"])
def test_no_caption_takes_long(part):
    """A million characters that patterns might try from every place: four times as many take about four times as long."""
    seconds = []
    for repeats in (50_000, 200_000):
        text = "x" + part * repeats + "x"
        start = time.process_time()
        caption_kind(text)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 8 * seconds[0] + 0.5
