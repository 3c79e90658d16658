"""What a saved encoder knows: perplexity on held-out captions, and exact answers to held-out tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.world.language import INSTRUCTION, INVENTORY, Task, held_out_captions, held_out_tasks, messages

ANSWER_TOKENS = {INVENTORY: 96}
"""Most tokens an answer may take, by kind; 20 for kinds not listed."""

GENERATION_BATCH = 25


@torch.inference_mode()
def examine(folder: Path, variant: str, captions: int, tasks_per_kind: int) -> dict[str, Any]:
    """Load a saved encoder as a user would, and return its figures.

    `perplexity` per caption token over `captions` held-out captions, and `accuracy`, the share of exact answers by kind
    over `tasks_per_kind` held-out tasks each. The weights are those on disk (bfloat16), computed with in float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tasks = held_out_tasks(tasks_per_kind)
    accuracy = {}
    for kind in dict.fromkeys(task.kind for task in tasks):
        asked = [task for task in tasks if task.kind == kind]
        given = answers(model, tokenizer, variant, asked)
        accuracy[kind] = sum(normal(text) == normal(task.answer) for text, task in zip(given, asked)) / len(asked)
    return {
        "perplexity": caption_perplexity(model, tokenizer, variant, held_out_captions(captions)),
        "accuracy": accuracy,
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
    }


def caption_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variant: str, captions: list[str]
) -> float:
    """exp of the mean cross-entropy per caption token, each caption where this variant expects it.

    The base variant reads the bare caption, the tuned one reads it as the user's message under the paper's
    instruction. A caption's first token is not counted: without BOS there is nothing to predict it from.
    """
    total, count = 0.0, 0
    for caption in captions:
        prefix, ids = [], tokenizer(caption, add_special_tokens=False)["input_ids"]
        if variant == "tuned":
            chat = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": caption}]
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
            prefix = tokenizer(text[: text.index(caption)], add_special_tokens=False)["input_ids"]
        elif tokenizer.bos_token_id is not None:
            prefix = [tokenizer.bos_token_id]
        logits = model(input_ids=torch.tensor([prefix + ids])).logits[0, len(prefix) : -1]  # (L - 1, V)
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variant: str, tasks: list[Task]) -> list[str]:
    """What the model says to each task, decoded greedily; tasks of one kind."""
    given = []
    for start in range(0, len(tasks), GENERATION_BATCH):
        texts = [task_text(tokenizer, variant, task) for task in tasks[start : start + GENERATION_BATCH]]
        # A chat template writes BOS itself; a plain text gets it from the tokenizer.
        inputs = tokenizer(
            texts, add_special_tokens=variant == "base", padding=True, padding_side="left", return_tensors="pt"
        )
        outputs = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=ANSWER_TOKENS.get(tasks[0].kind, 20),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
        given += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return given


def task_text(tokenizer: PreTrainedTokenizerBase, variant: str, task: Task) -> str:
    """A task as this variant takes it: in its chat template if tuned, else as lines of plain text."""
    if variant == "tuned":
        return str(tokenizer.apply_chat_template(messages([task])[:-1], tokenize=False, add_generation_prompt=True))
    lines = [INSTRUCTION, task.caption] if task.kind == INVENTORY else [task.caption, task.question]
    return "\n".join(lines) + "\n"


def normal(text: str) -> str:
    """First line, without case, outer blanks and final stop."""
    return text.strip().split("\n")[0].strip().rstrip(".").casefold()
