"""How fast is a training step (forward + backward) of LI-DiT? Random weights, no data, no optimizer.

On the CPU, against transformers of diffusers, in turns in one process:
- SD3Transformer2DModel and PixArtTransformer2DModel of about as many parameters, and PixArt of the same depth and width;
  same latents, and as many prompt tokens (LI-DiT's come from two encoders, and its refiners read their instructions too).
- The models' work differs (LI-DiT has refiners, SD3 a second stream, PixArt one modulation for all its blocks), so torch
  counts their FLOPs and FLOP/s stand beside the seconds: how much a model computes, and how well it is computed.

`--cuda`: the 1B shape at 256 px in bf16, prompts of random lengths. Microbatches are swept in several ways of running it:
samples/s, MFU (operations on real tokens, nothing counted twice) against a matmul peak measured beside it, memory; and by
the profiler what share of the GPU's time is no matmul, attention or convolution. Needs torch and transformers alone:
    PYTHONPATH=. python tests/benchmarks/model.py --cuda
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import report
import torch
from encoder import matmul_peak
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from lidit.config import SIZES, LIDiTConfig, lidit_small
from lidit.flops import Flops, model_flops
from lidit.model import LIDiT

LATENTS = (16, 32, 32)  # C H W: 256 px
TEXT_WIDTH, PROMPT_TOKENS, INSTRUCTION_TOKENS = 1024, 60, 30  # of each of two encoders, on the CPU
LENGTHS = (10, 120)  # prompt tokens of each encoder on the GPU, uniform
TARGETS = {"speed": 1.0, "mfu": 0.5}
WARM_UP, STEPS = 3, 8  # on the GPU
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compiled": True},
    "compiled, masks": {"compiled": True, "attention": "sdpa"},
    "compiled, checkpointing": {"compiled": True, "checkpointing": True},
}
KINDS = {  # of kernels, by their names; what matches none is the rest
    "attention": r"flash|fmha|attention|sdpa",
    "convolution": r"conv|fprop|dgrad|wgrad|implicit",
    "matmul": r"gemm|cutlass|nvjet|xmma|cublas|addmm|bmm|::mm$",
}

Step = Callable[[], Tensor]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--batch", type=int, default=2, help="samples of a step on the CPU (2)")
    parser.add_argument("--cuda", action="store_true", help="sweep LI-DiT on a GPU instead")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the sweep (1b)")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 192], help="of the sweep")
    parser.add_argument("--device", default="cuda", help="of the sweep; `cpu` to try it out (cuda)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.cuda:
        sweep(options)
    else:
        compare(options)


# -- on the CPU, against diffusers ------------------------------------------------------------------------------------


def lidit_step(batch: int) -> tuple[Step, torch.nn.Module]:
    """12 blocks, 384 wide, and the refiners."""
    model = LIDiT(lidit_small({"one": TEXT_WIDTH, "two": TEXT_WIDTH}))
    inputs = random_inputs(model.config, batch, (PROMPT_TOKENS, PROMPT_TOKENS), torch.device("cpu"), torch.float32)
    return lambda: model(**inputs).square().mean(), model


def sd3_step(batch: int) -> tuple[Step, torch.nn.Module]:
    """12 blocks, 384 wide: two streams that attend to both, a modulation for each block and stream."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=LATENTS[1], num_layers=12, num_attention_heads=6, attention_head_dim=64,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=384, pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=LATENTS[1] // 2, qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(batch, *LATENTS),
        "encoder_hidden_states": torch.randn(batch, 2 * PROMPT_TOKENS, TEXT_WIDTH),
        "pooled_projections": torch.randn(batch, TEXT_WIDTH),
        "timestep": torch.rand(batch) * 1000,
    }
    return lambda: model(**inputs, return_dict=False)[0].square().mean(), model


