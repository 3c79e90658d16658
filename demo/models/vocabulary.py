"""The two tokenizers of the demo: byte-level BPE, so every text encodes, with the world's words as whole pieces.

They differ as those of real encoders do: `llama` starts every text with `<s>`, `qwen` has no such token; their
pieces, special tokens and chat templates differ too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo.models.language_model import CONTEXT
from demo.world.language import ANSWER_INSTRUCTION, INSTRUCTION, TRAIN_SEEDS, dialogue, draw_scene, plain_text

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text before merging: digits one by one, punctuation apart from letters."""


@dataclass(frozen=True)
class Vocabulary:
    """What sets a family's tokenizer apart. `header` opens an assistant turn; `eos` closes every turn and text."""

    size: int
    bos: str | None
    eos: str
    pad: str
    extra: tuple[str, ...]
    header: str
    chat_template: str


VOCABULARIES = {
    "llama": Vocabulary(
        size=576,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        extra=("<|system|>", "<|user|>", "<|assistant|>"),
        header="<|assistant|>\n",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
    ),
    "qwen": Vocabulary(
        size=768,
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        extra=("<|im_start|>",),
        header="<|im_start|>assistant\n",
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    ),
}


def train_tokenizer(family: str, texts: int, seed: int) -> PreTrainedTokenizerFast:
    """Learn the family's tokenizer on `texts` training texts; the same arguments give the same tokenizer."""
    vocabulary = VOCABULARIES[family]
    specials = [token for token in (vocabulary.bos, vocabulary.eos, vocabulary.pad, *vocabulary.extra) if token]
    tokenizer = Tokenizer(models.BPE())
    if family == "qwen":
        split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(texts, seed), trainer)
    if vocabulary.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{vocabulary.bos} $A",
            pair=f"{vocabulary.bos} $A {vocabulary.bos} $B",
            special_tokens=[(vocabulary.bos, tokenizer.token_to_id(vocabulary.bos))],
        )
    return wrap(tokenizer, family)


def wrap(tokenizer: Tokenizer, family: str, chat: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it; with the family's chat template if `chat`."""
    vocabulary = VOCABULARIES[family]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary.bos,
        eos_token=vocabulary.eos,
        pad_token=vocabulary.pad,
        additional_special_tokens=list(vocabulary.extra),
        chat_template=vocabulary.chat_template if chat else None,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def tokenizer_texts(count: int, seed: int) -> Iterator[str]:
    """Captions, dialogues and the instructions: what the vocabulary has to hold whole."""
    rng = np.random.default_rng([seed, 6])
    for _ in range(count):
        scene = draw_scene(rng, TRAIN_SEEDS)
        yield plain_text(scene, rng)
        yield "\n".join(message["content"] for message in dialogue(scene, rng))
        yield INSTRUCTION
        yield ANSWER_INSTRUCTION
        yield "system\nuser\nassistant\n"
