"""The two tiny language models: different architectures, widths and vocabularies, as a real pair of encoders has."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CONTEXT = 1024


def build_model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialized model (torch's global generator), about 1.4 million parameters, embeddings tied.

    The projections that write to the residual stream begin at zero, so that every block begins as the identity.
    """
    model = untrained(family, tokenizer)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def untrained(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The family's architecture, with transformers' own initialization."""
    shared = dict(
        vocab_size=len(tokenizer),
        num_hidden_layers=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4, **shared)
        )
    if family == "qwen":
        return Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=192,
                intermediate_size=208,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=32,
                **shared,
            )
        )
    raise ValueError(f"Unknown family {family!r}; expected 'llama' or 'qwen'.")
