"""How much faster is `PromptEncoder.encode` than the loops it replaces? Same model, same prompts, same states.

- naive: 64 prompts at a time in file order, each row the instruction and the prompt padded to 256 prompt tokens, all
  blocks, the states of all layers kept (`output_hidden_states`).
- careful: the same, padded to the longest of the batch.
- encode: shared prefix, blocks up to the chosen one, batches by length; its codec's packing included.

All get token ids and end with the chosen layer's states on the host. Naive and careful run on `--subset` prompts, whole
batches drawn evenly from the batches sorted by length, and are scaled by the slots (rows x tokens) they compute. The three
take turns in one process; figures are medians over the repeats.

Prompts: T2I-CompBench validation, PartiPrompts, dense DrawBench (4,232), read from ../shared/data or $LIDIT_TEST_DATA.
Where lidit is not installed (torch and transformers are enough):
    PYTHONPATH=. python tests/benchmarks/encoder.py --shape small
    PYTHONPATH=. python tests/benchmarks/encoder.py --shape 8b --device cuda
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import report
import torch
import transformers
from safetensors.torch import save_file

from lidit.frozen.early_exit import blocks_of, early_exit_hook
from lidit.frozen.text import DTYPES, EncoderConfig, PromptEncoder

ROWS = 64  # of a batch of the loops
PAD_TO = 256  # prompt tokens of the naive loop
SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
              "intermediate_size": 688},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336},
}  # fmt: skip
TARGETS = {"naive": 15.0, "careful": 5.0, "padding": 0.05, "peak": 0.6}


def write_shape(shape: str, folder: Path) -> None:
    """A model folder of random weights with Qwen3's tokenizer. The 8B one's weights are made on the GPU, not here."""
    for file in (report.data_folder() / "tokenizers" / "qwen3").iterdir():
        if file.name != "model_config.json":
            shutil.copyfile(file, folder / file.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocab = -(-len(tokenizer) // 64) * 64
    config = transformers.LlamaConfig(**SHAPES[shape], vocab_size=vocab, max_position_embeddings=4096)
    config.save_pretrained(folder)
    if shape == "small":
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    else:
        save_file({"stands.for.weights": torch.zeros(1)}, folder / "model.safetensors")


def load(encoder: PromptEncoder, shape: str | None, lm_head: bool) -> torch.nn.Module:
    """The whole model for the loops; the encoder's own cut one is loaded too (for the 8B shape it shares the weights)."""
    config = transformers.AutoConfig.from_pretrained(encoder.folder)
    dtype = DTYPES[encoder.config.dtype]
    loader = transformers.AutoModelForCausalLM if lm_head else transformers.AutoModel
    if shape != "8b":
        _ = encoder.model
        model = loader.from_pretrained(encoder.folder, dtype=dtype)
        return model.requires_grad_(False).eval().to(encoder.device)
    torch.manual_seed(0)
    with encoder.device:
        model = loader.from_config(config, dtype=dtype).requires_grad_(False).eval()
    base = model.get_decoder() if lm_head else model
    config = transformers.AutoConfig.from_pretrained(encoder.folder, num_hidden_layers=encoder.layer)
    with torch.device("meta"):
        cut = transformers.AutoModel.from_config(config, dtype=dtype)
    cut.load_state_dict(base.state_dict(), strict=False, assign=True)
    cut.rotary_emb = base.rotary_emb
    if encoder.layer < encoder.num_blocks:
        blocks_of(cut, encoder.layer)[-1].register_forward_hook(early_exit_hook)
    encoder.model = cut.requires_grad_(False).eval()
    return model


