"""Looks whether a cluster can do the work before hours are spent: on every node, and says what to mend.

    ray job submit --working-dir . -- python infra/preflight.py --store s3://bucket/store --all-nodes --gpus 8 --all-reduce

- **versions**: the packages that matter are those of constraints.txt.
- **gpus**: as many as expected, and each multiplies matrices rightly.
- **disk**: room for models, for what is uploaded, and for Ray's own files.
- **store**: files can be written, read, listed, created exclusively and deleted.
- **clock**: agrees with the store's, or signatures are refused.
- **table**: opens, if it is there.
- **all-reduce**: the GPUs of all nodes add up through NCCL (gloo without GPUs), and how fast.

Only nodes that are up are looked at: an autoscaled cluster starts some for a job. Stdout carries one JSON object; the exit
status is 0 only if nothing is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
PACKAGES = ("ray", "torch", "pylance", "pyarrow", "deepspeed", "transformers", "diffusers", "s3fs")
MAX_SKEW_SECONDS = 60.0  # S3 refuses what is signed 15 minutes off
MATRIX = 1024  # side of the matrices that a GPU multiplies
REDUCE_BYTES = 256 << 20  # of an all-reduce on GPUs: long enough to tell NVLink and EFA from TCP


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` says what to do where it is not `ok`."""

    name: str
    ok: bool
    found: str
    fix: str = ""

    def line(self, node: str) -> str:
        """For a person."""
        text = f"  {'ok' if self.ok else 'FAILED':7} {node:20} {self.name:10} {self.found}"
        return text if self.ok else f"{text}\n{'':30}-> {self.fix}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks. 0: nothing is wrong, 1: something is; wrong flags end the process with 2."""
    args = _parser().parse_args(argv)
    wanted = (args.store, args.gpus, args.min_disk_gb)
    if args.all_nodes or args.all_reduce:
        _join_ray()
    found = on_all_nodes(*wanted) if args.all_nodes else {socket.gethostname(): check_node(*wanted)}
    if args.all_reduce:
        found["together"] = [all_reduce()]
    for node, checks in found.items():
        for check in checks:
            print(check.line(node), file=sys.stderr)
    ok = all(check.ok for checks in found.values() for check in checks)
    print(
        json.dumps({"ok": ok, "nodes": {name: [asdict(check) for check in checks] for name, checks in found.items()}})
    )
    return 0 if ok else 1


def check_node(store: str, gpus: int | None, min_disk_gb: float) -> list[Check]:
    """All checks of the node that this process is on."""
    acts: dict[str, Callable[[], Check]] = {
        "versions": check_versions,
        "gpus": lambda: check_gpus(gpus),
        "disk": lambda: check_disk(min_disk_gb),
        "store": lambda: check_store(store),
        "table": lambda: check_table(store),
    }
    checks = []
    for name, act in acts.items():
        try:
            checks.append(act())
        except Exception as error:  # whatever a driver or a server does: it is what was found
            checks.append(Check(name, False, f"{type(error).__name__}: {error}", FIXES[name]))
        if name == "store" and checks[-1].ok:
            checks.append(check_clock(store))
    return checks


FIXES = {
    "versions": "use the image of infra/Dockerfile, or `pip install -c constraints.txt -e .`",
    "gpus": "look at `nvidia-smi` and `dmesg | grep -i xid` on the node; drain and replace it",
    "disk": "a larger volume (ray_cluster.yaml: VolumeSize), or remove old sessions below /tmp/ray",
    "store": "the node's role needs s3:ListBucket on the bucket and s3:GetObject, PutObject, DeleteObject, "
    "AbortMultipartUpload below the store; the region must be the bucket's; infra/aws has the policies",
    "table": "`lidit verify --store ...` says more",
}


