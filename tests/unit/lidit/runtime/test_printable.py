"""Hostile text on its way to a terminal: by every way that leads there."""

import subprocess
import sys
import unicodedata

import pytest

from lidit.cli import main
from lidit.runtime.printable import one_line, printable
from pipelines import verify
from pipelines.engine.summary import Summary
from pipelines.inspection import InspectResult
from pipelines.preprocess import PreprocessResult
from pipelines.report.facts import Facts, Reason
from pipelines.score import ScoreResult

pytestmark = pytest.mark.unit

# A title, a clipboard, a cleared screen, an 8-bit control sequence, a turned reading order, an erased line, half a pair
HOSTILE = "a\x1b]0;title\x07 \x1b]52;c;aGk=\x1b\\ \x1b[2J \x9b31m \u202egnp.exe\u2069 x\ry\x08 \x7f \udc9b \u2028z"


def acting(text):
    """Characters that do something to a terminal, apart from the newlines and tabs of the layout."""
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_what_acts_is_shown():
    assert printable("a\x1b[31mb\x9bc\u202ed\x00\x7f\udc80") == r"a\x1b[31mb\x9bc\u202ed\x00\x7f\udc80"
    assert printable("done\rFAILED") == r"done\rFAILED"
    assert not acting(printable(HOSTILE)) and printable(HOSTILE).encode()


@pytest.mark.parametrize(
    "text", ["", "plain", "lines\n\tand tabs", "ü 猫 ــ", "नम\u200dस्ते", "👩\u200d🚀", "a\u3000b\xa0c"]
)
def test_what_is_only_text_stays(text):
    assert printable(text) == text


def test_a_value_is_one_line():
    assert one_line("a caption\n  errors     none\r\n\x1b[1A") == "a caption errors none \\x1b[1A"


def of_summary():
    counts = {"status_empty": 1, f"filtered_{HOSTILE}": 1}
    return Summary(
        "recaption", HOSTILE, rows=1, errors=1, error_examples=[{"error": HOSTILE}], counts=counts,
        examples={"empty": [HOSTILE]}, plan=[HOSTILE], next=HOSTILE,
    )  # fmt: skip


def of_inspection():
    facts = Facts(HOSTILE, 1, 1, 1, 0, 1, HOSTILE, [], [], [Reason("ingest", HOSTILE, 1, [])], [], [])
    return InspectResult(facts, html=HOSTILE, notes=[HOSTILE])


def of_report():
    report = verify.VerifyResult(HOSTILE, 1)
    report.checks["rows"], report.problems["rows"] = HOSTILE, [HOSTILE]
    return report


MADE = {
    "summary": of_summary,
    "plan": lambda: Summary("embed", "s", dry_run=True, plan=[HOSTILE]),
    "inspection": of_inspection,
    "verify": of_report,
    "score": lambda: ScoreResult(
        "s", {"scenes": {HOSTILE: {"value": 1, "low": 0, "high": 1, "prompts": 1, "images": 1}}}, None
    ),
    "preprocess": lambda: PreprocessResult("s", status="failed", error=HOSTILE),
}


@pytest.mark.parametrize("made", MADE)
def test_the_command_prints_no_caption_that_acts(made, monkeypatch, capsys, whole_job):
    monkeypatch.setattr(verify, "main", lambda config: MADE[made]())
    main(["verify"])
    said = capsys.readouterr().err
    assert r"\x1b]0;title\x07" in said and not acting(said)


@pytest.mark.parametrize("made", ["summary", "plan", "inspection"])
def test_their_text_is_safe_without_the_command(made):
    assert not acting(MADE[made]().to_text())


@pytest.mark.parametrize("made", ["summary", "inspection", "verify"])
def test_a_value_makes_no_line_of_its_own(made, monkeypatch):
    forged = "cat\nverify: nothing wrong found"
    monkeypatch.setitem(globals(), "HOSTILE", forged)
    text = MADE[made]()
    if made == "summary":
        text.plan, text.store, text.next, text.counts = [], "s", "", {"status_empty": 1}
    elif made == "inspection":
        text.html, text.notes, text.facts.uri, text.facts.changed = None, [], "s", "now"
    else:
        text.store, text.checks["rows"] = "s", "rows"
    assert "cat verify: nothing wrong found" in text.to_text() and "\nverify: nothing" not in text.to_text()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, TypeError])
def test_errors_of_servers_and_files(error, monkeypatch, capsys, whole_job):
    def fail(config):
        raise error(HOSTILE)

    monkeypatch.setattr(verify, "main", fail)
    assert main(["verify"]) == (2 if error is ValueError else 1)
    said = capsys.readouterr().err
    assert r"\x1b[2J" in said and not acting(said)


def test_what_is_said_on_the_way():
    """In a process of its own: pytest takes warnings and logs away from a terminal."""
    script = f"""
import dataclasses, logging, sys, types, warnings
from lidit import cli

@dataclasses.dataclass
class Config:
    pass

def work(config):
    text = {HOSTILE!a}
    warnings.warn(text)
    print(text)
    print(text, file=sys.stderr)
    sys.stderr.writelines([text])
    logging.getLogger('of.anybody').warning(text)
    raise TypeError(text)

cli.JOBS["work"] = ("work", "")
sys.modules["work"] = types.SimpleNamespace(main=work)
cli.parse_config = lambda *of_this: Config()
cli.main(["work"])
"""
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120).stdout
    assert said.count(rb"\x1b]0;title\x07") == 6 and not acting(said.decode())