def pixart_step(batch: int, depth: int) -> tuple[Step, torch.nn.Module]:
    """384 wide: self- and cross-attention, one modulation for all blocks."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=16, out_channels=16, num_layers=depth,
        cross_attention_dim=384, sample_size=LATENTS[1], caption_channels=TEXT_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(batch, *LATENTS),
        "encoder_hidden_states": torch.randn(batch, 2 * PROMPT_TOKENS, TEXT_WIDTH),
        "encoder_attention_mask": torch.ones(batch, 2 * PROMPT_TOKENS),
        "timestep": torch.rand(batch) * 1000,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return lambda: model(**inputs, return_dict=False)[0].square().mean(), model


OURS = "LI-DiT"
COMPARED: dict[str, Callable[[int], tuple[Step, torch.nn.Module]]] = {
    OURS: lidit_step,
    "SD3, same size": sd3_step,
    "PixArt, same size": lambda batch: pixart_step(batch, depth=26),
    "PixArt, same depth and width": lambda batch: pixart_step(batch, depth=12),
}


def compare(options: argparse.Namespace) -> None:
    batch = options.batch
    models = {name: make(batch) for name, make in COMPARED.items()}
    flops = {name: counted_flops(step) for name, (step, _) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks = []
    for _ in range(options.repeats):
        peaks.append(matmul_rate())
        for name, (step, _) in models.items():
            start = time.process_time()  # of this process alone: whoever else is on the machine does not count
            step().backward()
            seconds[name].append(time.process_time() - start)
    peak, rows = statistics.median(peaks), []
    for name, times in seconds.items():
        faster = statistics.median(theirs / own for theirs, own in zip(times, seconds[OURS]))
        better = faster * flops[OURS] / flops[name]  # in FLOP/s
        low, middle, high = (pick(times) / batch for pick in (min, statistics.median, max))
        rate = flops[name] / batch / middle
        rows.append([
            name, f"{count(models[name][1]) / 1e6:.1f} M", f"{flops[name] / batch / 1e9:.0f}", f"{middle:.2f}",
            f"{low:.2f}-{high:.2f}", f"{rate / 1e9:.1f}", f"{rate / peak:.0%}", "" if name == OURS else f"{faster:.2f}x",
            "" if name == OURS else report.verdict(better, TARGETS["speed"], form="{:.2f}x"),
        ])  # fmt: skip
    made = report.Report(f"Model: forward + backward against diffusers, fp32 on CPU, torch threads {options.threads}")
    header = ["model", "parameters", "GFLOP a sample", "CPU s a sample", "range", "GFLOP/s", "of the peak",
              "LI-DiT takes less time", "LI-DiT computes faster"]  # fmt: skip
    title = (
        f"batch {batch}, latents {LATENTS}, {2 * PROMPT_TOKENS} prompt tokens, LI-DiT's refiners read "
        f"{2 * INSTRUCTION_TOKENS} more; matmul peak {peak / 1e9:.0f} GFLOP/s"
    )
    made.table(title, header, rows)
    made.record(options.record)


def matmul_rate(size: int = 1024) -> float:
    """FLOP/s of the best of several square matmuls, in the process's own time like the models."""
    a, b, times = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(10):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * size**3 / min(times)


def counted_flops(step: Step) -> float:
    """Of forward and backward, by torch's counter; warms up, too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the kernel whose matmuls it knows
        step().backward()
    return counter.get_total_flops()


def count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def sweep(options: argparse.Namespace) -> None:
    device, config = torch.device(options.device), SIZES[options.size]()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    rows, mfu = [], {}
    for way, how in WAYS.items():
        model = build(config, device, **how)
        for batch in options.microbatches:
            row, mfu[way, batch] = measure(model, batch, device, options.repeats)
            rows.append([way, str(batch), *row])
            print("  ".join(rows[-1]), flush=True)
        del model
        gc.collect()
    best = max(mfu, key=lambda key: mfu[key])
    made = report.Report(f"Model: LI-DiT {options.size}, bf16, 256 px, on {gpu or 'CPU'}", gpu)
    header = [
        "way",
        "microbatch",
        "ms a step",
        "range",
        "samples/s",
        "peak, TFLOP/s",
        "MFU",
        "GB at most",
        "GB of activations",
    ]
    title = f"forward + backward; prompts of {LENGTHS[0]} to {LENGTHS[1]} tokens from each of {len(config.encoders)} encoders"
    made.table(title, header, rows)
    verdict = report.verdict(mfu[best], TARGETS["mfu"], form="{:.1%}")
    made.table("best", ["way", "microbatch", "MFU"], [[best[0], str(best[1]), verdict]])
    profile(made, build(config, device, **WAYS[best[0]]), best[1], device)
    made.record(options.record)


def build(
    config: LIDiTConfig,
    device: torch.device,
    compiled: bool = False,
    attention: Any = "auto",
    checkpointing: bool = False,
) -> LIDiT:
    """Random weights, those that start at zero included: zeros would be no ordinary numbers to multiply."""
    with device:
        model = LIDiT(config).to(dtype_on(device))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
    model.set_attention(attention).set_checkpointing(checkpointing)
    return model.compile_regions() if compiled else model


def random_inputs(
    config: LIDiTConfig, batch: int, lengths: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of `LIDiT.forward`; the same for the same batch."""
    draw = torch.Generator().manual_seed(batch)
    embeds, masks = {}, {}
    for name, width in config.encoders.items():
        own = torch.randint(lengths[0], lengths[1] + 1, (batch, 1), generator=draw)
        masks[name] = (torch.arange(int(own.max()))[None] < own).to(device)
        embeds[name] = torch.randn(*masks[name].shape, width, device=device, dtype=dtype)
    return {
        "noisy_latents": torch.randn(batch, config.in_channels, *LATENTS[1:], device=device),
        "timestep": torch.rand(batch, device=device),
        "prompt_embeds": embeds,
        "prompt_mask": masks,
        "instruction_embeds": {
            name: torch.randn(INSTRUCTION_TOKENS, width, device=device, dtype=dtype)
            for name, width in config.encoders.items()
        },
    }


