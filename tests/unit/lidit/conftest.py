"""Tiny text models of transformers' own classes, with random weights large enough that a wrong position or mask shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "a red bench and two large blue dogs below the small green table on the left of a brown cat"
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that threads only wait for each other."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def whole_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that call `cli.main`, which changes this process: its environment and where its stdout goes."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    stdout = os.dup(1)
    yield
    os.dup2(stdout, 1)
    os.close(stdout)


def make_tokenizer(ends: str = "") -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with `<s>` and `</s>`; `ends` is the template of what an encoder-only model puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if ends:
        special = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of the tiny decoder-only models."""
    return make_tokenizer()


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    """Four blocks, grouped-query attention."""
    return transformers.LlamaConfig(**{**DECODER, **changes})


DECODER = dict(
    vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=512, initializer_range=0.2, head_dim=8,
    bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="session")
def decoder() -> dict[str, Any]:
    """Sizes that the tiny decoder-only models share, as arguments of their config classes."""
    return DECODER


@pytest.fixture(scope="session")
def save_model(tokenizer: transformers.PreTrainedTokenizerFast) -> Callable[..., Path]:
    """`save_model(folder, config, model_class, ends="", seed=0, **tokenizer attributes)` -> the folder, filled."""

    def save(
        folder: Path, config: Any, model_class: Any = None, ends: str = "", seed: int = 0, **attributes: Any
    ) -> Path:
        own = make_tokenizer(ends)
        for key, value in attributes.items():
            setattr(own, key, value)
        own.save_pretrained(folder)
        torch.manual_seed(seed)
        (model_class or transformers.AutoModelForCausalLM.from_config)(config).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Path:
    """A tiny Llama; tests must not change it."""
    return save_model(tmp_path_factory.mktemp("models") / "llama", llama_config())


@pytest.fixture
def own_llama(tmp_path: Path, save_model: Callable[..., Path]) -> Callable[..., Path]:
    """`own_llama(**tokenizer attributes, config={...})`: a tiny Llama that the test may damage."""

    def make(name: str = "llama", seed: int = 0, config: dict[str, Any] | None = None, **attributes: Any) -> Path:
        return save_model(tmp_path / name, llama_config(**(config or {})), seed=seed, **attributes)

    return make


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """`edit_json(path, **changes)`."""

    def edit(path: Path, **changes: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


# -- the diffusion transformer ----------------------------------------------------------------------------------------

ENCODERS = {"one": 24, "two": 40, "three": 16}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(seed=0, awake=True, encoders=2, **fields of LIDiTConfig)` -> a very small LIDiT.

    `awake`: what starts at zero (gates, last layer) is random instead, so that every part of it matters.
    `encoders`: their names and widths, or how many of the three there are.
    """
    from lidit.config import LIDiTConfig
    from lidit.layers import ZeroLinear
    from lidit.model import LIDiT

    def make(seed: int = 0, awake: bool = True, encoders: int | dict[str, int] = 2, **changes: Any) -> Any:
        if isinstance(encoders, int):
            encoders = dict(list(ENCODERS.items())[:encoders])
        shape = {"depth": 2, "width": 32, "heads": 4, "in_channels": 4, **changes}
        torch.manual_seed(seed)
        model = LIDiT(LIDiTConfig(encoders=encoders, **shape))
        for module in model.modules() if awake else ():
            if isinstance(module, ZeroLinear):
                torch.nn.init.normal_(module.weight, std=0.2)
                torch.nn.init.normal_(module.bias, std=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, Any]]:
    """`make_inputs(model, rows=(0, 1, 2), padding=0, lengths=None, size=(6, 10), instruction=3, dtype=float32)` -> arguments
    of `LIDiT.forward`.

    A row is the same whatever rows are beside it: row r has `lengths[r]` prompt tokens, of a table of this file unless given.
    """
    lengths_of = {"one": [7, 0, 3, 0, 1], "two": [5, 2, 6, 0, 0], "three": [1, 4, 2, 0, 3]}

    def make(
        model: Any,
        rows: tuple[int, ...] = (0, 1, 2),
        padding: int = 0,
        lengths: dict[str, list[int]] | None = None,
        size: tuple[int, int] = (6, 10),
        instruction: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        config, lengths = model.config, lengths or lengths_of
        draws = {row: torch.Generator().manual_seed(1000 + row) for row in rows}
        latents = [torch.randn(config.in_channels, *size, generator=draws[row]) for row in rows]
        timestep = [torch.rand((), generator=draws[row]) for row in rows]
        embeds, masks, instructions = {}, {}, {}
        for number, (name, width) in enumerate(config.encoders.items()):
            longest = max(lengths[name][row] for row in rows) + padding
            embeds[name] = torch.zeros(len(rows), longest, width)
            masks[name] = torch.zeros(len(rows), longest, dtype=torch.bool)
            for place, row in enumerate(rows):
                length = lengths[name][row]
                draw = torch.Generator().manual_seed(100 * row + width)
                embeds[name][place, :length] = torch.randn(length, width, generator=draw)
                masks[name][place, :length] = True
            draw = torch.Generator().manual_seed(width)
            own = instruction + number if instruction else 0
            instructions[name] = torch.randn(own, width, generator=draw).to(dtype)
            embeds[name] = embeds[name].to(dtype)
        return {
            "noisy_latents": torch.stack(latents).to(dtype),
            "timestep": torch.stack(timestep),
            "prompt_embeds": embeds,
            "prompt_mask": masks,
            "instruction_embeds": instructions,
        }

    return make


# -- from prompts to images -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KL autoencoder of diffusers' own class: 4 channels, 8 times down, random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = 4
    autoencoder: Any = AutoencoderKL(
        block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    autoencoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_encoders(llms: dict[str, Path]) -> dict[str, Any]:
    """The two tiny LLMs as encoders that read 12 tokens of a prompt."""
    from lidit.frozen.text import EncoderConfig, PromptEncoder

    options: dict[str, Any] = dict(template="plain", dtype="fp32", max_prompt_tokens=12)
    return {name: PromptEncoder(EncoderConfig(name, str(folder), **options), "cpu") for name, folder in llms.items()}


@pytest.fixture(scope="session")
def weights_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    prompt_encoders: dict[str, Any],
    vae_folder: Path,
) -> Path:
    """Weights of a very small LIDiT for these encoders and this autoencoder, as the trainer exports them."""
    import dataclasses

    from lidit.diffusion import Flow, objective_to_dict
    from lidit.frozen.vae import VAE
    from lidit.weights import save_weights

    encoders = {
        name: {"config": dataclasses.asdict(encoder.config), "fingerprint": encoder.fingerprint()}
        for name, encoder in prompt_encoders.items()
    }
    extra = {
        "objective": objective_to_dict(Flow(shift=2.0)),
        "encoders": encoders,
        "vae": {"model": str(vae_folder), "fingerprint": VAE(str(vae_folder), device="cpu").fingerprint()},
        "image_size": [32, 48],
    }
    model = make_model(encoders={name: encoder.width for name, encoder in prompt_encoders.items()})
    return save_weights(tmp_path_factory.mktemp("weights") / "weights", model, extra=extra)
