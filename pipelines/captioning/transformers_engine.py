"""`Captioner`: a vision-language model of transformers that describes images, in batches of bounded size.

- Batches are cut by tokens: what the prompt with its image takes, and room for the longest answer. Which images go into
  one batch depends on their sizes alone, so nothing is decoded before it is due.
- Threads decode and prepare the next batch while the model generates.
- Padding stands on the left, and what is drawn for a row depends on the row's own seed (`row_sampling.py`): a caption does
  not depend on its batch, beyond the rounding of arithmetic.

Shape notation: B rows of a batch, L tokens of its longest prompt (image tokens included).
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import LogitsProcessorList

from lidit.frozen.batching import one_ahead, plan_batches
from lidit.frozen.loading import load_config, load_model, load_processor
from lidit.images.pixels import ImageError, reduced_image
from lidit.runtime.fields import Config
from lidit.runtime.model_files import config_digest, processor_digest, resolve_model, tokenizer_digest, weights_digest
from pipelines.captioning.image import blank_image, shown_size
from pipelines.captioning.request import GRAY, CaptionAnswer, CaptionRequest, conversation
from pipelines.captioning.row_sampling import RowSampler

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DECODE_THREADS = 4
KNOWN_SIZES = 65536  # image sizes whose number of tokens is remembered


@dataclass(frozen=True)
class VlmConfig(Config):
    """One vision-language model of transformers' image-text-to-text classes."""

    model: str
    """Folder with config.json, processor, tokenizer and safetensors, or a hub id (then `revision` is required)."""
    revision: str | None = None
    """Full commit hash of a hub id; of a folder, `sha256:` and the digest that its files must have, if you like."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the model's weights and arithmetic."""


