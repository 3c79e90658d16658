"""The position-bias picture: a file that a browser shows as it is."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from demo.ablation.bias_plot import main, plot

pytestmark = pytest.mark.unit

SVG = "{http://www.w3.org/2000/svg}"


def test_a_line_for_each_and_higher_is_more() -> None:
    root = ET.fromstring(plot({"a < b": [1.0, 0.5, 0.25, 0.0], "c": [0.0, 0.0, 0.0, 0.0]}))
    first, second = (line.attrib["points"].split() for line in root.iter(f"{SVG}polyline"))
    heights = [float(point.split(",")[1]) for point in first]
    assert heights == sorted(heights) and heights[-1] == float(second[0].split(",")[1])
    assert {"a < b", "c"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_from_score_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {f"position_bias, quarter {number}": {"value": 1 / number} for number in (1, 2, 3, 4)}
    (tmp_path / "scores.json").write_text(json.dumps({"scenes": {"overall": {"value": 0.5}, **figures}}))
    main(["--scores", f"mine={tmp_path}/scores.json", "--out", str(tmp_path / "bias.svg")])
    (line,) = ET.parse(tmp_path / "bias.svg").getroot().iter(f"{SVG}polyline")
    assert len(line.attrib["points"].split()) == 4
    (tmp_path / "none.json").write_text(json.dumps({"scenes": {"overall": {"value": 0.5}}}))
    with pytest.raises(SystemExit):
        main(["--scores", f"mine={tmp_path}/none.json", "--out", str(tmp_path / "bias.svg")])
    assert "has no position_bias figures" in capsys.readouterr().err
