"""LI-DiT (arXiv 2406.11831), top to bottom as in its figure 5.

    prompt_embeds of LLM 1, ... M                  timestep        noisy_latents
      | + instruction      | mean over prompt        |                  |
    LinguisticRefiner <- cond of the branch <-- + ---+              patchify
      |                    | sum of all M            |                  |
    CollaborativeRefiner   +--> cond of the DiT <----+              ResBlock
      | - instruction            |                                      |
      +--- context --------------+----------------------------->  DiTBlock x depth
                                                                        |
                                                                    FinalLayer --> prediction

The model and nothing else: no loss, no data, no distribution. Shape notation: see layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lidit.attention import Backend, Keys, fast_backend
from lidit.config import LIDiTConfig
from lidit.layers import (
    CrossAttention,
    FeedForward,
    Modulated,
    Modulation,
    NormedProjection,
    ResBlock,
    SelfAttention,
    TimestepEmbedding,
    ZeroLinear,
    add_gated,
    masked_mean,
    modulate,
    rotary_angles,
)
from lidit.refiner import CollaborativeBranch, CollaborativeRefiner, LinguisticBlock, LinguisticRefiner


class LIDiT(nn.Module):
    """Diffusion transformer conditioned on the states of several frozen LLMs, through the refiners.

    At the start it predicts zeros. Every forward pass runs every module, whatever the data: a prompt that was dropped is a
    masked one, so ranks of a sharded model stay in step.
    """

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.config = config
        self.timestep = TimestepEmbedding(config.width)  # E_t
        self.pooled = nn.ModuleDict({n: NormedProjection(e, config.width) for n, e in config.encoders.items()})  # E_p
        self.linguistic = nn.ModuleDict({n: LinguisticRefiner(config, e) for n, e in config.encoders.items()})
        self.collaborative = CollaborativeRefiner(config) if config.collaborative else None
        self.patchify = Patchify(config)
        self.res_block = ResBlock(config.width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final = FinalLayer(config)
        self.attention_backend: Backend | Literal["auto"] = "auto"
        self.checkpointing = False
        self.initialize()

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Mapping[str, Tensor],
        prompt_mask: Mapping[str, Tensor],
        instruction_embeds: Mapping[str, Tensor],
    ) -> Tensor:
        """Predicts the target of the objective that it was trained with (see diffusion.py).

        Args:
            noisy_latents: (B, C, H, W); H and W are multiples of the patch size and may differ from call to call.
            timestep: (B,) in [0, 1], 0 is clean and 1 is noise; keep it in fp32.
            prompt_embeds: encoder -> (B, L, E), prompts padded to the longest; L may be 0.
            prompt_mask: encoder -> (B, L) bool, true for real tokens. What stands at the others has no influence.
            instruction_embeds: encoder -> (P, E), the states before every prompt; P may be 0.

        Returns:
            (B, C, H, W), in the dtype of `noisy_latents`.

        Raises:
            ValueError: shapes do not fit each other or the config.
        """
        _check_inputs(self.config, noisy_latents, timestep, prompt_embeds, prompt_mask, instruction_embeds)
        backend = self._context_backend(self.patchify.project.weight.dtype, noisy_latents.device)
        keys = Keys(torch.cat([prompt_mask[name] for name in self.config.encoders], dim=1), backend=backend)
        context, cond = self.refine(timestep, prompt_embeds, prompt_mask, instruction_embeds)  # B sum(L) D, B D
        context = keys.pack(context)
        x = self.patchify(noisy_latents)  # B D h w
        h, w = x.shape[2:]
        x = self.res_block(x).flatten(2).transpose(1, 2).contiguous()  # B S D, S = h w
        angles = None
        if self.config.position == "rope":
            angles = rotary_angles(h, w, self.config.head_channels, x.device)  # S K/2
        for block in self.blocks:
            x = self._run(block, x, cond, context, keys, angles)
        return self.final(x, cond, (h, w)).to(noisy_latents.dtype)  # B C H W

    def refine(
        self,
        timestep: Tensor,
        prompt_embeds: Mapping[str, Tensor],
        prompt_mask: Mapping[str, Tensor],
        instruction_embeds: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Refines the prompts: `forward`'s arguments -> context (B, sum of L, D), and cond (B, D), timestep + pooled text.

        The context's tokens stand encoder by encoder; real ones are those of the masks, concatenated alike.
        """
        time = self.timestep(timestep)  # B D
        instruction = {name: self._instruction(instruction_embeds[name], time.dtype) for name in self.config.encoders}
        tokens, conds, keys, pooled = {}, {}, {}, []
        for name, refiner in self.linguistic.items():
            mask = prompt_mask[name]
            embeds = prompt_embeds[name].to(time.dtype).masked_fill(~mask[..., None], 0)  # B L E
            pooled.append(self.pooled[name](masked_mean(embeds, mask).to(time.dtype)))  # B D
            conds[name] = time + pooled[-1]  # B D, c_n of the paper
            real = torch.cat([mask.new_ones(len(mask), len(instruction[name])), mask], dim=1)  # B P+L
            keys[name] = Keys(real, causal=self.config.refiner_attention == "causal")
            tokens[name] = self._run(refiner, embeds, instruction[name], conds[name], keys[name])  # B P+L D
        if self.collaborative is not None:
            tokens = self._run(self.collaborative, tokens, conds, keys)
        prompts = [tokens[name][:, len(instruction[name]) :] for name in tokens]  # B L D each
        return torch.cat(prompts, dim=1), time + torch.stack(pooled).sum(dim=0)

    # -- how it is run ------------------------------------------------------------------------------------------------

    def set_attention(self, backend: Backend | Literal["auto"]) -> LIDiT:
        """Chooses how cross-attention to the ragged context is computed (attention.py). `auto`: varlen if there is a kernel."""
        choices = ("auto", *get_args(Backend))
        if backend not in choices:
            raise ValueError(f"attention backend: expected one of {', '.join(choices)}, received {backend!r}")
        self.attention_backend = backend
        return self

    def set_checkpointing(self, on: bool = True) -> LIDiT:
        """Turns on activation checkpointing: only each block's input is kept, and the backward pass recomputes the block."""
        self.checkpointing = on
        return self

    def compile_regions(self, **options: Any) -> LIDiT:
        """Compiles the functions between the matmuls (modulation, gating), for any size; modules and their hooks stay plain.

        `options` go to torch.compile.
        """
        functions = (modulate, add_gated)
        compiled = {function.__name__: torch.compile(function, dynamic=True, **options) for function in functions}
        for module in self.modules():
            if isinstance(module, Modulated):
                for name, function in compiled.items():
                    setattr(module, name, function)
        return self

    def compile_blocks(self, **options: Any) -> LIDiT:
        """Compiles every block as a whole, blocks of a kind once: faster than regions, above all on CPUs in bf16.

        Not for a model that ZeRO-3 shards: its hooks gather weights in the middle of a block. `options` go to torch.compile.
        """
        for module in self.modules():
            if isinstance(module, DiTBlock | FinalLayer | LinguisticBlock | CollaborativeBranch | ResBlock):
                module.compile(**options)
        return self

    # -- inside -------------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Sets every parameter. Linear maps and convolutions: Xavier uniform, as in DiT; norms 1; biases 0.

        What is a `ZeroLinear` starts at zero: gates (so blocks and refiners start as the identity) and the last projection.
        """
        self.apply(_initialize)  # `apply`, which ZeRO-3 knows: it gathers each module's weights meanwhile

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)  # there is no dropout
        return module(*inputs)

    def _instruction(self, instruction_embeds: Tensor, dtype: torch.dtype) -> Tensor:
        """(P, E) -> (P, E), or (0, E) where the refiners must not see it."""
        return instruction_embeds[: None if self.config.instruction == "kept" else 0].to(dtype)

    def _context_backend(self, dtype: torch.dtype, device: torch.device) -> Backend:
        if self.attention_backend != "auto":
            return self.attention_backend
        return fast_backend(device, dtype, self.config.head_channels)


class Patchify(nn.Module):
    """Patches of p x p latent pixels -> image tokens."""

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.project = nn.Linear(config.in_channels * config.patch_size**2, config.width)

    def forward(self, noisy_latents: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(noisy_latents, self.patch_size)  # B (C p p) h w
        patches = patches.movedim(1, -1).to(self.project.weight.dtype)  # B h w (C p p)
        return self.project(patches).movedim(-1, 1)  # B D h w, channels last in memory: what convolutions like best


class DiTBlock(Modulated):
    """Self-attention, cross-attention to the context, feed-forward; each with shift, scale and gate from cond (adaLN-zero)."""

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.modulation = Modulation(config.width, 9)
        self.self_attention = SelfAttention(config.width, config.heads)
        self.cross_attention = CrossAttention(config.width, config.heads)
        self.feed_forward = FeedForward(config.width, config.ffn_ratio)

    def forward(self, x: Tensor, cond: Tensor, context: Tensor, keys: Keys, angles: Tensor | None = None) -> Tensor:
        """x (B, S, D), cond (B, D), context (B, sum of L, D) or packed, its keys, angles (S, K / 2) -> (B, S, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.modulation(cond)  # B 1 D each
        x = self.add_gated(x, gate1, self.self_attention(self.modulate(x, shift1, scale1), angles=angles))
        x = self.add_gated(x, gate2, self.cross_attention(self.modulate(x, shift2, scale2), context, keys))
        return self.add_gated(x, gate3, self.feed_forward(self.modulate(x, shift3, scale3)))


class FinalLayer(Modulated):
    """Image tokens -> patches of the prediction, put back in place."""

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.modulation = Modulation(config.width, 2)
        self.project = ZeroLinear(config.width, config.in_channels * config.patch_size**2)

    def forward(self, x: Tensor, cond: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, S, D), cond (B, D), size (h, w) -> (B, C, H, W)."""
        shift, scale = self.modulation(cond)  # B 1 D each
        patches = self.project(self.modulate(x, shift, scale))  # B S (C p p)
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(-1, size), self.patch_size)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, ZeroLinear):
        nn.init.zeros_(module.weight)
    elif isinstance(module, nn.Linear):
        _xavier(module.weight)
    elif isinstance(module, nn.Conv2d):
        _xavier(module.weight.flatten(1))
    elif isinstance(module, nn.RMSNorm | nn.GroupNorm):
        nn.init.ones_(module.weight)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)


@torch.no_grad()
def _xavier(weight: Tensor) -> None:
    """Drawn in float32 whatever the weight's type: bfloat16 rounds to the range's other end.

    Not into a tensor of its own: inside ZeRO-3's context `torch.empty` has its own mind about types.
    """
    weight.copy_(nn.init.xavier_uniform_(weight.float()))


def _check_inputs(
    config: LIDiTConfig,
    noisy_latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Mapping[str, Tensor],
    prompt_mask: Mapping[str, Tensor],
    instruction_embeds: Mapping[str, Tensor],
) -> None:
    """Raises ValueError where an argument of `LIDiT.forward` does not fit; looks at shapes and dtypes, never at values."""
    _check_latents(config, noisy_latents)
    batch = len(noisy_latents)
    if timestep.shape != (batch,) or timestep.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"timestep: expected ({batch},) float32 in [0, 1], received {tuple(timestep.shape)} {timestep.dtype}"
        )
    given = {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask, "instruction_embeds": instruction_embeds}
    for what, by_encoder in given.items():
        if set(by_encoder) != set(config.encoders):
            raise ValueError(f"{what}: expected encoders {list(config.encoders)}, received {list(by_encoder)}")
    for name, width in config.encoders.items():
        _check_text(name, batch, width, prompt_embeds[name], prompt_mask[name], instruction_embeds[name])


def _check_latents(config: LIDiTConfig, noisy_latents: Tensor) -> None:
    shape = tuple(noisy_latents.shape)
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise ValueError(f"noisy_latents: expected (B, {config.in_channels}, H, W), received {shape}")
    if any(side % config.patch_size or not side for side in shape[2:]):
        raise ValueError(
            f"noisy_latents: expected H and W to be multiples of the patch size {config.patch_size}, received "
            f"{shape[2:]}; crop or resize the image to multiples of patch size x VAE downscale"
        )


def _check_text(name: str, batch: int, width: int, embeds: Tensor, mask: Tensor, instruction: Tensor) -> None:
    if embeds.ndim != 3 or len(embeds) != batch or embeds.shape[2] != width:
        raise ValueError(f"prompt_embeds[{name}]: expected ({batch}, L, {width}), received {tuple(embeds.shape)}")
    if mask.shape != embeds.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"prompt_mask[{name}]: expected {tuple(embeds.shape[:2])} bool, true for real tokens, "
            f"received {tuple(mask.shape)} {mask.dtype}"
        )
    if instruction.ndim != 2 or instruction.shape[1] != width:
        raise ValueError(
            f"instruction_embeds[{name}]: expected (P, {width}), one for the whole batch, "
            f"received {tuple(instruction.shape)}"
        )
