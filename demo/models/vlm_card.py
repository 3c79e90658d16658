"""The README.md of the demo's VLM, written from its `training.json` and nothing else."""

from __future__ import annotations

from typing import Any

from demo.models.vlm_examples import ASPECTS, CLUTTER_SHARE, HINT_SHARE
from demo.models.vlm_model import CONTEXT, GRID, IMAGE_SIDE, PATCH, REFUSAL
from demo.models.vlm_optimization import PATCH_WEIGHT
from demo.world.language import HELD_OUT_SEEDS, TRAIN_SEEDS
from pipelines.captioning.request import INSTRUCTION

CARD = """---
license: apache-2.0
language: en
pipeline_tag: image-text-to-text
---
# {name}

A tiny vision-language model of the lidit demo's closed world (coloured shapes on a plain background). It stands in for a
LLaVA-class captioner where the demo and the tests need one that is small, real and free of downloads. It knows scenes and
nothing else: of any other picture it is trained to say "{refusal}"

| | |
|---|---|
| class | `{architecture}`: SigLIP tower, two-layer projector, Llama |
| width of tower and language model | {width}, heads of 32 |
| blocks of tower, of language model | {vision_blocks}, {text_blocks} |
| image | squeezed into {side} x {side} pixels, patches of {patch}: {tokens} tokens |
| vocabulary, context | {vocabulary} tokens (byte-level BPE), {context} |
| parameters | {parameters:,} (embeddings tied) |
| weights | bfloat16, {weight_bytes:,} bytes, sha256 `{sha256}` |

Ask it "{instruction}" (`AutoProcessor`, `AutoModelForImageTextToText`; chat template saved with it).

## Training
Rendered scenes of seeds {train_first:,} to {train_last:,}, drawn anew at every step, in their own sizes (64 x 64, 48 x 80,
80 x 48 pixels). First the tower learns to tell what each patch shows through a linear head that is thrown away:
{aspects}, and where its object's centre is.
Then the whole model learns to write the scene's canonical caption, with the loss of seeing at weight {patch_weight}.
{clutter:.0%} of the images are pictures that are no scenes; in {hints:.0%} of the steps the prompt carries the text that came
with the image.

| | |
|---|---|
| steps | {see_steps:,} of seeing, then {say_steps:,} of saying, each of {batch} images ({images:,} images in all) |
| optimiser | Muon (matrices), AdamW (the rest), float32 |
| learning rate | peak {learning_rate}, warm-up {warmup_steps} steps, linear fall over the last third |
| seed | {seed} |
| wall time | {seconds:.0f} s on {threads} CPU thread(s) of a machine shared with other work |
| training loss, mean of the last steps | {loss:.4f} nats per caption token |

Made by `python -m demo.models.train_vlm`, which also wrote this card and `training.json` beside it.

## Figures
Measured on the saved bfloat16 weights by greedy decoding, on {exam_scenes} scenes of seeds {held_first:,} and up, never trained
on; captions read by `demo/world/caption_check.py` and checked against the scenes' truth.

| | share of captions |
|---|---|
| every object named with its colour and shape, as often as it is there, nothing added | {objects:.1%} |
| and every size and texture right | {looks:.1%} |
| relations right (all that are said are true, one is said if there is any) | {relations:.1%} |
| the same, of the {several} scenes that have a relation | {relations_of_several:.1%} |
| background right | {background:.1%} |
| nothing wrong at all | {right:.1%} |
| other pictures ({clutters}) declined | {declined:.1%} |

Captions with a mistake, the first of them:

{mistaken}
"""


def vlm_card(record: dict[str, Any]) -> str:
    """The card of the model of `record`."""
    recipe, figures = record["recipe"], dict(record["figures"])
    mistaken = figures.pop("mistaken")
    return CARD.format(
        **{key: value for key, value in record.items() if key not in ("figures", "recipe")},
        **recipe,
        **figures,
        mistaken="\n".join(f'- scene {case["seed"]}: "{case["caption"]}"' for case in mistaken) or "none",
        refusal=REFUSAL,
        side=IMAGE_SIDE,
        patch=PATCH,
        tokens=GRID * GRID,
        context=CONTEXT,
        instruction=INSTRUCTION,
        aspects=", ".join(ASPECTS),
        patch_weight=PATCH_WEIGHT,
        clutter=CLUTTER_SHARE,
        hints=HINT_SHARE,
        images=(recipe["see_steps"] + recipe["say_steps"]) * recipe["batch"],
        clutters=max(1, record["exam_scenes"] // 5),
        train_first=TRAIN_SEEDS[0],
        train_last=TRAIN_SEEDS[-1],
        held_first=HELD_OUT_SEEDS[0],
    )
