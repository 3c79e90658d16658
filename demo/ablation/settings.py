"""The rows of the paper's tables 2 to 6 as settings of the demo's models: which encoders, and what of the model differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lidit.frozen.text import PAPER_INSTRUCTION, EncoderConfig

ROOT = Path(__file__).resolve().parent.parent.parent


def encoder(family: str, tuned: bool, instruction: bool) -> EncoderConfig:
    """A demo LLM: base or tuned, with or without the instruction before the prompt; named after that."""
    kind = "tuned" if tuned else "base"
    return EncoderConfig(
        name=f"{family}_{kind}_{'instruction' if instruction else 'prompt'}",
        model=str(ROOT / "demo" / "encoders" / f"{family}-{kind}"),
        instruction=PAPER_INSTRUCTION if instruction else "",
        template="chat" if tuned else "plain",
        dtype="fp32",
    )


@dataclass(frozen=True)
class Setting:
    """A row of the paper's tables."""

    name: str
    encoders: tuple[EncoderConfig, ...]
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `LIDiTConfig` that differ from its defaults."""
    paper: tuple[float, float] | None = None
    """What the paper measured: mean of T2I-CompBench's attributes, DPG-Bench."""


T5 = EncoderConfig("t5_base", str(ROOT / "demo" / "encoders" / "t5-base"), instruction="", dtype="fp32")
BASE, TUNED = encoder("llama", False, False), encoder("llama", True, False)
INSTRUCTED, QWEN = encoder("llama", True, True), encoder("qwen", True, True)
DIRECT = {"refiner_blocks": 0}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("encoder_only", (T5,), DIRECT, (48.82, 73.56)),
        Setting("encoder_only_refiner", (T5,), {}, (49.52, 74.63)),
        Setting("llm_alone", (BASE,), DIRECT, (38.72, 66.15)),
        Setting("tuned", (TUNED,), DIRECT, (44.22, 71.81)),
        Setting("tuned_instruction", (INSTRUCTED,), DIRECT, (48.41, 73.45)),
        Setting("base_instruction", (encoder("llama", False, True),), DIRECT, (38.47, 65.84)),
        Setting("refiner_causal", (BASE,), {"refiner_attention": "causal"}, (45.84, 71.01)),
        Setting("refiner_full", (BASE,), {}, (54.02, 77.08)),
        Setting("refiner_1_block", (BASE,), {"refiner_blocks": 1}, (48.25, 73.83)),
        Setting("refiner_3_blocks", (BASE,), {"refiner_blocks": 3}, (55.13, 77.65)),
        Setting("refiner_no_gate", (BASE,), {"refiner_gate": False}, (53.47, 76.68)),
        Setting("llama_full", (INSTRUCTED,), {}, (56.79, 78.62)),
        Setting("qwen_full", (QWEN,), {}, (56.13, 78.49)),
        Setting("both_concat", (INSTRUCTED, QWEN), {"fusion": "concat"}, (58.32, 79.04)),
        Setting("both_collaborative", (INSTRUCTED, QWEN), {}, (60.31, 80.25)),
    )
}

COMPARISONS = (
    ("encoder_only", "llm_alone"),
    ("encoder_only_refiner", "encoder_only"),
    ("refiner_full", "llm_alone"),
    ("refiner_full", "refiner_causal"),
    ("refiner_full", "refiner_1_block"),
    ("refiner_3_blocks", "refiner_full"),
    ("refiner_full", "refiner_no_gate"),
    ("tuned", "llm_alone"),
    ("tuned_instruction", "tuned"),
    ("base_instruction", "llm_alone"),
    ("llama_full", "refiner_full"),
    ("both_concat", "llama_full"),
    ("both_collaborative", "both_concat"),
)
"""Pairs of settings whose difference the paper draws a conclusion from."""
