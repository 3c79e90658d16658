"""The probe job: what a ridge reads from vectors, which states it is given, and what it says of a file that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lidit.cli import main
from lidit.frozen.text import EncoderConfig, PromptEncoder
from pipelines import probe
from pipelines.evaluation.linear_probe import _svd, read_labels, split_rows
from pipelines.evaluation.probe_states import Way, pooled_states, ways_of

ROOT = Path(__file__).resolve().parents[3]
LLAMA = EncoderConfig("llama", str(ROOT / "demo" / "encoders" / "llama-tuned"), dtype="fp32")
T5 = EncoderConfig("t5", str(ROOT / "demo" / "encoders" / "t5-base"), dtype="fp32", instruction="")
TEXTS = ["a red circle", "two blue squares above a star", "a cyan cross"]


# -- the maths --------------------------------------------------------------------------------------------------------


def test_a_ridge_reads_what_is_there_and_not_what_is_not():
    rng = np.random.default_rng(0)
    label, noise = rng.integers(4, size=1000), rng.integers(3, size=1000)
    vectors = torch.from_numpy(np.eye(4)[label] @ rng.normal(size=(4, 16)) + 0.1 * rng.normal(size=(1000, 16)))
    split = split_rows([str(row) for row in range(1000)], 0)
    there, absent = read_labels(vectors, [label, noise], split)
    assert there.accuracy > 0.99 and there.classes == 4
    low, high = absent.interval()
    assert low < 1 / 3 + 0.05 and high > 1 / 3 - 0.05 and low < absent.accuracy < high


def test_equal_texts_stay_on_one_side():
    texts = [f"text {row % 100}" for row in range(1000)]
    split = split_rows(texts, 3)
    parts = [{texts[row] for row in rows} for rows in (split.fit, split.choose, split.test)]
    assert sum(map(len, parts)) == 100 and sorted(np.concatenate([split.fit, split.choose, split.test])) == list(
        range(1000)
    )


def test_more_features_than_rows_are_fitted_too():
    rng = np.random.default_rng(1)
    label = rng.integers(2, size=300)
    vectors = torch.from_numpy(rng.normal(size=(300, 600)))
    vectors[:, 0] += torch.from_numpy(6.0 * label)
    assert read_labels(vectors, [label], split_rows([str(row) for row in range(300)], 0))[0].accuracy > 0.7


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_the_decomposition_is_the_svd(shape: tuple[int, int]):
    x = torch.from_numpy(np.random.default_rng(2).normal(size=shape))
    x[:, 3] = x[:, 4]  # less than full rank
    u, s, vh = _svd(x)
    torch.testing.assert_close(u * s @ vh, x)
    torch.testing.assert_close(s.sort(descending=True).values, torch.linalg.svdvals(x)[: len(s)])


# -- the states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, T5])
def test_every_layer_in_one_pass_is_what_the_encoder_gives_by_itself(config: EncoderConfig):
    ways = ways_of(config, "all", (), config is LLAMA, False, "cpu")
    assert len(ways) == (12 if config is LLAMA else 6)
    found = {pooled.way: pooled.vectors for pooled in pooled_states(config, ways, TEXTS, None, 64, "cpu")}
    for way in ways:
        alone = {
            **vars(config),
            "layer_index": way.layers[0],
            "instruction": config.instruction if way.instruction else "",
        }
        embeds, mask = PromptEncoder(EncoderConfig(**alone), "cpu")(TEXTS)
        for row in range(len(TEXTS)):
            mean = embeds[row][mask[row]].mean(dim=0)
            torch.testing.assert_close(found[way]["text"][row], mean, rtol=1e-3, atol=1e-3)


def test_a_part_is_the_mean_of_its_own_tokens():
    spans = [(text.index(word), text.index(word) + len(word)) for text, word in zip(TEXTS, ("circle", "blue", "cross"))]
    way = Way("llama", True, (4,), False)
    *_, pooled = pooled_states(LLAMA, [way], TEXTS, spans, 64, "cpu")
    embeds, _ = PromptEncoder(LLAMA, "cpu")(TEXTS)
    assert PromptEncoder(LLAMA, "cpu").layer == 4
    torch.testing.assert_close(pooled.vectors["part"][1], embeds[1, 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pooled.vectors["last token"][0], embeds[0, 2], rtol=1e-3, atol=1e-3)


def test_the_control_is_of_the_tokens_alone():
    control = next(pooled_states(T5, ways_of(T5, "own", (), True, False, "cpu"), TEXTS, [(0, 1)] * 3, 64, "cpu"))
    assert str(control.way) == "t5: words alone"
    assert (control.vectors["last token"].sum(dim=1) == 1).all() and control.vectors["text"].sum() > 10
    assert not torch.equal(control.vectors["last token"][0], control.vectors["last token"][1])


def test_ways():
    asked = ways_of(LLAMA, [-3, 2], [[2, 3]], True, True, "cpu")
    assert [str(way) for way in asked[:5]] == [
        "llama: layer 4, instruction", "llama: layer 4, instruction, norm", "llama: layer 2, instruction",
        "llama: layer 2, instruction, norm", "llama: mean of layers 2, 3, instruction, norm",
    ]  # fmt: skip
    assert len(asked) == 10 and not any(way.instruction for way in asked[5:])
    with pytest.raises(ValueError, match="layer_index 9"):
        ways_of(LLAMA, [9], (), False, False, "cpu")


# -- the job ----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def truth(count: int = 400) -> list[dict]:
    rng = np.random.default_rng(5)
    colours, shapes = ("red", "blue", "green"), ("circle", "star")
    rows = []
    for number in range(count):
        colour, shape = colours[rng.integers(3)], shapes[rng.integers(2)]
        text = f"a {colour} {shape} on page {number}"
        rows.append(
            {"text": text, "colour": colour, "star": shape == "star", "number": number, "at": [2, 2 + len(colour)]}
        )
    return rows


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_command_ranks_and_says_it_in_json(tmp_path: Path, capfd, ending: str):
    file = write(tmp_path / f"truth.{ending}", truth())
    encoders = json.dumps([{"name": "t5", "model": T5.model, "dtype": "fp32"}])
    assert main(["probe", "--texts", str(file), "--at", "at", "--encoders", encoders, "--layers", "[1, -1]"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert found["ok"] and found["rows"] == 400
    assert {way["pooling"] for way in found["ways"]} == {"text", "last token", "part"}
    assert all(set(way["labels"]) == {"colour", "star"} for way in found["ways"])  # `number` has too many values
    best = next(way for way in found["ways"] if way["pooling"] == "part" and way["layers"])
    assert best["labels"]["colour"]["accuracy"] > 0.95 and best["labels"]["colour"]["low"] > 0.9
    assert "t5: layer 1" in said.err and "words alone" in said.err and "the commonest answer" in said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--texts", "{missing}"], "no file"),
        (["--text", "words"], "expected columns words, found text"),
        (["--labels", "[number]"], "must have 2 to 64 different"),
        (["--at", "colour"], "must be \\[first, last\\)"),
        (["--rows", "20"], "expected texts enough"),
        (["--averages", "[[1]]"], "sets of two"),
        (["--rows", "0"], "rows: expected a whole number >= 1"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, capsys, flags: list[str], said: str):
    import re

    file = write(tmp_path / "truth.jsonl", truth())
    flags = [flag.format(missing=tmp_path / "none.jsonl") for flag in flags]
    encoders = json.dumps([{"name": "t5", "model": T5.model, "dtype": "fp32"}])
    command = ["probe", "--encoders", encoders, *flags]
    assert main(command if "--texts" in flags else [*command, "--texts", str(file)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_subset_by_name():
    config = probe.ProbeConfig("truth.jsonl", encoders=(LLAMA, T5))
    assert config.only(["t5"]).encoders == (T5,)
    with pytest.raises(ValueError, match="not in the config"):
        config.only(["bert"])
