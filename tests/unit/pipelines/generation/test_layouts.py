"""Layouts, against the real prompt files where there are such: names, counts, metadata."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipelines.generation.layouts import LAYOUTS, UNFINISHED, image_files, write_layout
from pipelines.generation.prompt_sets import Prompt, pictures, read_prompts

pytestmark = pytest.mark.unit


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def of_layout(layout, prompts, images=None):
    count = images or LAYOUTS[layout].images_per_prompt
    return pictures("set", prompts, count, LAYOUTS[layout].seed), count


def reader(wanted):
    place = {one.image_id: number for number, one in enumerate(wanted)}
    return lambda ids: {one: png(place[one]) for one in ids}


def write(layout, out, prompts, images=None):
    wanted, count = of_layout(layout, prompts, images)
    return write_layout(layout, out, wanted, count, reader(wanted))


def some(*texts):
    return [Prompt(number, text, {"prompt": text}, str(number)) for number, text in enumerate(texts)]


def test_geneval_of_the_real_metadata(data, tmp_path):
    source = data / "geneval" / "evaluation_metadata.jsonl"
    lines = source.read_text().splitlines()
    prompts = read_prompts(str(source))
    assert write("geneval", tmp_path, prompts) == 553 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{index:05d}" for index in range(553)]
    for index in (0, 7, 552):
        folder = tmp_path / f"{index:05d}"
        assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"{k:05d}.png" for k in range(4)]
        (line,) = (folder / "metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == json.loads(lines[index])
        assert (folder / "samples" / "00002.png").read_bytes() == png(4 * index + 2)
    assert {path.name for path in (tmp_path / "00000").iterdir()} == {"metadata.jsonl", "samples"}


def test_t2i_compbench_of_the_real_colour_prompts(data, tmp_path):
    source = data / "t2i-compbench" / "dataset" / "color_val.txt"
    texts = source.read_text().splitlines()
    assert write("t2i-compbench", tmp_path, read_prompts(str(source))) == 3000
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert len(names) == 3000 and {path.name for path in tmp_path.iterdir()} == {"samples"}
    ids = sorted(int(name.removesuffix(".png").rpartition("_")[2]) for name in names)
    assert ids == list(range(3000))
    for name in names[::100]:  # as the scorer takes them apart
        number = int(name.removesuffix(".png").rpartition("_")[2])
        assert name.partition("_")[0] == texts[number // 10]


def test_seeds_are_those_that_the_benchmarks_ask_for():
    wanted, _ = of_layout("t2i-compbench", some("a", "b"))
    assert [one.seed for one in wanted] == [*range(42, 52), *range(42, 52)]
    wanted, _ = of_layout("geneval", some("a"))
    assert [one.seed for one in wanted] == [0, 1, 2, 3]


def test_every_t2i_compbench_validation_file_has_names(data):
    for source in sorted((data / "t2i-compbench" / "dataset").glob("*_val.txt")):
        wanted, count = of_layout("t2i-compbench", read_prompts(str(source)))
        assert len(set(image_files("t2i-compbench", wanted, count))) == len(wanted)


def test_drawbench_of_the_real_file(data, tmp_path):
    assert write("drawbench", tmp_path, read_prompts(str(data / "drawbench" / "drawbench.txt"))) == 200
    assert {path.name for path in tmp_path.iterdir()} == {f"{index}_0.png" for index in range(200)}


def test_dpg_puts_four_images_into_one(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "partiprompts12.txt").write_text("a long prompt\n")
    (folder / "COCOval3.txt").write_text("another one")
    out = tmp_path / "out"
    assert write("dpg", out, read_prompts(str(folder))) == 2
    assert {path.name for path in out.iterdir()} == {"partiprompts12.png", "COCOval3.png"}
    sheet = np.asarray(Image.open(out / "COCOval3.png"))
    assert sheet.shape == (4, 8, 3)
    assert [sheet[0, 0, 0], sheet[0, 4, 0], sheet[2, 0, 0], sheet[2, 4, 0]] == [0, 1, 2, 3]


def test_flat_tells_which_file_is_what(tmp_path):
    write("flat", tmp_path, some("a/b_c", "ü"), images=2)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["00000_00.png", "00000_01.png", "00001_00.png", "00001_01.png"]
    assert lines[3] == {"file": "00001_01.png", "prompt": "ü", "seed": 1}


@pytest.mark.parametrize("text, reason", [("a_b", "without _"), ("a/b", "without _ and /"), ("x" * 260, "too long")])
def test_prompts_that_cannot_be_names(text, reason):
    wanted, count = of_layout("t2i-compbench", some("fine", text))
    with pytest.raises(ValueError, match=reason):
        image_files("t2i-compbench", wanted, count)


def test_a_grid_needs_four_images():
    wanted, count = of_layout("dpg", some("a"), images=3)
    with pytest.raises(ValueError, match="expected 4 images"):
        image_files("dpg", wanted, count)


def test_strange_files_where_the_scorer_reads_everything_are_refused(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        write("t2i-compbench", tmp_path, some("a"))


def test_files_that_are_there_are_left_alone_and_broken_ones_mended(tmp_path):
    write("drawbench", tmp_path, some("a", "b"))
    (tmp_path / "1_0.png").write_bytes(png(1)[:20])
    before = (tmp_path / "0_0.png").stat().st_mtime_ns
    (tmp_path / UNFINISHED).mkdir()
    assert write("drawbench", tmp_path, some("a", "b")) == 2
    assert (tmp_path / "0_0.png").stat().st_mtime_ns == before
    assert (tmp_path / "1_0.png").read_bytes() == png(1)
    assert not (tmp_path / UNFINISHED).exists()


def test_images_that_failed_are_not_counted(tmp_path):
    wanted, count = of_layout("geneval", some("a"))
    read = reader(wanted)
    written = write_layout("geneval", tmp_path, wanted, count, lambda ids: read(ids[1:]))
    assert written == 3 and not (tmp_path / "00000" / "samples" / "00000.png").exists()
