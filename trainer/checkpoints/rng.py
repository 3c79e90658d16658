"""States of a process's random number generators, kept without pickle.

Training itself draws from none of them: what it needs is a function of (seed, image number). Whoever adds something that
does, dropout for one, still gets the same numbers after resuming on as many ranks.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_rng(path: Path) -> None:
    """Writes the states of torch's (host and GPU), numpy's and Python's generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    rest = {"numpy": [str(kind), int(position), int(has_gauss), float(cached)], "python": [version, gauss]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"rest": json.dumps(rest)})


def load_rng(path: Path) -> None:
    """Puts them back; a GPU's only where there is one."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rest = json.loads(file.metadata()["rest"])
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
