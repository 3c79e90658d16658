"""Where rows come from: a source lists its items, and turns some of them into rows. Nothing is read before it is due.

| spec           | rows                                                           | fills                            |
|----------------|----------------------------------------------------------------|----------------------------------|
| `scenes:N`     | N rendered scenes of the demo world                            | image, both captions, `truth`    |
| `folder:PATH`  | every image below PATH                                         | image, `caption_original`        |
| `coco:PATH`    | one per annotation of a COCO captions set                      | image, `caption_original`        |
| `prompts:FILE` | one per prompt of a text file                                  | `caption`                        |

A folder's texts come from `<name>.txt` beside the image, or from `metadata.jsonl` (`file_name`, `text`). A COCO set is
`PATH/captions.json` and the folder `PATH/images`.

Prompt files are UTF-8; text is taken as it stands, edge spaces included, and blank lines are no rows.
`.txt`: one prompt a line. `.tsv`: header with `prompt` (any case), **no** quoting: a `"` is a character. `.csv`: header
with `prompt`, fields quoted as RFC 4180 says. `.jsonl`: one object a line with key `prompt`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, ImageOps

from lidit import columns
from pipelines.table import UNCOMPRESSED

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_PIXELS = 100_000_000  # of an image's header; larger ones are refused before anything is decoded
ID_FIELD = pa.field(columns.IMAGE_ID, pa.string())
ERROR_FIELD = pa.field(columns.error("ingest"), pa.string())
IMAGE_FIELDS = [
    pa.field(columns.IMAGE, pa.large_binary(), metadata=UNCOMPRESSED),
    pa.field(columns.HEIGHT, pa.int32()),
    pa.field(columns.WIDTH, pa.int32()),
    pa.field(columns.CAPTION_ORIGINAL, pa.string()),
]
CAPTION_FIELD = pa.field(columns.CAPTION, pa.string())

Item = dict[str, Any]  # `image_id` and what the source needs to make the row; JSON-able and small


class Source(ABC):
    """Items known beforehand, each with the `image_id` of the row that it becomes, the same every time."""

    fields: list[pa.Field]

    @abstractmethod
    def items(self) -> list[Item]:
        """All items in order.

        Raises:
            ValueError: the source is not what its spec says; names file and line.
        """

    @abstractmethod
    def row(self, item: Item) -> dict[str, Any]:
        """The row of an item, without its id. An exception becomes the row's `ingest_error`."""

    def batch(self, items: Iterable[Item]) -> pa.RecordBatch:
        """Rows of some items, in the source's schema."""
        rows = []
        for item in items:
            try:
                rows.append({columns.IMAGE_ID: item["image_id"], **self.row(item)})
            except Exception as error:  # whatever a damaged file makes its reader raise: the row is kept, and says it
                rows.append({columns.IMAGE_ID: item["image_id"], ERROR_FIELD.name: f"{type(error).__name__}: {error}"})
        return pa.RecordBatch.from_pylist(rows, schema=self.schema)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the rows."""
        return pa.schema([ID_FIELD, *self.fields, ERROR_FIELD])


class Scenes(Source):
    """The demo world: scene i is made from seed i."""

    fields = [*IMAGE_FIELDS, CAPTION_FIELD, pa.field(columns.TRUTH, pa.string())]

    def __init__(self, argument: str):
        if not argument.isdecimal() or int(argument) < 1:
            raise ValueError(f"source scenes:N: expected a number of scenes, received {argument!r}")
        self.count = int(argument)

    def items(self) -> list[Item]:
        return [{"image_id": f"scene-{seed:08d}", "seed": seed} for seed in range(self.count)]

    def row(self, item: Item) -> dict[str, Any]:
        from demo import scenes

        height, width = scenes.image_size(item["seed"])
        example = scenes.example(item["seed"], height, width)
        return {
            columns.IMAGE: example["image_bytes"],
            columns.HEIGHT: height,
            columns.WIDTH: width,
            columns.CAPTION: example["caption"],
            columns.CAPTION_ORIGINAL: example["caption_original"],
            columns.TRUTH: example["truth"],
        }


class Folder(Source):
    """Images below a folder; `image_id` is the path from the folder's parent."""

    fields = IMAGE_FIELDS

    def __init__(self, argument: str):
        self.root = _folder(argument, "folder")

    def items(self) -> list[Item]:
        texts = self._metadata()
        items = []
        for path in sorted(self.root.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                relative = path.relative_to(self.root).as_posix()
                items.append(
                    {"image_id": f"{self.root.name}/{relative}", "path": str(path), "text": texts.get(relative)}
                )
        if not items:
            raise ValueError(
                f"source folder:{self.root}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none"
            )
        return items

    def row(self, item: Item) -> dict[str, Any]:
        path = Path(item["path"])
        text = item["text"]
        if text is None and path.with_suffix(".txt").is_file():
            text = path.with_suffix(".txt").read_text("utf-8-sig").rstrip("\r\n")
        return {**_image_columns(path), columns.CAPTION_ORIGINAL: text}

    def _metadata(self) -> dict[str, str]:
        path = self.root / "metadata.jsonl"
        if not path.is_file():
            return {}
        return {record["file_name"]: record["text"] for record in _json_lines(path, required=("file_name", "text"))}


class Coco(Source):
    """One row per annotation: an image with five captions makes five rows."""

    fields = IMAGE_FIELDS

    def __init__(self, argument: str):
        self.root = _folder(argument, "coco")

    def items(self) -> list[Item]:
        path = self.root / "captions.json"
        try:
            record = json.loads(path.read_text("utf-8"))
            names = {image["id"]: image["file_name"] for image in record["images"]}
            return [
                {
                    "image_id": f"coco-{note['image_id']}-{note['id']}",
                    "path": str(self.root / "images" / names[note["image_id"]]),
                    "text": note["caption"],
                }
                for note in sorted(record["annotations"], key=lambda note: (note["image_id"], note["id"]))
            ]
        except FileNotFoundError as error:
            raise ValueError(f"source coco:{self.root}: expected captions.json and a folder images") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected COCO captions (`images` with id and file_name, `annotations` with id, image_id and "
                f"caption), received {type(error).__name__}: {error}"
            ) from error

    def row(self, item: Item) -> dict[str, Any]:
        return {**_image_columns(Path(item["path"])), columns.CAPTION_ORIGINAL: item["text"]}


class Prompts(Source):
    """Prompts without images; `image_id` is file name, index and a digest of the text, so a grown file adds its new rows."""

    fields = [CAPTION_FIELD]

    def __init__(self, argument: str):
        self.path = Path(argument).expanduser()
        if not self.path.is_file():
            raise ValueError(f"source prompts:{argument}: expected a file, nothing is there")

    def items(self) -> list[Item]:
        readers = {".txt": self._txt, ".tsv": self._tsv, ".csv": self._csv, ".jsonl": self._jsonl}
        if self.path.suffix.lower() not in readers:
            raise ValueError(f"{self.path}: expected a file ending in {', '.join(readers)}")
        prompts = [prompt for prompt in readers[self.path.suffix.lower()]() if prompt.strip()]
        if not prompts:
            raise ValueError(f"{self.path}: expected prompts, found none")
        return [
            {
                "image_id": f"{self.path.name}:{index:07d}:{hashlib.sha256(prompt.encode()).hexdigest()[:8]}",
                "text": prompt,
            }
            for index, prompt in enumerate(prompts)
        ]

    def row(self, item: Item) -> dict[str, Any]:
        return {columns.CAPTION: item["text"]}

    def _txt(self) -> list[str]:
        return [line.removesuffix("\r") for line in _read(self.path).split("\n")]

    def _tsv(self) -> list[str]:
        return self._column([line.removesuffix("\r").split("\t") for line in _read(self.path).split("\n")])

    def _csv(self) -> list[str]:
        try:
            lines = list(csv.reader(io.StringIO(_read(self.path), newline=""), strict=True))
        except csv.Error as error:
            raise ValueError(f"{self.path}: expected fields quoted as RFC 4180 says: {error}") from error
        return self._column(lines)

    def _column(self, lines: list[list[str]]) -> list[str]:
        header = lines[0] if lines else []
        names = [name.strip().lower() for name in header]
        if "prompt" not in names:
            raise ValueError(f"{self.path}: expected a header with a column `prompt`, received {header}")
        index = names.index("prompt")
        prompts = []
        for number, line in enumerate(lines[1:], start=2):
            if line in ([], [""]):
                continue
            if len(line) <= index:
                raise ValueError(f"{self.path}, row {number}: expected {len(header)} fields, received {len(line)}")
            prompts.append(line[index])
        return prompts

    def _jsonl(self) -> list[str]:
        return [record["prompt"] for record in _json_lines(self.path, required=("prompt",))]


SOURCES: dict[str, type[Source]] = {"scenes": Scenes, "folder": Folder, "coco": Coco, "prompts": Prompts}


def open_source(spec: str) -> Source:
    """`kind:argument` -> the source. Raises ValueError where there is no such kind or nothing is there."""
    kind, colon, argument = spec.partition(":")
    if kind not in SOURCES or not colon or not argument:
        kinds = "scenes:N, folder:PATH, coco:PATH, prompts:FILE"
        raise ValueError(f"source: expected one of {kinds}; received {spec!r}")
    return SOURCES[kind](argument)  # type: ignore[call-arg]


def _image_columns(path: Path) -> dict[str, Any]:
    """The file's bytes, and its size, upright; raises where it is damaged, or too large to decode safely."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,} allowed")
        image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size: enough to see that it is whole
        image.load()
        if image.getexif().get(ImageOps.ExifTags.Base.Orientation, 1) >= 5:  # turned by a quarter
            width, height = height, width
    return {columns.IMAGE: data, columns.HEIGHT: height, columns.WIDTH: width}


def _folder(argument: str, kind: str) -> Path:
    path = Path(argument).expanduser()
    if not path.is_dir():
        raise ValueError(f"source {kind}:{argument}: expected a folder, nothing is there")
    return path.resolve()


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8, received byte {error.object[error.start]:#x} at {error.start}"
        ) from error


def _json_lines(path: Path, required: tuple[str, ...]) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in required):
            raise ValueError(f"{path}, line {number}: expected an object with text under {', '.join(required)}")
        records.append(record)
    return records