def check_versions(constraints: Path = CONSTRAINTS) -> Check:
    """The packages that results depend on, against the versions that lidit is tested with."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(), re.MULTILINE))
    wrong = []
    for name in PACKAGES:
        try:
            here = version(name).partition("+")[0]  # torch's build: 2.13.0+cu130
        except PackageNotFoundError:
            here = "none"
        if here != pinned.get(name):
            wrong.append(f"{name} {here} (tested: {pinned.get(name, 'none')})")
    found = "; ".join(wrong) or ", ".join(f"{name} {pinned[name]}" for name in PACKAGES)
    return Check("versions", not wrong, found, FIXES["versions"])


def check_gpus(expected: int | None) -> Check:
    """As many GPUs as expected (None: whatever there is), each of which multiplies two matrices as the CPU does."""
    import torch

    count = torch.cuda.device_count()
    if expected is not None and count != expected:
        return Check("gpus", False, f"{count} GPUs, expected {expected}", FIXES["gpus"])
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(MATRIX, MATRIX, generator=draw) for _ in range(2))
    truth, wrong = left @ right, []
    for index in range(count):
        product = (left.to(f"cuda:{index}") @ right.to(f"cuda:{index}")).cpu()
        if not torch.allclose(product, truth, rtol=1e-2, atol=1.0):  # TF32 may be on
            wrong.append(index)
    kinds = {torch.cuda.get_device_name(index) for index in range(count)}
    found = f"wrong products on GPU {wrong}" if wrong else f"{count} GPUs{': ' + ', '.join(kinds) if kinds else ''}"
    return Check("gpus", not wrong, found, FIXES["gpus"])


def check_disk(min_gb: float, folder: str | None = None) -> Check:
    """Free space where temporary files go."""
    folder = folder or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    return Check("disk", free >= min_gb, f"{free:,.0f} GB free in {folder}, at least {min_gb:g} wanted", FIXES["disk"])


def check_store(store: str) -> Check:
    """Writes, reads, lists, creates exclusively and deletes a small file."""
    import fsspec

    from lidit.runtime.files import create_exclusively, make_folder

    fs, root = fsspec.core.url_to_fs(store)
    folder = f"{root.rstrip('/')}/preflight"
    path, content = f"{folder}/{secrets.token_hex(8)}", b"preflight"
    step = "write"
    try:
        make_folder(fs, folder)
        create_exclusively(fs, path, content)
        step = "read"
        if fs.cat_file(path) != content:
            return Check("store", False, f"read something else than was written to {path}", FIXES["store"])
        step = "list"
        fs.invalidate_cache()
        if path not in (str(name) for name in fs.ls(folder, detail=False)):
            return Check("store", False, f"{path} was written, and is not listed", FIXES["store"])
        step = "create exclusively"
        try:
            create_exclusively(fs, path, b"again")
        except FileExistsError:
            pass
        else:
            return Check(
                "store", False, "a file was created exclusively twice: commits would overwrite each other", NO_CONDITION
            )
        step = "delete"
        fs.rm_file(path)
    except (OSError, ValueError) as error:
        return Check("store", False, f"could not {step}: {type(error).__name__}: {error}", FIXES["store"])
    return Check("store", True, f"{store}: write, read, list, create exclusively, delete")


NO_CONDITION = "this store ignores conditional writes (If-None-Match); use one that has them, as S3 does"


def check_clock(store: str) -> Check:
    """This machine's time against when the store says that a file was written just now."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(store)
    path = f"{root.rstrip('/')}/preflight/{secrets.token_hex(8)}"
    before = time.time()
    fs.pipe_file(path, b"what time is it?")
    after = time.time()
    there = fs.modified(path).timestamp()
    fs.rm_file(path)
    skew = max(before - 1 - there, there - after, 0.0)  # stores tell whole seconds
    fix = "start chrony or systemd-timesyncd on the node (`timedatectl` shows its state)"
    return Check("clock", skew <= MAX_SKEW_SECONDS, f"{skew:.0f} s off the store's", fix)


def check_table(store: str) -> Check:
    """Opens the newest version of the samples table and reads a row; a store without one is fine, and said."""
    from lidit.store import columns
    from pipelines.engine.table import samples_of

    table = samples_of(store)
    if not table.exists():
        return Check("table", True, "none yet")
    dataset = table.open()
    dataset.head(1, columns=[columns.IMAGE_ID])
    return Check(
        "table", True, f"version {dataset.version}, {dataset.count_rows():,} rows, {len(dataset.schema)} columns"
    )


# -- several nodes --------------------------------------------------------------------------------------------------------


