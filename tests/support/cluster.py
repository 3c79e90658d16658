"""A cloud on one machine: a server of S3's own protocol, and Ray nodes that share nothing but it.

Everything listens on loopback, on ports of its own, and is ended by its own process group: other Rays on the machine are not
touched (`ray stop` would end them too).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ACCESS_KEY = "AKIAPLANTED0ACCESS0K"
START_SECONDS = 120.0


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """A process with a process group of its own, and its log."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]):
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, url: str) -> None:
        """Until something answers there, whatever it says; fails if the process ends first."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, f"{url} never answered:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the whole group: politely, then not."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, signum)
            except ProcessLookupError:
                break
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(10)


class S3Server:
    """`moto_server`: buckets in memory, multipart uploads and conditional PUTs as on S3.

    `secret`: the secret key that its users have in their environment, and that must be seen nowhere else.
    """

    def __init__(self, folder: Path):
        self.port, self.secret = free_port(), secrets.token_hex(20)
        command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]
        self.service = Service(command, folder / "s3.log", {**os.environ})
        self.url = f"http://127.0.0.1:{self.port}"
        self.service.wait_for(self.url)

    def env(self, url: str | None = None) -> dict[str, str]:
        """What a process needs to use it, as a node's role or profile would give it; `url`: by way of a proxy."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "NO_PROXY": "*",
        }

    def contents(self) -> dict[str, bytes]:
        """Everything in all buckets."""
        fs = self.filesystem()
        return {path: fs.cat_file(path) for bucket in fs.ls("") for path in fs.find(bucket)}

    def filesystem(self) -> Any:
        """Of this process, without its environment."""
        import s3fs

        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=self.secret,
            endpoint_url=self.url,
            skip_instance_cache=True,
            use_listings_cache=False,
        )


class RayNodes:
    """A head and workers with temporary folders of their own, behind a token."""

    def __init__(self, env: dict[str, str], head_cpus: int = 1):
        self.token = secrets.token_hex(32)
        self.folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))  # short: sockets have names of 107 bytes at most
        self.port, self.dashboard, self.metrics = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
        self.base = {
            **inherited,
            **env,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.env = {**self.base, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.nodes: list[Service] = []
        flags = ["--head", "--port", self.port, "--dashboard-host", "127.0.0.1", "--dashboard-port", self.dashboard]
        self._start([*flags, "--metrics-export-port", self.metrics], head_cpus)
        self.nodes[0].wait_for(f"{self.address}/api/version")

    def add_worker(self, cpus: int) -> Service:
        """Another node; returns once the head counts it among those that are alive."""
        worker = self._start(["--address", f"127.0.0.1:{self.port}"], cpus)
        limit = time.monotonic() + START_SECONDS
        while self.alive() < len(self.nodes):
            assert time.monotonic() < limit, f"{self.alive()} of {len(self.nodes)} nodes after {START_SECONDS} s"
            time.sleep(0.5)
        return worker

    def alive(self) -> int:
        """Nodes that the head counts as alive."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.address}/nodes?view=summary", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            nodes = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def _start(self, flags: list[Any], cpus: int) -> Service:
        folder = self.folder / str(len(self.nodes))
        folder.mkdir()
        command = [
            str(BIN / "ray"), "start", "--block", *flags, "--num-cpus", cpus, "--num-gpus", 0, "--temp-dir", folder,
            "--node-ip-address", "127.0.0.1", "--object-store-memory", 100 << 20,
            "--dashboard-agent-listen-port", free_port(), "--ray-client-server-port", free_port(),
        ]  # fmt: skip
        if "--head" not in flags:
            del command[-2:]
        service = Service(list(map(str, command)), folder / "start.log", self.env)
        self.nodes.append(service)
        return service

    def submit(self, *entrypoint: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """`ray job submit --working-dir . -- ENTRYPOINT`, as a user types it; `env` instead of the one with the token."""
        command = [BIN / "ray", "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entrypoint]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=env or self.env, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )

    def metric(self, name: str, **labels: str) -> float | None:
        """Newest value of a metric that the head node exports to Prometheus, None while it is not there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = [line for line in lines if line.startswith(f"{name}{{") and all(part in line for part in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found) if found else None

    def logs(self) -> dict[str, bytes]:
        """Every file that the nodes have left behind: logs, packages, sessions; sockets and the like apart."""
        return {
            str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()
        }

    def stop(self) -> None:
        """Ends all nodes and forgets them."""
        for node in reversed(self.nodes):
            node.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5)
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, OSError):
        return False
    return True


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """This process's own environment, for a while; file systems that were made before are forgotten."""
    import s3fs

    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        s3fs.S3FileSystem.clear_instance_cache()