def loop(
    model: torch.nn.Module, encoder: PromptEncoder, batches: list[list[list[int]]], pad_to: int | None
) -> tuple[float, list[torch.Tensor]]:
    """Batches of prompts' ids -> seconds, and the chosen layer's states of all slots, one (B, L, E) per batch, on the host."""
    made, prefix = [], encoder.prefix_ids
    start = time.perf_counter()
    for ids in batches:
        longest = max(pad_to or 0, *map(len, ids)) + len(prefix)
        input_ids = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(prefix) + len(tokens)] = torch.tensor(prefix + tokens)
            mask[row, : len(prefix) + len(tokens)] = 1
        with torch.inference_mode():
            states = model(
                input_ids=input_ids.to(encoder.device),
                attention_mask=mask.to(encoder.device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        made.append(states[encoder.layer][:, len(prefix) :].to("cpu"))
    return time.perf_counter() - start, made


def encode(encoder: PromptEncoder, ids: list[list[int]], batch_tokens: int) -> tuple[float, int]:
    """The encoder over all prompts, its results kept: seconds and slots."""
    start = time.perf_counter()
    made = list(encoder.encode(ids, batch_tokens))
    return time.perf_counter() - start, sum(batch.slots for batch in made)


def draw(batches: list[list[list[int]]], prompts: int, seed: int = 0) -> list[list[list[int]]]:
    """Whole batches of about that many prompts, evenly from those sorted by their longest, from a seeded start."""
    count = min(len(batches), max(1, -(-prompts // ROWS)))
    order = sorted(range(len(batches)), key=lambda index: max(map(len, batches[index])))
    places = (np.arange(count) + np.random.default_rng(seed).random()) * len(batches) / count
    return [batches[order[int(place)]] for place in places]


def slots(batches: list[list[list[int]]], prefix: int, pad_to: int | None) -> int:
    """Rows x tokens that a loop over these batches computes."""
    return sum(len(ids) * (prefix + max(pad_to or 0, *map(len, ids))) for ids in batches)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large square matmuls."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(20 if device.type == "cuda" else 5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def flops(encoder: PromptEncoder, ids: list[list[int]]) -> float:
    """What the prompts' real tokens need: 2 per block parameter and token, and the causal attention over the prefix too."""
    block = blocks_of(encoder.model, encoder.layer)[-1]
    parameters = encoder.layer * sum(weight.numel() for weight in block.parameters())
    config, prefix = encoder.text_config, len(encoder.prefix_ids)
    heads = config.num_attention_heads
    channels = heads * (getattr(config, "head_dim", None) or encoder.width // heads)
    lengths = np.array([len(tokens) for tokens in ids], float)
    pairs = (lengths * prefix + lengths * (lengths + 1) / 2).sum()  # of a query and a key that it sees
    return 2 * parameters * lengths.sum() + 4 * channels * pairs * encoder.layer


def largest_difference(encoder: PromptEncoder, ids: list[list[int]], states: torch.Tensor) -> float:
    """Between the careful loop's states of a batch and the encoder's, over the largest value."""
    ours, mask = (tensor.cpu() for tensor in encoder.forward(ids))
    ours, states = ours.float(), states.float()
    theirs = states[:, : ours.shape[1]]
    return ((ours - theirs).abs()[mask].max() / theirs.abs()[mask].max()).item()


def main() -> None:
    parser = report.parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", choices=SHAPES, default=None, help="random weights of that shape (small)")
    which.add_argument("--model", help="folder of a model with a tokenizer")
    parser.add_argument("--template", choices=("chat", "plain"), help="default: chat if the tokenizer has a template")
    parser.add_argument("--device", default=None, help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--subset", type=int, default=512, help="prompts that naive and careful are timed on (512)")
    parser.add_argument(
        "--lm-head", action="store_true", help="the loops run the LM head too, as a CausalLM class does"
    )
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of encode (8192)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = None if options.model else options.shape or "small"
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if shape == "8b" and device.type != "cuda":
        parser.error("--shape 8b needs a CUDA device with at least 40 GB")
    with tempfile.TemporaryDirectory() as folder:
        if shape:
            write_shape(shape, Path(folder))
        model_folder = options.model or folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
        config = EncoderConfig(
            name="benchmark",
            model=model_folder,
            template=options.template or ("chat" if tokenizer.chat_template else "plain"),
            max_prompt_tokens=PAD_TO,
            dtype=options.dtype or ("bf16" if device.type == "cuda" else "fp32"),
        )
        encoder = PromptEncoder(config, device)
        measure(options, encoder, load(encoder, shape, options.lm_head), shape or Path(model_folder).name)


def measure(options, encoder: PromptEncoder, model: torch.nn.Module, name: str) -> None:
    device, prefix = encoder.device, len(encoder.prefix_ids)
    ids, _ = encoder.tokenize(report.real_prompts())
    tokens = sum(map(len, ids))
    pad_to = encoder.max_prompt_tokens
    batches = [ids[first : first + ROWS] for first in range(0, len(ids), ROWS)]
    drawn = draw(batches, options.subset)
    difference = largest_difference(encoder, drawn[0], loop(model, encoder, drawn[:1], None)[1][0])  # warms up, too
    encode(encoder, ids[: 2 * ROWS], options.batch_tokens)
    whole = {"naive": slots(batches, prefix, pad_to), "careful": slots(batches, prefix, None)}
    seconds: dict[str, list[float]] = {"naive": [], "careful": [], "encode": []}
    peaks: list[float] = []
    for _ in range(options.repeats):
        peaks.append(matmul_peak(device, DTYPES[encoder.config.dtype]))
        for way, pad in (("naive", pad_to), ("careful", None)):
            took, _ = loop(model, encoder, drawn, pad)
            seconds[way].append(took * whole[way] / slots(drawn, prefix, pad))
        took, whole["encode"] = encode(encoder, ids, options.batch_tokens)
        seconds["encode"].append(took)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    made = report.Report(
        f"Encoder: {name}, {encoder.config.dtype} on {gpu or 'CPU'}, torch threads {options.threads}", gpu
    )
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    rows = []
    for way, times in seconds.items():
        ratio = statistics.median(t / e for t, e in zip(times, seconds["encode"]))
        low, mid, high = (pick(times) / len(ids) * 1e3 for pick in (min, statistics.median, max))
        rows.append([
            way, f"{mid:.3f}", f"{low:.3f}-{high:.3f}", f"{tokens / middle[way]:,.0f}", f"{tokens / whole[way]:.1%}",
            "" if way == "encode" else report.verdict(ratio, TARGETS[way]),
        ])  # fmt: skip
    title = (
        f"{len(ids):,} prompts, {tokens:,} tokens (instruction: {prefix} more), states of block {encoder.layer} of "
        f"{encoder.num_blocks}, width {encoder.width}; loops{' with LM head' * options.lm_head} timed on "
        f"{sum(map(len, drawn)):,} prompts"
    )
    header = ["way", "ms a prompt", "range", "prompt tokens/s", "slots with a prompt token", "encode is faster"]
    made.table(title, header, rows)
    peak = statistics.median(peaks)
    share = flops(encoder, ids) / middle["encode"] / peak
    goal = f"{share:.1%}" if device.type != "cuda" else report.verdict(share, TARGETS["peak"], form="{:.1%}")
    waste = 1 - tokens / whole["encode"]
    figures = [
        ["padding waste", report.verdict(waste, TARGETS["padding"], at_least=False, form="{:.1%}")],
        ["matmul peak", f"{peak / 1e12:,.3f} TFLOP/s"],
        ["share of the peak", goal],
        ["largest difference from the careful loop", f"{difference:.1e} of the largest value"],
    ]
    made.table("encode", ["figure", "value"], figures)
    made.record(options.record)


if __name__ == "__main__":
    main()
