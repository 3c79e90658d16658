"""Refuses manifests that take an image by its tag: a tag may be moved, a digest cannot.

    kubectl kustomize infra/kubernetes/overlays/small | python infra/pinned.py
    python infra/pinned.py ray_cluster.yaml

Reads YAML of any kind from the files given, or from stdin, and looks at every `image` in it. Exit status: 0 if each one is
`NAME@sha256:DIGEST`, 1 if not; stderr says which, and how a digest is found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
FIX = (
    "put its digest in place of its tag. After `docker push`: docker buildx imagetools inspect NAME:TAG --format "
    "'{{.Manifest.Digest}}'; then `images` in the overlay's kustomization.yaml, or `docker.image` in ray_cluster.yaml "
    "(docs/cluster.md)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Looks at the files, or at stdin without any. Returns the exit status that the module describes."""
    import yaml

    names = list(sys.argv[1:] if argv is None else argv)
    texts = [Path(name).read_text() for name in names] or [sys.stdin.read()]
    found = {image for text in texts for document in yaml.safe_load_all(text) for image in images(document)}
    loose = sorted(image for image in found if not DIGEST.fullmatch(image))
    for image in loose:
        print(f"{image}: taken by its tag, expected NAME@sha256:DIGEST", file=sys.stderr)
    if loose or not found:
        print(f"-> {FIX}" if loose else "no image in what was read", file=sys.stderr)
    return 1 if loose or not found else 0


def images(part: Any) -> Iterator[str]:
    """The value of every key `image`, at any depth."""
    if isinstance(part, list):
        for each in part:
            yield from images(each)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "image" and isinstance(value, str):
                yield value
            else:
                yield from images(value)


if __name__ == "__main__":
    sys.exit(main())