class Captioner:
    """Captions images with a vision-language model: the engine `transformers`.

    Args:
        config: which model.
        max_new_tokens: longest answer, in tokens.
        image_side: a larger image is brought to this longer side, in pixels, before the model's own processor sees it.
        batch_tokens: of one batch at most, prompts, image tokens, padding and room for the answers included.
        device: where it runs; default: the GPU if there is one.

    Raises:
        ValueError: the model's files are missing, damaged or no vision-language model; it has no chat template.
    """

    def __init__(
        self,
        config: VlmConfig,
        max_new_tokens: int,
        image_side: int,
        batch_tokens: int,
        device: str | torch.device | None = None,
    ):
        self.config, self.max_new_tokens = config, max_new_tokens
        self.image_side, self.batch_tokens = image_side, batch_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.folder = resolve_model(config.model, config.revision)
        self.counts: Counter[str] = Counter()
        self._image_tokens = functools.lru_cache(KNOWN_SIZES)(self._count_image_tokens)
        self._text = functools.lru_cache(4)(self._render)  # mostly the same prompt for all
        self._prompt_tokens = functools.lru_cache(4)(self._count_prompt_tokens)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what captions depend on, as JSON-able values. Digests the weight files once; loads no weights."""
        return {
            "model_type": load_config(self.folder).model_type,
            "model_config": config_digest(self.folder),
            "weights": weights_digest(self.folder),
            "tokenizer": tokenizer_digest(self.folder),
            "processor": processor_digest(self.folder),
            "dtype": self.config.dtype,
        }

    # -- the model ----------------------------------------------------------------------------------------------------

    @cached_property
    def processor(self) -> Any:
        """Image processor, tokenizer and chat template; pads on the left."""
        try:
            processor = load_processor(self.folder)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"model {self.folder}: expected a processor for images and text: {error}") from error
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"model {self.folder}: expected an image processor with it (preprocessor_config.json)")
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"model {self.folder}: expected a chat template with its processor: how is it to be asked?"
            )
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    @cached_property
    def model(self) -> Any:
        """The model, frozen, on the device. Loaded at first use."""
        loader: Any = transformers.AutoModelForImageTextToText
        try:
            model = load_model(loader, self.folder, dtype=DTYPES[self.config.dtype])
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(
                f"model {self.folder}: expected a vision-language model (image and text to text) whose weights fit its "
                f"config.json: {error}"
            ) from error
        return model.requires_grad_(False).eval().to(self.device)

    @cached_property
    def _generation(self) -> transformers.GenerationConfig:
        """The model's own settings (end tokens, repetition penalty), without its way of sampling: `RowSampler` does that."""
        settings = copy.deepcopy(self.model.generation_config)
        settings.do_sample, settings.num_beams, settings.num_return_sequences = False, 1, 1
        settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
        settings.max_length, settings.max_new_tokens, settings.use_cache = None, self.max_new_tokens, True
        settings.pad_token_id = self.processor.tokenizer.pad_token_id
        if settings.eos_token_id is None:
            settings.eos_token_id = self.processor.tokenizer.eos_token_id
        return settings

    def load(self) -> None:
        """Model and processor, if they are not there yet. Raises ValueError where they cannot be used."""
        assert self.processor and self.model

    # -- requests to answers ------------------------------------------------------------------------------------------

    def __call__(self, requests: list[CaptionRequest]) -> list[CaptionAnswer]:
        """The answers, in the order of the requests; an image that cannot be decoded gives one with an error."""
        answers = [CaptionAnswer()] * len(requests)
        lengths = np.zeros(len(requests), np.int64)
        for row, request in enumerate(requests):
            try:
                lengths[row] = self._length(request)
            except ImageError as error:
                answers[row] = CaptionAnswer(error=str(error))
        rows = np.flatnonzero(lengths)
        batches = [rows[batch] for batch in plan_batches(lengths[rows], self.batch_tokens)]
        for batch, inputs, errors in self._prepared(requests, batches):
            for row, reason in errors.items():
                answers[row] = CaptionAnswer(error=reason)
            if batch:
                for row, answer in zip(batch, self.generate(inputs, [requests[row] for row in batch])):
                    answers[row] = answer
        return answers

    def _prepared(
        self, requests: list[CaptionRequest], batches: list[np.ndarray]
    ) -> Iterator[tuple[list[int], Any, dict[int, str]]]:
        """(rows that can be used, the model's inputs, row -> why it cannot be used) of each batch, one batch ahead."""
        self.processor  # noqa: B018 - made here, not by two threads at once
        with ThreadPoolExecutor(DECODE_THREADS) as decoding, ThreadPoolExecutor(1) as preparing:

            def prepare(rows: np.ndarray) -> tuple[list[int], Any, dict[int, str]]:
                usable, images, errors = [], [], {}
                for row, found in zip(rows.tolist(), decoding.map(self._decoded, [requests[row] for row in rows])):
                    if isinstance(found, ImageError):
                        errors[row] = str(found)
                    else:
                        usable.append(row)
                        images.append(found)
                inputs = self.inputs(images, [requests[row].prompt for row in usable]) if usable else None
                return usable, inputs, errors

            for prepared in one_ahead(preparing.submit(prepare, batch) for batch in batches):
                yield prepared.result()

    def inputs(self, images: list[Image.Image], prompts: list[str]) -> Any:
        """Images and what is asked of each -> the model's inputs on the host: input_ids, attention_mask (B, L), pixels."""
        texts = [self._text(prompt) for prompt in prompts]
        bos = self.processor.tokenizer.bos_token
        has_bos = bool(bos) and texts[0].startswith(bos)  # a chat template writes it itself; not twice
        return self.processor(
            images=[[image] for image in images],
            text=texts,
            padding=True,
            add_special_tokens=not has_bos,
            return_tensors="pt",
        )

    @torch.inference_mode()
    def generate(self, inputs: Any, requests: list[CaptionRequest]) -> list[CaptionAnswer]:
        """The model's inputs -> an answer per row."""
        model, length = self.model, inputs["input_ids"].shape[1]
        inputs = inputs.to(device=self.device, dtype=DTYPES[self.config.dtype])  # integers stay integers
        sampler = RowSampler([r.seed for r in requests], [r.temperature for r in requests], length)
        output = model.generate(
            **inputs, generation_config=self._generation, logits_processor=LogitsProcessorList([sampler])
        )
        written = output[:, length:].tolist()
        ends = self._generation.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for ids in written:
            end = next((position for position, token in enumerate(ids) if token in ends), None)
            text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
            answers.append(CaptionAnswer(text.strip(), len(ids) if end is None else end, end is None))
        self.counts["tokens"] += sum(answer.tokens for answer in answers)
        self.counts["slots"] += len(written) * output[:, length:].shape[1]
        return answers

    # -- images and lengths -------------------------------------------------------------------------------------------

    def _length(self, request: CaptionRequest) -> int:
        """Tokens that a row takes at most: the prompt with its image, and the longest answer. Reads the header only."""
        height, width = shown_size(request.image, self.image_side)
        return self._image_tokens(height, width) + self._prompt_tokens(request.prompt) + self.max_new_tokens

    def _count_image_tokens(self, height: int, width: int) -> int:
        """Tokens that an image of that size adds to a prompt: the processor is asked with a blank one."""
        inputs = self.inputs([Image.new("RGB", (width, height), GRAY)], [""])
        return int(inputs["input_ids"].shape[1]) - self._prompt_tokens("")

    def _count_prompt_tokens(self, prompt: str) -> int:
        """Tokens of a prompt in its template, the one that stands for the image included."""
        return len(self.processor.tokenizer(self._text(prompt), add_special_tokens=False)["input_ids"])

    def _decoded(self, request: CaptionRequest) -> Image.Image | ImageError:
        """The request's image, upright RGB; a gray one of its size if it asks for that."""
        try:
            return (blank_image if request.blank else reduced_image)(request.image, self.image_side)
        except ImageError as error:
            return error

    def _render(self, prompt: str) -> str:
        """The prompt in the model's chat template, up to where the answer begins.

        The template's own words are taken out of the prompt: a hint from the web may hold an `<image>` or an end of turn.
        """
        tokenizer = self.processor.tokenizer
        own = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        for word in sorted({*own, *tokenizer.all_special_tokens}, key=len, reverse=True):
            prompt = prompt.replace(word, " ")
        return str(self.processor.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True))
