"""The demo's vision-language model: transformers' own LLaVA, small: a SigLIP tower, a projector and a Llama.

An image becomes an 8 x 8 grid of patches of 10 pixels, each one token of the language model.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from demo.world.captions import canonical_caption, noisy_caption
from demo.world.language import TRAIN_SEEDS
from demo.world.world import make_scene
from pipelines.captioning.request import INSTRUCTION, prompt_text

IMAGE_SIDE, PATCH = 80, 10  # pixels; every image is squeezed into a square of that side
GRID = IMAGE_SIDE // PATCH  # patches along a side
CONTEXT = 512  # tokens
VOCABULARY = 448
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
REFUSAL = "Sorry, I cannot describe this image: it shows no scene that I know."
"""What the model says of a picture that is no scene."""


def build_processor(texts: int, seed: int) -> LlavaProcessor:
    """Image processor and tokenizer; the tokenizer learns from `texts` scenes' captions and prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    scenes = [make_scene(TRAIN_SEEDS[seed + index]) for index in range(texts)]
    captions = [text for scene in scenes for text in (canonical_caption(scene), noisy_caption(scene, 0) or REFUSAL)]
    prompts = [prompt_text(INSTRUCTION, "red circles"), "system\nuser\nassistant\n"]
    tokenizer.train_from_iterator([*captions, *prompts * texts], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IMAGE, *ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
    )
    images = SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return LlavaProcessor(images, fast, PATCH, "full", chat_template=CHAT_TEMPLATE, image_token=IMAGE)


def build_vlm(
    processor: LlavaProcessor, width: int, vision_blocks: int, text_blocks: int
) -> LlavaForConditionalGeneration:
    """A freshly initialized model (torch's global generator); every block begins as the identity."""
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=vision_blocks,
        num_attention_heads=width // 32,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=text_blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=GRID * GRID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            torch.nn.init.zeros_(parameter)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    return model
