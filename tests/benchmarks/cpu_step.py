"""Forward and backward pass of the demo's LI-DiT on a CPU: fp32 or bf16, plain or with compiled blocks, side by side.

What bf16 brings depends on the processor: with matrix units for it (AMX) its matmuls are several times as fast. And
attention, backward and forward, by torch's own bf16 kernel against what `lidit.attention` does instead.
Random weights and inputs, one thread, ways taken in turns. Compiling needs a C++ compiler.

    PYTHONPATH=. python tests/benchmarks/cpu_step.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import report
import torch
import torch.nn.functional as F

from lidit.attention import attention
from lidit.config import LIDiTConfig, lidit_tiny
from lidit.model import LIDiT

BATCH, TOKENS, LATENTS = 64, 16, (4, 12, 12)  # of the demo's weights: 48 x 48 pixels, 36 image tokens
WAYS = {
    "fp32": (torch.float32, False),
    "fp32, blocks compiled": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "bf16, blocks compiled": (torch.bfloat16, True),
}


def main() -> None:
    parser = report.parser(__doc__, repeats=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = lidit_tiny(in_channels=4, depth=6, instruction="cut", position="rope")
    steps = {way: step(config, *choice) for way, choice in WAYS.items()}
    kernels = {"torch's bf16 kernel": attend(plain), "lidit.attention": attend(attention)}
    times = in_turns({**steps, **kernels}, options.repeats)
    made = report.Report(f"Training step on a CPU: precision and compiled blocks, torch threads {options.threads}")
    base = statistics.median(times["fp32"])
    made.table(
        f"forward + backward, {BATCH} samples of 36 image tokens, prompts of 2 x {TOKENS} tokens; medians of {options.repeats}",
        ["way", "ms", "range", "samples/s", "against fp32"],
        [
            [
                way,
                f"{statistics.median(times[way]) * 1e3:.0f}",
                f"{min(times[way]) * 1e3:.0f}-{max(times[way]) * 1e3:.0f}",
                f"{BATCH / statistics.median(times[way]):.0f}",
                f"{base / statistics.median(times[way]):.2f}x",
            ]
            for way in steps
        ],
    )
    made.table(
        "self-attention in bf16, forward + backward, 64 samples of 36 tokens, 4 heads of 32 channels",
        ["way", "ms", "range"],
        [
            [
                way,
                f"{statistics.median(times[way]) * 1e3:.2f}",
                f"{min(times[way]) * 1e3:.2f}-{max(times[way]) * 1e3:.2f}",
            ]
            for way in kernels
        ],
    )
    made.record(options.record)


def step(config: LIDiTConfig, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """A forward and backward pass, ready to be called again and again."""
    torch.manual_seed(0)
    model = LIDiT(config).to(dtype)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)  # those that start at zero too
    if compiled:
        model.compile_blocks()
    inputs: dict[str, Any] = {
        "noisy_latents": torch.randn(BATCH, *LATENTS),
        "timestep": torch.rand(BATCH),
        "prompt_embeds": {name: torch.randn(BATCH, TOKENS, width) for name, width in config.encoders.items()},
        "prompt_mask": {name: torch.ones(BATCH, TOKENS, dtype=torch.bool) for name in config.encoders},
        "instruction_embeds": {name: torch.randn(0, width) for name, width in config.encoders.items()},
    }

    def run() -> None:
        model(**inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, S, N, K) each, as they are, to torch's attention."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Forward and backward pass of attention in bf16."""
    tensors = [torch.randn(BATCH, 36, 4, 32).bfloat16().requires_grad_() for _ in range(3)]

    def run() -> None:
        function(*tensors).sum().backward()

    return run


def in_turns(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one after the other, `repeats` times: what slows the machine meanwhile slows all."""
    for run in ways.values():
        for _ in range(2):
            run()  # compiles
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            for _ in range(4):
                run()
            times[way].append((time.perf_counter() - start) / 4)
    return times


if __name__ == "__main__":
    main()
