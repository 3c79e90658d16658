#!/usr/bin/env bash
# Makes infra/requirements.lock anew: what the image is installed from, in the versions of constraints.txt, with the digests of
# all files that PyPI has of them. Run it after a change of pyproject.toml or constraints.txt. Needs PyPI and `uv`
# (pip install uv==0.13.9); nothing is installed. Source packages (deepspeed) are asked for their dependencies, so their
# setup.py runs: use a throw-away machine where that matters.
#   infra/lock.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# The image's Python and platform, whatever this machine's are; PyPI alone, whose wheels of torch for Linux are those for CUDA.
uv pip compile --no-config --no-python-downloads --default-index https://pypi.org/simple --generate-hashes --no-header \
    --no-annotate --python-version 3.12 --python-platform x86_64-manylinux_2_39 --constraint constraints.txt \
    --extra hf --extra openai --output-file infra/requirements.lock --quiet \
    pyproject.toml <(printf '%s\n' pip setuptools wheel ninja)
