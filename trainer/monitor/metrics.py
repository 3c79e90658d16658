"""Logs a training run: JSON lines, TensorBoard, Ray's gauges, and Weights & Biases where the extra is installed.

    metrics.jsonl       one object per line: `kind` (train, validation), `step`, figures; what other tools should read
    starts.jsonl        one object for every time that the ranks were started: from which step, when, how many
    tensorboard/        the figures of metrics.jsonl, and sample grids

Rank 0 writes. A run that resumes at step n first drops the lines of later steps: they are of a future that did not happen.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lidit.runtime.durable import publish
from trainer.config import MetricsConfig
from trainer.storage import Storage

LINES = "metrics.jsonl"
STARTS = "starts.jsonl"
TENSORBOARD = "tensorboard"
EXPORTED = {  # kind -> figure that Ray exports -> what it is
    "train": {
        "loss": "Mean loss over samples since the last line.",
        "grad_norm": "Gradient norm before clipping.",
        "samples_per_second": "Samples a second, all ranks together.",
        "tokens_per_second": "Image and prompt tokens a second, all ranks together.",
        "data_wait": "Share of the time that ranks waited for data, 0 to 1.",
        "memory_gb": "Most memory in use on rank 0, GB.",
        "mfu": "Model FLOPs as a share of the devices' peak, 0 to 1.",
        "skipped": "Steps since the last line whose loss or gradient was not finite.",
    },
    "validation": {"loss": "Held-out loss.", "ema_loss": "Held-out loss of the averaged weights."},
}
STEP_GAUGE = "lidit_train_step"


class MetricsWriter:
    """Writes figures; on rank 0.

    Args:
        storage: the run's folder; a remote one gets the files at every `flush`.
        config: where to.
        run: name of the run.
        step: that the run begins at.
        settings: the resolved config, shown beside the figures.
    """

    def __init__(self, storage: Storage, config: MetricsConfig, run: str, step: int, settings: dict[str, Any]):
        self.storage = storage
        self._temporary = None if storage.local else tempfile.TemporaryDirectory(prefix="lidit-metrics-")
        self.folder = Path(self._temporary.name if self._temporary else storage.root)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before: list[dict[str, Any]] = []
        """Lines of the run's earlier starts, those up to `step`."""
        self._lines = self._open_lines(step)
        self._tensorboard: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=step + 1, flush_secs=30)
        self._wandb = _open_wandb(config.wandb, run, settings) if config.wandb else None
        self._gauges = RayGauges.here(run)

    def started(self, step: int, world_size: int) -> None:
        """Appends a line about this start to starts.jsonl."""
        before = (self.storage.read_if_there(STARTS) or b"").decode()
        line = {"step": step, "time": time.time(), "world_size": world_size}
        self.storage.write(STARTS, f"{before}{json.dumps(line)}\n".encode())

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes a step's figures: numbers, and lists of numbers (one per timestep bin, nan where it is empty)."""
        self._lines.write(json.dumps({"kind": kind, "step": step, **_json_able(values)}) + "\n")
        self._lines.flush()
        if self._gauges is not None:
            self._gauges.write(kind, step, values)
        flat = dict(_flat(kind, values))
        if self._tensorboard is not None:
            for name, value in flat.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def write_image(self, name: str, step: int, image: np.ndarray) -> None:
        """Writes an image (height, width, 3) uint8, also as `samples/step_00001000.png`."""
        from PIL import Image

        path = self.folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def flush(self) -> None:
        """Flushes all outputs, and uploads them to remote storage; called before every checkpoint."""
        self._lines.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        if not self.storage.local:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                self.storage.upload(path, path.relative_to(self.folder).as_posix())

    def close(self) -> None:
        """Flushes and closes all outputs."""
        self.flush()
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _open_lines(self, step: int) -> Any:
        """Opens the file of lines to append, after dropping lines of steps after `step` and one that a kill cut short."""
        path = self.folder / LINES
        content = self.storage.read_if_there(LINES)
        self.before = [line for line in _lines_of(content or b"") if line["step"] <= step]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in self.before))
        publish(temporary, path)
        return open(path, "a")


class RayGauges:
    """A run's figures as Prometheus gauges that Ray exports on the node's metrics port: `ray_lidit_train_<figure>{run=...}`.

    Only numbers that a dashboard draws; metrics.jsonl has all of them, at every step. On rank 0.

    Args:
        run: name of the run, the label of its figures.
    """

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        def gauge(name: str, text: str) -> Any:
            made = Gauge(name, text, ("run",))
            made.set_default_tags({"run": run})
            return made

        self._step = gauge(STEP_GAUGE, "Steps done.")
        self._gauges = {
            (kind, name): gauge(f"lidit_{kind}_{name}", text)
            for kind, names in EXPORTED.items()
            for name, text in names.items()
        }

    @classmethod
    def here(cls, run: str) -> RayGauges | None:
        """Returns the gauges if this process runs under Ray, else None."""
        ray = sys.modules.get("ray")
        return cls(run) if ray is not None and ray.is_initialized() else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Sets the gauges of a line's figures; those that are not finite or not exported are left out."""
        self._step.set(step)
        for name, value in values.items():
            gauge = self._gauges.get((kind, name))
            if gauge is not None and isinstance(value, (int, float)) and math.isfinite(value):
                gauge.set(value)


def read_lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file, of one kind if given; a last one that was cut short is left out."""
    return [line for line in _lines_of(path.read_bytes()) if kind is None or line["kind"] == kind]


def memory_gb() -> float:
    """Returns the peak memory so far in GB: of tensors on the GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _lines_of(content: bytes) -> list[dict[str, Any]]:
    lines = []
    for text in content.decode().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _flat(kind: str, values: dict[str, Any]) -> list[tuple[str, float]]:
    """`loss_bins: [a, b]` -> `train/loss_bins/0`, `train/loss_bins/1`; what is not finite is left out."""
    flat = []
    for name, value in values.items():
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in items:
            if isinstance(item, (int, float)) and math.isfinite(item):
                flat.append((f"{kind}/{name}" if index is None else f"{kind}/{name}/{index}", float(item)))
    return flat


def _json_able(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces nan and inf, which JSON lacks, by None."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in values.items()}


def _open_wandb(project: str | None, run: str, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"metrics.wandb {project!r}: needs `pip install lidit[wandb]`") from error
    return wandb.init(project=project, name=run, id=run, resume="allow", config=settings)