def measure(model: LIDiT, batch: int, device: torch.device, repeats: int) -> tuple[list[str], float]:
    """Cells of a row, and the MFU (0 where memory does not suffice)."""
    inputs = random_inputs(model.config, batch, LENGTHS, device, dtype_on(device))
    tokens = {name: float(mask.sum()) / batch for name, mask in inputs["prompt_mask"].items()}
    instruction = dict.fromkeys(tokens, INSTRUCTION_TOKENS)
    flops = sum(model_flops(model.config, LATENTS[1:], tokens, instruction, batch).values(), Flops()).total * batch
    try:
        for _ in range(WARM_UP):
            train_step(model, inputs)
        memory = memory_of(model, inputs, device)
        times, peaks = [], []
        for _ in range(repeats):
            peaks.append(matmul_peak(device, dtype_on(device)))
            start = time.perf_counter()
            for _ in range(STEPS):
                train_step(model, inputs)
            synchronise(device)
            times.append((time.perf_counter() - start) / STEPS)
    except torch.OutOfMemoryError:
        return ["out of memory", *[""] * 6], 0.0
    finally:
        model.zero_grad(set_to_none=True)
    middle, peak = statistics.median(times), statistics.median(peaks)
    mfu = flops / middle / peak
    return [
        f"{middle * 1e3:.1f}", f"{min(times) * 1e3:.1f}-{max(times) * 1e3:.1f}", f"{batch / middle:.1f}",
        f"{peak / 1e12:.1f}", f"{mfu:.1%}", *memory,
    ], mfu  # fmt: skip


def train_step(model: LIDiT, inputs: dict[str, Any]) -> None:
    model(**inputs).square().mean().backward()
    model.zero_grad(set_to_none=True)


def memory_of(model: LIDiT, inputs: dict[str, Any], device: torch.device) -> list[str]:
    """GB at the worst moment of a step, and how many of them are there between forward and backward, weights not counted."""
    if device.type != "cuda":
        return ["", ""]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = model(**inputs).square().mean()
    activations = torch.cuda.memory_allocated(device) - before
    loss.backward()
    model.zero_grad(set_to_none=True)
    return [f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}", f"{activations / 1e9:.1f}"]


def profile(made: report.Report, model: LIDiT, batch: int, device: torch.device) -> None:
    """What the device's time goes into, by kind of kernel, and the largest of the rest by name."""
    inputs = random_inputs(model.config, batch, LENGTHS, device, dtype_on(device))
    for _ in range(WARM_UP):
        train_step(model, inputs)
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        train_step(model, inputs)
        synchronise(device)
    times, rest = Counter[str](), Counter[str]()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(event.key)
        times[kind] += spent
        if kind == "rest":
            rest[event.key] += spent
    whole = sum(times.values())
    rows = [[kind, f"{spent / 1e3:.1f}", f"{spent / whole:.1%}"] for kind, spent in times.most_common()]
    made.table(f"where the time goes, microbatch {batch}", ["kind of kernel", "ms", "share"], rows)
    rows = [[name[:90], f"{spent / 1e3:.1f}", f"{spent / whole:.1%}"] for name, spent in rest.most_common(12)]
    made.table("largest of the rest", ["kernel", "ms", "share"], rows)


def kind_of(kernel: str) -> str:
    if not kernel.startswith("triton"):  # ours are pointwise, whatever their names tell of
        for kind, pattern in KINDS.items():
            if re.search(pattern, kernel, re.IGNORECASE):
                return kind
    return "rest"


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16; but the CPU, where the sweep is only tried out, may take minutes for a matmul in it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
