"""Tiny LLMs of transformers' own classes, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "circle",
    "square",
    "star",
    "left",
    "right",
    "above",
    "below",
    "of",
    "the",
    "a",
    "and",
    "on",
    "with",
    "two",
    "three",
]


def make_llm(folder: Path, seed: int = 0, width: int = 32, blocks: int = 4) -> Path:
    """Writes a Llama of transformers' own class with random weights, and a word tokenizer with byte fallback."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=width, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny LLMs of different widths."""
    root = tmp_path_factory.mktemp("llms")
    return {"one": make_llm(root / "one", seed=1), "two": make_llm(root / "two", seed=2, width=48)}
