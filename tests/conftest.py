"""What all tests share: where the test data lies, and tiny models made on the spot."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Started in the background by a shell, this process ignores Ctrl-C, and the jobs that it starts would, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real prompts, photos and tiny LLMs; tests that need it say so when they skip."""
    folder = Path(os.environ.get("LIDIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the test data in {folder} (or in the folder that LIDIT_TEST_DATA names)")
    return folder


WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "circle",
    "square",
    "star",
    "left",
    "right",
    "above",
    "below",
    "of",
    "the",
    "a",
    "and",
    "on",
    "with",
    "two",
    "three",
]


def make_llm(folder: Path, seed: int = 0, width: int = 32, blocks: int = 4) -> Path:
    """Writes a Llama of transformers' own class with random weights, and a word tokenizer with byte fallback."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=width, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny LLMs of different widths."""
    root = tmp_path_factory.mktemp("llms")
    return {"one": make_llm(root / "one", seed=1), "two": make_llm(root / "two", seed=2, width=48)}


@pytest.fixture
def world(tmp_path: Path, llms: dict[str, Path]) -> World:
    """A store to be, prompts to put in, and a config for both tiny LLMs."""
    return World(tmp_path, llms)


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """For fixtures that need a world of their own."""
    return World


class World:
    """A small job: writes prompts and config, runs `lidit` in a process of its own, reads the store back."""

    def __init__(self, folder: Path, llms: dict[str, Path]):
        self.folder, self.llms, self.store = folder, llms, folder / "store"

    def prompts(self, count: int, seed: int = 0, name: str = "prompts.txt") -> Path:
        """A file of distinct prompts."""
        import random

        draw = random.Random(seed)
        lines = [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for number in range(count)]
        path = self.folder / name
        path.write_text("\n".join(lines))
        return path

    def config(self, **changes: Any) -> Path:
        """Writes the embed job's YAML; `changes` replace top-level keys."""
        encoders = [
            {"name": name, "model": str(path), "template": "plain", "dtype": "fp32", "codec": "bf16"}
            for name, path in self.llms.items()
        ]
        values = {
            "store": str(self.store),
            "text": ["caption"],
            "encoders": encoders,
            "batch_tokens": 2048,
            "actors": {"min": 1, "max": 1},
            "commit": {"fragments": 1, "seconds": 0.0},
            **changes,
        }
        path = self.folder / "embed.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def start(self, *argv: object) -> subprocess.Popen[str]:
        """Starts `lidit ARGV` in a process of its own."""
        command = [sys.executable, "-m", "lidit.cli", *map(str, argv)]
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, process: subprocess.Popen[str], expect: int = 0) -> Result:
        """Waits for it; asserts the exit status."""
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit status {process.returncode}, not {expect}\n{stderr}"
        return Result(stdout, stderr)

    def run(self, *argv: object, expect: int = 0) -> Result:
        """Runs `lidit ARGV` to its end."""
        return self.finish(self.start(*argv), expect)

    def ingest(self, prompts: Path, rows_per_fragment: int = 50) -> Result:
        """Ingests a prompt file."""
        flags = ("--source", f"prompts:{prompts}", "--rows-per-fragment", rows_per_fragment)
        return self.run("ingest", "--store", self.store, *flags)

    # -- reading back -------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Any:
        """The samples table, newest version."""
        import lance

        return lance.dataset(str(self.store / "samples.lance"))

    def rows(self) -> dict[str, dict[str, Any]]:
        """image_id -> all columns of the row; asserts that no id is there twice."""
        rows = self.table.to_table().to_pylist()
        by_id = {row["image_id"]: row for row in rows}
        assert len(by_id) == len(rows)
        return by_id

    def orphans(self) -> set[str]:
        """Data files that no version refers to."""
        dataset = self.table
        paths = set(dataset.all_files().read_all()["path"].to_pylist())
        known = set(dataset.tracked_files().read_all()["path"].to_pylist())
        return {path for path in paths - known if path.startswith(("data/", "_unfinished/"))}

    def data_files(self) -> list[Path]:
        """Column files that embed runs have begun."""
        return sorted((self.store / "samples.lance" / "data").glob("embed-*.lance"))

    def committed(self, column: str = "caption_embeds_one") -> int:
        """Fragments that have the column."""
        from pipelines.engine.table import Table

        table = Table(str(self.store / "samples.lance"))
        dataset = table.open()
        return len(dataset.get_fragments()) - len(table.missing([column], dataset))