def on_all_nodes(store: str, gpus: int | None, min_disk_gb: float) -> dict[str, list[Check]]:
    """Node's address -> its checks, from a task on each node that is up. Nodes without GPUs need none.

    The head is looked at too: drivers and the committer are there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[str, Any] = {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        held = int(node["Resources"].get("GPU", 0))
        expected = gpus if held else 0
        task = ray.remote(_check_here).options(num_cpus=0, scheduling_strategy=here, max_retries=0)  # type: ignore[attr-defined]
        asked[f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"] = task.remote(store, expected, min_disk_gb)
    found: dict[str, list[Check]] = {}
    for name, reference in asked.items():
        try:
            found[name] = [Check(**check) for check in ray.get(reference)]
        except ray.exceptions.RayError as error:
            found[name] = [Check("node", False, f"{type(error).__name__}: {error}", "replace the node")]
    return found


def _check_here(store: str, gpus: int | None, min_disk_gb: float) -> list[dict[str, Any]]:
    """A node's part. A task without GPUs sees none, by Ray's doing: it looks at all that the node has."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return [asdict(check) for check in check_node(store, gpus, min_disk_gb)]


def all_reduce(size: int | None = None) -> Check:
    """One process per GPU of the cluster (per node, without GPUs) adds up ones; each must get the number of processes."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    ranks = gpus or sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes())
    backend = "nccl" if gpus else "gloo"
    fix = "set NCCL_DEBUG=INFO and look for the network it chose; nodes must reach each other on all ports, /dev/shm be large"
    if ranks < 1:
        return Check("all-reduce", False, "no node has a GPU or a CPU for work", "start workers first (min_workers)")
    bundle = {"GPU": 1, "CPU": 0.001} if gpus else {"CPU": 1}
    group = placement_group([bundle] * ranks, strategy="PACK" if gpus else "SPREAD")
    try:
        ray.get(group.ready(), timeout=120)
        where = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(ranks)]
        remote: Any = ray.remote(_Rank)
        wants = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
        actors = [remote.options(**wants, scheduling_strategy=strategy).remote() for strategy in where]
        address = ray.get(actors[0].address.remote())
        size = size or (REDUCE_BYTES if gpus else 1 << 20)
        done = [one.add_up.remote(address, rank, ranks, backend, size) for rank, one in enumerate(actors)]
        seconds = max(ray.get(done, timeout=300))
    except (ray.exceptions.RayError, ValueError) as error:
        return Check("all-reduce", False, f"{ranks} ranks, {backend}: {type(error).__name__}: {error}", fix)
    finally:
        remove_placement_group(group)
    speed = 2 * (ranks - 1) / ranks * size / seconds / 1e9  # what each rank sends, as NCCL's own tests count it
    return Check(
        "all-reduce",
        True,
        f"{ranks} ranks, {backend}: {size / 1e6:,.0f} MB in {1e3 * seconds:,.1f} ms, {speed:,.2f} GB/s a rank",
    )


class _Rank:
    """One process of the all-reduce."""

    def address(self) -> str:
        """Where the others find this one."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def add_up(self, address: str, rank: int, ranks: int, backend: str, size: int) -> float:
        """Seconds of one all-reduce of so many bytes, the first one not counted. ValueError where the sum is wrong."""
        import torch
        import torch.distributed as dist

        device = "cuda" if backend == "nccl" else "cpu"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
        try:
            for _ in range(2):  # the first one connects
                ones = torch.ones(size // 4, device=device)
                dist.barrier()
                begun = time.perf_counter()
                dist.all_reduce(ones)
                right = bool((ones == ranks).all())  # also waits for the device
                seconds = time.perf_counter() - begun
            if not right:
                raise ValueError(f"rank {rank} got a wrong sum")
            return seconds
        finally:
            dist.destroy_process_group()


def _join_ray() -> None:
    """Joins the cluster that RAY_ADDRESS names (as under `ray job submit`), or looks at this machine as one of its own."""
    import logging

    import ray

    if not ray.is_initialized():
        local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "infra/preflight.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--store", required=True, help="Folder or URI of the feature store; a file is written below it."
    )
    parser.add_argument("--gpus", type=int, help="GPUs that every GPU node must have. Default: whatever it has.")
    parser.add_argument("--min-disk-gb", type=float, default=50.0, help="Free space that a node must have, GB.")
    parser.add_argument("--all-nodes", action="store_true", help="Every node of the Ray cluster, not only this one.")
    parser.add_argument("--all-reduce", action="store_true", help="Also add up across all GPUs of the cluster.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
