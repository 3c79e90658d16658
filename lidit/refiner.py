"""The refiners between the frozen LLMs and the DiT (LI-DiT section 3.2): linguistic, one per LLM; collaborative, across them.

Both read the timestep, so they run at every denoising step; only the LLMs' states can be computed beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lidit.attention import Keys
from lidit.config import LIDiTConfig
from lidit.layers import EPS, CrossAttention, FeedForward, Modulated, Modulation, NormedProjection, SelfAttention


class LinguisticRefiner(nn.Module):
    """An LLM's states -> tokens of the model's width that have seen each other in both directions.

    At the start it is its input projection: the gates of its blocks are zero.
    """

    def __init__(self, config: LIDiTConfig, encoder_width: int):
        super().__init__()
        self.project = NormedProjection(encoder_width, config.width)  # W_in of the paper
        self.blocks = nn.ModuleList(LinguisticBlock(config) for _ in range(config.refiner_blocks))

    def forward(self, prompt_embeds: Tensor, instruction_embeds: Tensor, cond: Tensor, keys: Keys) -> Tensor:
        """prompt_embeds (B, L, E), instruction_embeds (P, E), cond (B, D), keys of P + L tokens -> (B, P+L, D)."""
        instruction = self.project(instruction_embeds)  # P D, once for the whole batch
        instruction = instruction.expand(len(prompt_embeds), -1, -1)  # B P D
        x = torch.cat([instruction, self.project(prompt_embeds)], dim=1)  # B P+L D
        for block in self.blocks:
            x = block(x, cond, keys)
        return x


class LinguisticBlock(Modulated):
    """Self-attention and feed-forward, each behind a gate; no shift and no scale."""

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(config.width, eps=EPS) for _ in range(2))
        self.attention = SelfAttention(config.width, config.heads)
        self.feed_forward = FeedForward(config.width, config.ffn_ratio)
        self.gates = Modulation(config.width, 2) if config.refiner_gate else None  # G of the paper

    def forward(self, x: Tensor, cond: Tensor, keys: Keys) -> Tensor:
        """x (B, P+L, D), cond (B, D) -> (B, P+L, D)."""
        if self.gates is None:
            x = x + self.attention(self.norm1(x), keys)
            return x + self.feed_forward(self.norm2(x))
        gate_attention, gate_feed_forward = self.gates(cond)  # B 1 D each
        x = self.add_gated(x, gate_attention, self.attention(self.norm1(x), keys))
        return self.add_gated(x, gate_feed_forward, self.feed_forward(self.norm2(x)))


class CollaborativeRefiner(nn.Module):
    """Parallel branches, one per LLM, that attend to each other's tokens. At the start it changes nothing."""

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.branches = nn.ModuleDict({name: CollaborativeBranch(config) for name in config.encoders})

    def forward(self, tokens: dict[str, Tensor], conds: dict[str, Tensor], keys: dict[str, Keys]) -> dict[str, Tensor]:
        """Per encoder: tokens (B, P+L, D), cond (B, D), keys of P + L tokens -> tokens. All branches read the old ones."""
        refined = {}
        for name, branch in self.branches.items():
            names = [other for other in tokens if other != name]
            others = torch.cat([tokens[other] for other in names], dim=1)  # B sum(P+L) D
            refined[name] = branch(tokens[name], conds[name], others, Keys.join([keys[other] for other in names]))
        return refined


class CollaborativeBranch(Modulated):
    """Cross-attention of own tokens to all other branches' tokens, then feed-forward; no self-attention."""

    def __init__(self, config: LIDiTConfig):
        super().__init__()
        self.modulation = Modulation(config.width, 6)
        self.norm_others = nn.RMSNorm(config.width, eps=EPS)
        self.attention = CrossAttention(config.width, config.heads)
        self.feed_forward = FeedForward(config.width, config.ffn_ratio)

    def forward(self, x: Tensor, cond: Tensor, others: Tensor, keys: Keys) -> Tensor:
        """x (B, P+L, D), cond (B, D), others (B, sum of the other branches' P+L, D) -> (B, P+L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)  # B 1 D each
        update = self.attention(self.modulate(x, shift1, scale1), self.norm_others(others), keys)
        x = self.add_gated(x, gate1, update)
        return self.add_gated(x, gate2, self.feed_forward(self.modulate(x, shift2, scale2)))