class Result:
    """What a finished job printed."""

    def __init__(self, stdout: str, stderr: str):
        self.stdout, self.stderr = stdout, stderr

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON on the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Polls until the condition holds; fails if the time is over, or the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        assert process is None or process.poll() is None, f"the job ended first:\n{process.communicate()[1]}"
        time.sleep(0.005)


def stop_when(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Waits like `wait_until`, and leaves the process stopped (SIGSTOP) at the moment that was looked for.

    It is stopped for every look, and the actors of its units with it: on a busy machine a look takes longer than what is
    looked for lasts, and a driver that finds all units done commits them at once. The actors go on in the end: a stopped
    one would outlive its driver.
    """

    def reached() -> bool:
        process.send_signal(signal.SIGSTOP)
        actors = unit_actors(process.pid)
        send(signal.SIGSTOP, actors)
        try:
            if condition():
                return True
        finally:
            send(signal.SIGCONT, actors)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        return False

    wait_until(reached, process, seconds)


def unit_actors(pid: int) -> list[int]:
    """Process ids of the actors that work on the units of a driver (or of a raylet)."""
    return [child for child, name in descendants(pid).items() if "_UnitCaller" in name]


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Sends a signal to those of the processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of all processes below one."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(stat[1])
    below, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in below} - below
        below |= more
        grown = bool(more)
    return {child: names[child] for child in below - {pid}}


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def tools() -> Any:
    """For tests that watch a job's processes: `wait_until`, `stop_when`, `descendants`, `unit_actors`, `send`, `running`."""
    return SimpleNamespace(
        wait_until=wait_until,
        stop_when=stop_when,
        descendants=descendants,
        unit_actors=unit_actors,
        send=send,
        running=running,
    )


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """`photo(seed)`: a small JPEG that looks like nothing else; keywords: size, format, quality, noise, and Pillow's own."""
    import io

    import numpy as np
    from PIL import Image

    def make(
        seed: int, size: tuple[int, int] = (96, 64), format: str = "JPEG", noise: int = 8, **options: Any
    ) -> bytes:
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (6, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        values = np.asarray(coarse, np.int16) + draw.integers(-noise, noise + 1, (size[1], size[0], 3))
        made, out = Image.fromarray(values.clip(0, 255).astype(np.uint8)), io.BytesIO()
        made.save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def zoo(photo: Callable[..., bytes]) -> SimpleNamespace:
    """`good`: name -> bytes of unusual images that are whole; `bad`: name -> (bytes, a word of the reason to be given)."""
    import io
    import struct
    import zlib

    import numpy as np
    from PIL import Image

    def saved(image: Image.Image, format: str, **options: Any) -> bytes:
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    jpeg, png = photo(1), photo(2, format="PNG")
    rgb = Image.open(io.BytesIO(png)).convert("RGB")
    frames = [rgb, rgb.transpose(Image.Transpose.ROTATE_180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "grey16.png": saved(Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10), "PNG"),
        "palette.png": saved(rgb.convert("P"), "PNG", transparency=0),
        "alpha.png": saved(rgb.convert("RGBA"), "PNG"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "rotated.jpg": saved(rgb, "JPEG", exif=exif),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "one_pixel.png": saved(Image.new("RGB", (1, 1)), "PNG"),
        "png_named.jpg": png,
        "tiff.tif": saved(rgb, "TIFF"),
        "bmp.bmp": saved(rgb, "BMP"),
    }
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(3751)) for _ in range(30_000)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    bad = {
        "empty.jpg": (b"", "0 bytes"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated|cut short"),
        "cut.png": (png[: len(png) // 2], "truncated|cut short"),
        "header_only.jpg": (jpeg[:20], "cannot be read|not an image|truncated|cut short"),
        "bomb.png": (bomb, "900000000|30000 x 30000"),
        "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        "text.jpg": (b"this is no picture\n", "text, not an image"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        "random.jpg": (np.random.default_rng(3).bytes(500), "not an image"),
    }
    return SimpleNamespace(good=good, bad=bad)


@pytest.fixture(scope="session")
def ray_here() -> Any:
    """A local Ray for jobs that run inside the test's own process."""
    import ray

    from pipelines.engine.pool import start_ray_data

    start_ray_data()
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def vlm_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`transformers serve` with the demo's VLM on this machine's loopback: a real server of the OpenAI protocol.

    `url` is its base URL, `model` the name to ask for.
    """
    import socket
    import urllib.error
    import urllib.request

    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = str(ROOT / "demo" / "vlm")
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        command = [str(Path(sys.executable).with_name("transformers")), "serve", model, *flags]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            return False

    try:
        wait_until(answers)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", model=model, port=port)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def scene_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a very small, untrained LI-DiT for the demo's encoders and autoencoder, as the trainer exports them."""
    import dataclasses

    import torch

    from lidit.config import LIDiTConfig
    from lidit.diffusion import Flow, objective_to_dict
    from lidit.frozen.text import EncoderConfig, PromptEncoder
    from lidit.frozen.vae import VAE
    from lidit.layers import ZeroLinear
    from lidit.model import LIDiT
    from lidit.weights import save_weights

    configs = [
        EncoderConfig(name, str(ROOT / "demo" / "encoders" / f"{name}-tuned"), dtype="fp32", max_prompt_tokens=48)
        for name in ("llama", "qwen")
    ]
    encoders = [PromptEncoder(config, "cpu") for config in configs]
    torch.manual_seed(0)
    widths = {encoder.config.name: encoder.width for encoder in encoders}
    model = LIDiT(LIDiTConfig(widths, depth=1, width=32, heads=2, in_channels=4))
    for module in model.modules():
        if isinstance(module, ZeroLinear):
            torch.nn.init.normal_(module.weight, std=0.2)
    vae = str(ROOT / "demo" / "vae")
    extra = {
        "objective": objective_to_dict(Flow()),
        "encoders": {
            encoder.config.name: {"config": dataclasses.asdict(encoder.config), "fingerprint": encoder.fingerprint()}
            for encoder in encoders
        },
        "vae": {"model": vae, "fingerprint": VAE(vae, device="cpu").fingerprint()},
        "image_size": [16, 24],
    }
    return save_weights(tmp_path_factory.mktemp("scene") / "weights", model, extra=extra)


@pytest.fixture(scope="session")
def cloud() -> Any:
    """`tests/cluster_world.py`: an S3 server and Ray nodes on this machine."""
    return _module("cluster_world")


@pytest.fixture(scope="session")
def s3(cloud: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of S3's protocol; its buckets are the tests' to name."""
    server = cloud.S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.service.stop()


@pytest.fixture(scope="session")
def s3_proxy() -> Any:
    """`tests/s3_proxy.py`: what object stores do on a bad day."""
    return _module("s3_proxy")


@pytest.fixture(scope="session")
def training() -> Any:
    """`tests/train_world.py`: small stores and configs to train with, a plain loop to compare with, ranks to kill."""
    module = _module("train_world")
    yield module
    module.close_ranks()


@pytest.fixture(scope="module")
def ray_for_training(training: Any) -> Any:
    """One local Ray for all training jobs of a file; its workers get the observers of `training` by value."""
    import ray

    before = {name: os.environ.get(name) for name in training.ENVIRONMENT}
    os.environ.update(training.ENVIRONMENT)
    ray.cloudpickle.register_pickle_by_value(training)
    yield
    ray.cloudpickle.unregister_pickle_by_value(training)
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def _module(name: str) -> Any:
    """A file of the tests that several of them share."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what it defines can be pickled
    spec.loader.exec_module(module)
    return module
