"""The README.md of a trained encoder, written from its `training.json` and nothing else."""

from __future__ import annotations

from typing import Any

from demo.world.language import HELD_OUT_SEEDS, INSTRUCTION, TRAIN_SEEDS

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# {name}

A tiny decoder-only language model of the lidit demo's closed world (coloured shapes on a plain background). It stands
in for {stands_for} where the demo and the tests need a prompt encoder that is small, real and free of downloads. It
knows about scenes and nothing else.

| | |
|---|---|
| class | `{architecture}` |
| blocks, width, heads (key/value heads) | {layers}, {width}, {heads} ({kv_heads}) |
| vocabulary | {vocabulary} tokens, byte-level BPE, {bos} |
| context | {context} tokens (trained on rows of {row_length}) |
| parameters | {parameters:,} (embeddings tied) |
| weights | bfloat16, {weight_bytes:,} bytes, sha256 `{sha256}` |

## Training
{what}

| | |
|---|---|
| data | texts about scenes of seeds {train_first:,} to {train_last:,}, drawn anew at every step |
| steps | {steps:,}, each of {rows} rows of {row_length} tokens ({tokens:,} token slots in all) |
| optimiser | Muon (matrices), AdamW (the rest), bfloat16 autocast |
| learning rate | peak {learning_rate}, warm-up {warmup_steps} steps, {falls} |
| seed | {seed} |
| wall time | {seconds:.0f} s on {threads} CPU thread(s) |
| training loss, mean of the last steps | {loss:.4f} nats per weighted token |

Made by `python -m demo.models.train_encoders`, which also wrote this card and `training.json` beside it.

## Figures
Measured on the saved bfloat16 weights, on scenes of seeds {held_first:,} and up, never trained on.

Perplexity per held-out caption token ({captions} captions, {setting}): **{perplexity:.3f}**

Exact answers by greedy decoding, {per_kind} held-out tasks of each kind ({asked}):

{accuracy}
"""

WHAT = {
    "base": "Next token on plain text: dense captions, short captions, and a few of the poor texts found with images.",
    "tuned": (
        "Continues from `{family}-base` on dialogues in the chat template saved with the tokenizer: an inventory of a "
        "caption under the system message `{instruction}`, and questions about a caption. Loss weight 1 on answers, "
        "{context_weight} elsewhere."
    ),
}
SETTING = {
    "base": "bare caption",
    "tuned": "caption as the user's message under the instruction",
}
ASKED = {
    "base": "as lines of plain text; this variant never saw a question",
    "tuned": "in the chat template",
}
SCHEDULES = {
    "cosine": "then cosine",  # an earlier recipe
    "trapezoid": "linear fall over the last third",
}
STANDS_FOR = {"llama": "a LLaMA-3-class encoder", "qwen": "a Qwen-class encoder"}


def model_card(record: dict[str, Any], base: dict[str, Any] | None) -> str:
    """The card of the encoder of `record`; a tuned one is set against `base`, the record it continued from."""
    variant, family, figures = record["variant"], record["family"], record["figures"]
    return CARD.format(
        **{key: value for key, value in (record | record["config"]).items() if key not in ("figures", "config")},
        bos="starts with `<s>`" if family == "llama" else "no BOS token",
        stands_for=STANDS_FOR[family],
        what=WHAT[variant].format(family=family, instruction=INSTRUCTION, context_weight=record["context_weight"]),
        tokens=record["config"]["steps"] * record["config"]["rows"] * record["config"]["row_length"],
        train_first=TRAIN_SEEDS[0],
        train_last=TRAIN_SEEDS[-1],
        held_first=HELD_OUT_SEEDS[0],
        captions=record["exam"]["captions"],
        per_kind=record["exam"]["tasks_per_kind"],
        setting=SETTING[variant],
        falls=SCHEDULES[record["config"]["schedule"]],
        asked=ASKED[variant],
        perplexity=figures["perplexity"],
        accuracy=accuracy_table(figures, base["figures"] if base else None),
    )


def accuracy_table(figures: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Rows of kinds, a column for this encoder and, if given, one for the base it continued from."""
    rows = [*figures["accuracy"], "mean"]
    columns = [("this encoder", figures)] + ([("its base", base)] if base else [])
    lines = ["| task | " + " | ".join(title for title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in rows:
        shares = [held["mean_accuracy"] if kind == "mean" else held["accuracy"][kind] for _, held in columns]
        lines.append(f"| {kind} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)
