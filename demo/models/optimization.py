"""Loss and optimizers of the demo's language models."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from demo.models.packing import PackedBatch


def weighted_loss(logits: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Weighted mean next-token cross-entropy in nats; logits (B, L, V)."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def build_optimizers(model: PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms.

    With AdamW alone, models this small sat for hundreds of steps before they learned to look a word up in a caption.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [value for value in model.parameters() if value.ndim == 2 and id(value) not in tables]
    others = [value for value in model.parameters() if value.ndim != 2 or id(value) in tables]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
