"""The optimizer of a run: AdamW for everything, or Muon for the matrices of blocks and refiners and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lidit.layers import CrossAttention, FeedForward, SelfAttention
from trainer.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds the optimizer. Weight decay applies to tensors of two or more dimensions; the loop sets the learning rate."""
    groups = parameter_groups(model, config)
    matrices = groups.pop(0) if config.name == "muon" else []
    adamw = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (config.weight_decay, 0.0))],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    return Muon(matrices, adamw, config) if config.name == "muon" else adamw


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[list[torch.Tensor]]:
    """Returns the parameter groups in order: Muon's matrices, those with weight decay, the rest (one group without decay)."""
    parameters = [param for param in model.parameters() if param.requires_grad]
    matrices = muon_matrices(model) if config.name == "muon" else []
    taken = {id(param) for param in matrices}
    others: list[torch.Tensor] = [param for param in parameters if id(param) not in taken]
    rest = [others]
    if config.weight_decay:
        rest = [[param for param in others if _ndim(param) >= 2], [param for param in others if _ndim(param) < 2]]
    return [matrices, *rest] if config.name == "muon" else rest


def muon_matrices(model: nn.Module) -> list[torch.Tensor]:
    """Returns the weights that map hidden states to hidden states: attention and feed-forward layers of blocks and refiners.

    Not those that read input or cond or give the prediction: Muon is made for the others (arXiv 2502.16982).
    """
    layers = [module for module in model.modules() if isinstance(module, SelfAttention | CrossAttention | FeedForward)]
    return [linear.weight for layer in layers for linear in layer.children() if isinstance(linear, nn.Linear)]


class Muon(torch.optim.Optimizer):
    """torch's Muon for some matrices and an AdamW for the rest, as one optimizer.

    Updates of both have about the same size (`match_rms_adamw`), so one learning rate serves them. Muon makes a whole matrix's
    update of a whole gradient: it cannot work on ZeRO's pieces. Groups and state belong to this optimizer and its parts
    together, so whoever replaces a group's parameters, as DeepSpeed does with fp32 masters, does it for all.
    """

    def __init__(self, matrices: list[torch.Tensor], adamw: torch.optim.AdamW, config: OptimizerConfig):
        muon = torch.optim.Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Loads what `state_dict` gave."""
        super().load_state_dict(dict(state_dict))
        self._share()

    def _share(self) -> None:
        muon, adamw = self._parts
        muon.param_groups, adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        muon.state = adamw.state = self.state


def _ndim(param: torch.Tensor) -> int:
    """Returns a parameter's number of dimensions, also where ZeRO-3 has sharded its data away."""
    return len(getattr(param, "ds_shape", param.shape))
