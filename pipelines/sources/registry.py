"""Opens a source by its spec: `kind:argument`, or a class of anybody's, `package.module:Class?argument`."""

from __future__ import annotations

from typing import Any

from pipelines.engine.plugins import IMPORT_STRING, resolve
from pipelines.sources.base import USUAL_NAMES, ColumnsConfig, Listed, Source

KINDS = {
    "scenes": "demo.plugins:SceneSource",
    "folder": "pipelines.sources.files:Folder",
    "coco": "pipelines.sources.files:Coco",
    "prompts": "pipelines.sources.files:Prompts",
    "webdataset": "pipelines.sources.archives:WebDataset",
    "parquet": "pipelines.sources.tables:Parquet",
    "lance": "pipelines.sources.tables:LanceTable",
    "hf": "pipelines.sources.saved:HuggingFace",
    "img2dataset": "pipelines.sources.archives:open_img2dataset",
}
USAGE = (
    "scenes:N, folder:URI, coco:URI, prompts:FILE, webdataset:URI, parquet:URI, lance:URI, hf:PATH, img2dataset:PATH, or "
    "package.module:Class?argument"
)


def parse_spec(spec: str) -> tuple[str, str]:
    """A spec -> (kind or `package.module:Class`, argument).

    Raises:
        ValueError: it is neither.
    """
    name, _, argument = spec.partition("?")
    if IMPORT_STRING.fullmatch(name):
        return name, argument
    kind, _, argument = spec.partition(":")
    if not argument or kind not in KINDS:
        raise ValueError(f"source: expected one of {USAGE}; received {spec!r}")
    return kind, argument


def open_source(spec: str, names: ColumnsConfig = USUAL_NAMES) -> Source:
    """The source of a spec. A `Listed` class is made of the argument, a `Sharded` one of argument and names.

    Raises:
        ValueError: there is no such kind or class, or nothing there.
    """
    kind, argument = parse_spec(spec)
    made: Any = resolve(kind, KINDS, Source, "source")
    is_listed = isinstance(made, type) and issubclass(made, Listed)
    if is_listed and names:
        raise ValueError(
            f"columns.*: expected with webdataset, parquet, lance, hf, img2dataset only, received it with {kind}:"
        )
    source: Source = made(argument) if is_listed else made(argument, names)
    return source
