"""`PromptEncoder`: prompts -> ragged hidden states of a frozen text model, ready to be stored.

Decoder-only LLMs (LI-DiT section 3.1): the instruction stands before the prompt and the states of the third-to-last
block are taken. What makes it fast, all without changing a value beyond rounding:

- The prefix (BOS, chat template, instruction) is causal, hence the same for every prompt: its keys and values are
  computed once and shared by all batches.
- Only the blocks up to the chosen one are built; no later block, no final norm and no LM head ever runs.
- Prompts are sorted by length and cut into batches so that padding and per-batch overhead together are least.

Encoder-only text models (T5 encoder, CLIP text), the paper's baselines, run as their authors use them: special tokens,
no instruction, last layer.

Shape notation: B prompts of a batch, L tokens of its longest prompt, T real tokens of a batch, P prefix tokens, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lidit.frozen.batching import EncodedBatch, finish_batch, one_ahead, plan_batches, to_host
from lidit.frozen.early_exit import (
    EarlyExit,
    SharedPrefixLayer,
    blocks_of,
    context_length,
    early_exit_hook,
    no_load_report,
)
from lidit.frozen.loading import load_config, load_model, load_tokenizer
from lidit.frozen.truncation import beginnings
from lidit.runtime.fields import Config, PositiveInt
from lidit.runtime.model_files import config_digest, resolve_model, tokenizer_digest, weights_digest
from lidit.store import codec

PAPER_INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)
ENCODER_ONLY = {
    "t5": transformers.T5EncoderModel,
    "mt5": transformers.MT5EncoderModel,
    "umt5": transformers.UMT5EncoderModel,
    "clip": transformers.CLIPTextModel,
    "clip_text_model": transformers.CLIPTextModel,
}
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class EncoderConfig(Config):
    """A frozen text model, and how prompts are put to it."""

    name: str
    """Short key, used in column names: letters, digits, underscore."""
    model: str
    """Folder with config.json, tokenizer and safetensors, or a hub id (then `revision` is required)."""
    revision: str | None = None
    """Full commit hash of a hub id; of a folder, `sha256:` and the digest that its files must have, if you like."""
    layer_index: int | None = None
    """Hidden state to take, counted as `hidden_states[i]` of transformers. Default: -3 for a decoder-only LLM (the
    output of the third-to-last block, no final norm), -1 for an encoder-only model (after its final norm)."""
    instruction: str = PAPER_INSTRUCTION
    """Words before every prompt; empty for none. Encoder-only models take none."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template, instruction as the system message, prompt as the user's. `plain`: the
    tokenizer's BOS if it has one, the instruction, a newline, the prompt."""
    max_prompt_tokens: PositiveInt = 256
    """Longest prompt in tokens, the prefix not counted; what is beyond is cut off, counted and marked in the row."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the model's weights and arithmetic. fp16 is not offered: Qwen-class models overflow it."""
    codec: Literal["bf16", "fp32", "fp8_e4m3"] = "bf16"
    """Storage format of the embeddings: bytes per value 2, 4, 1 (and 4 per token)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.isidentifier():
            raise ValueError(f"encoder name: expected letters, digits and underscores, received {self.name!r}")


DEMO_ENCODERS = tuple(
    EncoderConfig(name, model=f"demo/encoders/{name}-tuned", dtype="fp32") for name in ("llama", "qwen")
)
"""Two tiny LLMs that come with lidit: what jobs take where nothing else is asked for."""


class PromptEncoder:
    """A frozen text model that turns prompts into `prompt_embeds`.

    Args:
        config: which model, and how prompts are put to it.
        device: where it runs; default: the GPU if there is one.
        download: whether a hub id that is not in the local cache may be fetched.

    Raises:
        ValueError: the model's files are missing, damaged or do not fit its config; the layer does not exist; the
            prefix alone fills the model's context.
    """

    def __init__(self, config: EncoderConfig, device: str | torch.device | None = None, download: bool = True):
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.folder = resolve_model(config.model, config.revision, download=download)
        self.model_config = load_config(self.folder)
        self.text_config = self.model_config.get_text_config(decoder=True)
        self.tokenizer = load_tokenizer(self.folder)
        self.is_decoder = self.model_config.model_type not in ENCODER_ONLY
        self.width: int = self.text_config.hidden_size
        self.num_blocks: int = self.text_config.num_hidden_layers
        self.layer = self._resolve_layer()
        self.prefix_ids: list[int] = self._render_prefix() if self.is_decoder else []
        context = context_length(self.text_config) - len(self.prefix_ids)
        self.max_prompt_tokens = min(config.max_prompt_tokens, context)
        if self.max_prompt_tokens < 1:
            raise ValueError(
                f"encoder {config.name}: the prefix takes {len(self.prefix_ids)} tokens of a context of "
                f"{context + len(self.prefix_ids)}; nothing is left for the prompt: shorten the instruction"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Everything the embeddings depend on beyond rounding, as JSON-able values. Reads the weight files once.

        Left out, since they change rounding alone: the device, and which implementation of attention runs.
        """
        return {
            "model_type": self.model_config.model_type,
            "model_config": config_digest(self.folder),
            "weights": weights_digest(self.folder),
            "tokenizer": tokenizer_digest(self.folder),
            "template": self.config.template if self.is_decoder else None,
            "instruction": self.config.instruction if self.is_decoder else None,
            "prefix_ids": self.prefix_ids,
            "layer": self.layer,
            "final_norm": self.layer == self.num_blocks,
            "max_prompt_tokens": self.max_prompt_tokens,
            "dtype": self.config.dtype,
            "codec": self.config.codec,
        }

    # -- tokens -------------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """Prompts -> (token ids of each, the number of tokens cut off each). The prefix is not among them.

        Of a very long prompt (`beginnings`) the end is not looked at: at least so many tokens are cut off.
        """
        if not prompts:
            return [], np.zeros(0, np.int32)
        prompts = beginnings(self.tokenizer, prompts, self.max_prompt_tokens)
        ids = self.tokenizer(prompts, add_special_tokens=not self.is_decoder, verbose=False)["input_ids"]
        excess = np.array([max(0, len(tokens) - self.max_prompt_tokens) for tokens in ids], np.int32)
        if self.is_decoder:
            return [tokens[: self.max_prompt_tokens] for tokens in ids], excess
        last = self.max_prompt_tokens - 1  # an encoder-only model reads its end token: keep it
        return [tokens if not cut else tokens[:last] + tokens[-1:] for tokens, cut in zip(ids, excess)], excess

    def _render_prefix(self) -> list[int]:
        """Token ids of all that stands before the prompt; tokenized apart from it, so that the boundary never merges."""
        instruction, tokenizer = self.config.instruction, self.tokenizer
        if self.config.template == "plain":
            bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            return bos + (tokenizer(f"{instruction}\n", add_special_tokens=False)["input_ids"] if instruction else [])
        if not tokenizer.chat_template:
            raise ValueError(
                f"encoder {self.config.name}: template `chat` needs a tokenizer with a chat template and {self.folder} "
                f"has none; set `template: plain`"
            )
        mark = "PROMPT-STANDS-HERE"
        system = [{"role": "system", "content": instruction}] if instruction else []
        try:
            # Llama 3 templates print today's date unless told one: the prefix must be the same every day.
            text: str = tokenizer.apply_chat_template(  # type: ignore[assignment]
                [*system, {"role": "user", "content": mark}], tokenize=False, date_string="26 Jul 2024"
            )
        except Exception as error:  # a template raises whatever its author chose, often for the system role
            raise ValueError(
                f"encoder {self.config.name}: the chat template refuses an instruction as system message ({error}); "
                f"set `template: plain`"
            ) from error
        prefix = text[: text.index(mark)]
        if instruction.strip() not in prefix:
            raise ValueError(
                f"encoder {self.config.name}: the chat template leaves the instruction (system message) out; "
                f"set `template: plain`, or `instruction: ''` if none is meant"
            )
        return tokenizer(prefix, add_special_tokens=False)["input_ids"]

    # -- the model ----------------------------------------------------------------------------------------------------

    def _resolve_layer(self) -> int:
        """Turns `layer_index` into the number of blocks to run, 1 to `num_blocks`."""
        index = self.config.layer_index
        index = (-3 if self.is_decoder else -1) if index is None else index
        layer = index if index >= 0 else self.num_blocks + 1 + index
        if not 1 <= layer <= self.num_blocks:
            raise ValueError(
                f"encoder {self.config.name}: layer_index {index} asks for hidden state {layer} of a model of "
                f"{self.num_blocks} blocks; expected 1 to {self.num_blocks}, or -{self.num_blocks} to -1"
            )
        return layer

    @cached_property
    def model(self) -> torch.nn.Module:
        """The frozen text model up to the chosen block, on the device. Loaded at first use."""
        config = self.model_config
        if self.is_decoder:
            layer_types = getattr(self.text_config, "layer_types", None) or []
            other = set(layer_types) - ATTENTION_LAYERS
            if other:
                raise ValueError(
                    f"{config.model_type} models have layers other than attention ({other}): not supported"
                )
            self.text_config.num_hidden_layers = self.layer
            if layer_types:
                self.text_config.layer_types = layer_types[: self.layer]
        loader: Any = ENCODER_ONLY.get(config.model_type, transformers.AutoModel)
        if loader is transformers.CLIPTextModel:
            config = self.text_config
        try:
            with no_load_report():  # it would list the blocks left out
                model = load_model(loader, self.folder, config=config, dtype=DTYPES[self.config.dtype])
        except (RuntimeError, OSError) as error:
            raise ValueError(f"weights in {self.folder} do not fit its config.json: {error}") from error
        if self.is_decoder:
            if config is not self.text_config:
                model = model.get_decoder()  # a multimodal LLM: its language model alone
            if self.layer < self.num_blocks:
                blocks_of(model, self.layer)[-1].register_forward_hook(early_exit_hook)
        model = model.requires_grad_(False).eval().to(self.device)
        if self.is_decoder:
            self._check_causal(model)
        return model

    def _check_causal(self, model: torch.nn.Module) -> None:
        """Raises ValueError where a token's states depend on later tokens: prefix sharing would be silently wrong."""
        ids = torch.tensor([[2, 3, 4], [2, 5, 6]], device=self.device)
        first, second = self._run(model, input_ids=ids, use_cache=False)[:, 0]
        if not torch.allclose(first, second, rtol=0.02, atol=1e-3 * float(first.abs().max()), equal_nan=True):
            raise ValueError(
                f"encoder {self.config.name}: {self.model_config.model_type} models are not causal (a token's states depend on "
                f"those after it); encoder-only models that can be used: {', '.join(ENCODER_ONLY)}"
            )

    @cached_property
    def _prefix(self) -> tuple[Cache | None, Tensor]:
        """The shared prefix: (its keys and values, its states (P, E)); None where there is none."""
        if not self.prefix_ids:
            return None, torch.zeros(0, self.width, device=self.device, dtype=DTYPES[self.config.dtype])
        grown = transformers.DynamicCache()
        ids = torch.tensor([self.prefix_ids], device=self.device)
        states = self._run(self.model, input_ids=ids, past_key_values=grown, use_cache=True)
        layers: list[Any] = []
        for source in grown.layers[: self.layer]:
            if not isinstance(source, DynamicLayer):
                raise ValueError(
                    f"{self.model_config.model_type} models keep a state other than keys and values: not supported"
                )
            assert source.keys is not None and source.values is not None
            layer = SharedPrefixLayer()
            layer.lazy_initialization(source.keys, source.values)
            layer.keys, layer.values = source.keys, source.values
            layers.append(layer)
        return Cache(layers=layers), states[0]

    @property
    def instruction_embeds(self) -> np.ndarray:
        """States of the whole prefix, (P, E) float32. The same for every prompt: stored once per encoder."""
        return self._prefix[1].float().cpu().numpy()

    @property
    def null_embeds(self) -> np.ndarray:
        """States of the empty prompt, (L, E) float32; L is 0 for an LLM whose tokenizer gives it no token."""
        prompt_embeds, prompt_mask = self([""])
        return prompt_embeds[prompt_mask].float().cpu().numpy()

    def _run(self, model: torch.nn.Module, **inputs: Any) -> Tensor:
        """Inputs of the model -> states of the chosen layer (B, L, E)."""
        with torch.inference_mode():
            if not self.is_decoder and self.layer < self.num_blocks:
                return model(**inputs, output_hidden_states=True).hidden_states[self.layer]
            try:
                return model(**inputs).last_hidden_state
            except EarlyExit as reached:
                return reached.states

    def forward(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids of B prompts -> prompt_embeds (B, L, E), prompt_mask (B, L) bool. Padding stands on the right."""
        lengths = [len(tokens) for tokens in ids]
        longest = max(lengths, default=0)
        if longest == 0:
            empty = torch.zeros(len(ids), 0, self.width, device=self.device, dtype=DTYPES[self.config.dtype])
            return empty, torch.zeros(len(ids), 0, dtype=torch.bool, device=self.device)
        padded = np.zeros((len(ids), longest), np.int64)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            padded[row, len(tokens) :] = (
                tokens[-1] if tokens else 0
            )  # its own: another's NaN would spread, 0 * NaN is NaN
        input_ids = torch.from_numpy(padded).to(self.device, non_blocking=True)
        prompt_mask = torch.arange(longest, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        if not self.is_decoder:
            return self._run(self.model, input_ids=input_ids, attention_mask=prompt_mask.long()), prompt_mask
        # No padding mask: padding stands after the prompt, and a causal model never looks ahead.
        prefix, _ = self._prefix
        position_ids = len(self.prefix_ids) + torch.arange(longest, device=self.device)[None]  # (1, L)
        use_cache = prefix is not None
        states = self._run(
            self.model, input_ids=input_ids, position_ids=position_ids, past_key_values=prefix, use_cache=use_cache
        )
        return states, prompt_mask

    # -- prompts to states --------------------------------------------------------------------------------------------

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """A few prompts, one batch -> prompt_embeds (B, L, E), prompt_mask (B, L) bool, on the encoder's device."""
        return self.forward(self.tokenize(prompts)[0])

    def encode(self, ids: list[list[int]], batch_tokens: int = 8192) -> Iterator[EncodedBatch]:
        """Token ids of many prompts -> their states, packed by the config's codec, batch by batch, longest first.

        `batch_tokens` bounds B * L of a batch. While one batch computes on a GPU, the one before is copied and given out.
        """

        def launch(rows: np.ndarray) -> tuple[np.ndarray, list[int], list[Tensor], Any, int]:
            prompt_embeds, prompt_mask = self.forward([ids[row] for row in rows])
            states = prompt_embeds[prompt_mask]  # (T, E)
            copies = [to_host(codec.encode(states, self.config.codec)), to_host(torch.isfinite(states).all(dim=1))]
            event = torch.cuda.Event() if self.device.type == "cuda" else None
            if event is not None:
                event.record()
            return rows, [len(ids[row]) for row in rows], copies, event, prompt_mask.numel()

        batches = plan_batches(np.array([len(tokens) for tokens in ids]), batch_tokens)
        for launched in one_ahead(map(launch, batches)):
            yield finish_batch(*launched)
