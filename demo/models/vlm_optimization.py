"""What the demo's VLM is taught with: the loss of seeing, patch by patch, and the loss of saying, word by word."""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration

from demo.models.vlm_examples import ASPECTS, IGNORED, VlmBatch

PATCH_WEIGHT = 0.3
"""Weight of the loss of seeing while the model learns to say: the tower keeps what it has learned."""


class VlmStudent(torch.nn.Module):
    """The model and, for training only, a linear head on the tower's patches that tells what each shows."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model = model
        self.head = torch.nn.Linear(
            model.model.vision_tower.config.hidden_size, sum(map(len, ASPECTS.values())) + 2, bias=True
        )

    def forward(self, batch: VlmBatch, speak: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(loss of seeing, loss of saying; None unless `speak`), both means in nats."""
        model = self.model.model
        states = model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-1]  # (B, S, D)
        seeing = patch_loss(self.head(states), batch)
        if not speak:
            return seeing, None
        embeds = model.language_model.embed_tokens(batch.tokens)  # (B, L, D)
        is_patch = (batch.tokens == self.model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_patch, model.multi_modal_projector(states))
        # No padding mask: padding stands behind the caption, and a causal model never looks ahead.
        hidden = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        targets = batch.targets[:, 1:]
        said = targets != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][said])  # (T, V)
        return seeing, torch.nn.functional.cross_entropy(logits, targets[said])


def patch_loss(outputs: torch.Tensor, batch: VlmBatch) -> torch.Tensor:
    """Mean over aspects of the cross-entropy per patch, and the squared error of the centers; outputs (B, S, sizes + 2)."""
    sizes = [len(names) for names in ASPECTS.values()]
    *logits, centers = outputs.split([*sizes, 2], dim=-1)
    losses = [
        torch.nn.functional.cross_entropy(
            logit.flatten(0, 1), batch.labels[..., aspect].flatten(), ignore_index=IGNORED
        )
        for aspect, logit in enumerate(logits)
        if (batch.labels[..., aspect] != IGNORED).any()
    ]
    known = ~batch.centers[..., 0].isnan()
    if known.any():
        losses.append(10 * (centers[known] - batch.centers[known]).square().mean())
    return torch.stack(losses).mean()


def patch_accuracy(outputs: torch.Tensor, batch: VlmBatch) -> dict[str, float]:
    """Share of patches told right, per aspect."""
    *logits, _ = outputs.split([*[len(names) for names in ASPECTS.values()], 2], dim=-1)
    found = {}
    for aspect, (name, logit) in enumerate(zip(ASPECTS, logits)):
        known = batch.labels[..., aspect] != IGNORED
        found[name] = (logit.argmax(-1) == batch.labels[..., aspect])[known].float().mean().item()
    return found


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), float32.

    torch's own computes in bfloat16, which takes a CPU without bfloat16 arithmetic twice as long as the whole model.
    Updates have the size of AdamW's: 0.2 sqrt(larger side) per unit of learning rate.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as published
    ITERATIONS = 5

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = self.orthogonal(matrix.grad.lerp(average, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)

    @classmethod
    def orthogonal(cls, matrix: torch.Tensor) -> torch.Tensor:
        """The nearest matrix with singular values near 1, by Newton-Schulz iterations."""
        a, b, c = cls.COEFFICIENTS
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        wide = wide / (wide.norm() + 1e-7)
        for _ in range(cls.ITERATIONS):
            gram = wide @ wide.T
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def build_vlm_optimizers(student: VlmStudent, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' and the projector's matrices, AdamW for embeddings, norms, biases and the head."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, value in student.named_parameters():
        matrix = value.ndim == 2 and "embed" not in name and not name.startswith("head")
        (matrices if matrix else others).append(value)
    return [
        Muon(matrices, learning_rate),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
