"""Sources whose rows are known beforehand: rendered scenes, image folders, COCO captions, prompt files.

A folder's texts come from `<name>.txt` or `<name>.caption` beside the image, or from a `metadata.jsonl` or `metadata.csv`
(`file_name`, `text`) of its folder or one above. A COCO set is `URI/captions.json` and the folder `URI/images`.

Prompt files are UTF-8; text is taken as it stands, edge spaces included, and blank lines are no rows.
`.txt`: one prompt a line. `.tsv`: header with `prompt` (any case), **no** quoting: a `"` is a character. `.csv`: header
with `prompt`, fields quoted as RFC 4180 says. `.jsonl`: one object a line with key `prompt`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from lidit import columns
from lidit.uris import shown
from pipelines.image_check import digest
from pipelines.locations import (
    count_left_out,
    is_folder,
    is_hidden,
    leads_outside,
    links_elsewhere,
    read_below,
    read_bytes,
    real_place,
    walk_files,
    what_is_left_out,
)
from pipelines.sources import (
    CAPTION_FIELD,
    IMAGE_ENDINGS,
    IMAGE_FIELDS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Item,
    Listed,
    Record,
    place_digest,
    writable,
)
from pipelines.spelling import Spelling

TEXT_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl")  # of one folder the last one counts
MAX_FIELD = 1 << 30  # characters of a field of a CSV file
EARLIER_PROMPT_ID = re.compile(r":\d{7,}:[0-9a-f]{8}")  # after the file's name: the prompt's number and digest
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)  # this file's own fault, not the storage's


class Scenes(Listed):
    """The demo world: scene i is made from seed i. What is true of it, a dense caption included, is its `truth`."""

    fields = [*IMAGE_FIELDS, pa.field(columns.TRUTH, pa.string())]

    def __init__(self, argument: str):
        if not argument.isdecimal() or int(argument) < 1:
            raise ValueError(f"source scenes:N: expected a number of scenes, received {argument!r}")
        self.count = int(argument)

    def items(self) -> list[Item]:
        return [{"image_id": f"scene-{seed:08d}", "seed": seed} for seed in range(self.count)]

    def record(self, item: Item) -> Record:
        from demo import scenes

        example = scenes.example(item["seed"], *scenes.image_size(item["seed"]))
        values = {columns.TRUTH: example["truth"]}
        return Record(item["image_id"], example["image_bytes"], example["caption_original"], values=values)


class Folder(Listed):
    """Images below a folder; `image_id` is the folder's name, a digest of where it lies in full, and the path in it."""

    fields = IMAGE_FIELDS
    may_differ = True

    def __init__(self, argument: str):
        self.root = _folder(argument, "folder")

    def items(self) -> list[Item]:
        sizes = walk_files(self.root, self.left_out)
        files = [path for path in sizes if not is_hidden(path)]
        images = [path for path in files if _ending(path)[1:] in IMAGE_ENDINGS]
        elsewhere = links_elsewhere(self.root)
        read = {path for path in files if _is_text(path) and not elsewhere(path)}
        texts, text_paths = self._metadata(read, images), self._texts_beside(read, images)
        name = writable(posixpath.basename(self.root))
        here = f"{name}-{place_digest(self.root)}"
        items = []
        for path in images:
            inside = writable(path)
            item: Item = {"image_id": f"{here}/{inside}", "path": path, "bytes": sizes[path]}
            item["earlier_id"] = item["place"] = f"{name}/{inside}"
            if path in texts:
                item["text"] = texts[path]
            elif (text_path := text_paths.get(posixpath.splitext(path)[0])) is not None:
                item["text_path"], item["text_bytes"] = text_path, sizes[text_path]
            items.append(item)
        for path in sizes.keys() - set(images) - read:
            what = "link to a text elsewhere" if _is_text(path) else what_is_left_out(self.root, path)
            count_left_out(self.left_out, "hidden" if is_hidden(path) else what)
        if not items:
            found = ", ".join(f"{count:,} {what.removeprefix('left_out_')}" for what, count in self.left_out.items())
            raise ValueError(
                f"source folder:{self.root}: expected images (.{', .'.join(sorted(IMAGE_ENDINGS))}), found none"
                f"{f'; there are {found}' if found else ''}"
            )
        return items

    def text(self, item: Item) -> str | None:
        if "text_path" not in item:
            return item.get("text")
        return _text_beside(self.root, item["text_path"], item["text_bytes"])

    def record(self, item: Item) -> Record:
        return _file_record(item["place"], self.root, item["path"], self.text(item), item["bytes"])

    def _metadata(self, files: Iterable[str], images: list[str]) -> dict[str, str]:
        """Image -> its text by the metadata files: each holds for its own folder and what is below, the nearest one counts."""
        texts: dict[str, str] = {}
        found = [path for path in files if posixpath.basename(path).lower() in METADATA]
        for path in sorted(found, key=lambda path: (path.count("/"), path)):
            folder = posixpath.dirname(path)
            spelling = Spelling(posixpath.relpath(image, folder or ".") for image in images if _is_below(image, folder))
            of_this: set[str] = set()
            for name, text in self._lines(path, topmost=not folder):
                if text is None:
                    self.left_out["metadata_without_text"] += 1
                elif (image := spelling.find(name)) is None:
                    self.left_out["texts_without_image"] += 1
                else:
                    whole = posixpath.join(folder, image)
                    self.left_out["texts_more"] += whole in of_this
                    of_this.add(whole)
                    texts[whole] = text
        return texts

    def _lines(self, path: str, topmost: bool) -> Iterator[tuple[str, str | None]]:
        """(file name, text) of each line; what the topmost file lacks is an error, others may be there for other purposes."""
        uri = f"{self.root}/{path}"
        required = ("file_name", "text") if topmost else ()
        records = (
            _json_lines(uri, required, ("text",)) if path.lower().endswith(".jsonl") else _csv_records(uri, required)
        )
        for record in records:
            name, text = record.get("file_name"), record.get("text")
            whole = isinstance(name, str) and isinstance(text, str)
            yield (name, text) if whole else ("", None)  # type: ignore[misc]

    def _texts_beside(self, files: Iterable[str], images: list[str]) -> dict[str, str]:
        """Name of an image without its ending -> the text file beside it."""
        spelling = Spelling({posixpath.splitext(image)[0] for image in images})
        found: dict[str, str] = {}
        for suffix in reversed(TEXT_SUFFIXES):  # of several the first one counts
            for path in sorted(files):
                if _ending(path) != suffix:
                    continue
                stem = spelling.find(posixpath.splitext(path)[0])
                if stem is None:
                    self.left_out["texts_without_image"] += 1
                else:
                    found[stem] = path
        return found


class Coco(Listed):
    """One row per annotation: an image with five captions makes five rows. `image_id` is where the set lies and its ids."""

    fields = IMAGE_FIELDS
    may_differ = True

    def __init__(self, argument: str):
        self.root = _folder(argument, "coco")

    def items(self) -> list[Item]:
        path, here = f"{self.root}/captions.json", place_digest(self.root)
        try:
            record = json.loads(read_bytes(path))
            names: dict[Any, list[str]] = {}
            for image in record["images"]:
                names.setdefault(image["id"], []).append(image["file_name"])
            notes = sorted(record["annotations"], key=lambda note: (note["image_id"], note["id"], str(note["caption"])))
            self.left_out["images_without_text"] += len(names.keys() - {note["image_id"] for note in notes})
            if notes and not any(note["image_id"] in names for note in notes):
                raise ValueError(f"no annotation's image is there, such as {notes[0]['image_id']}")
            items: dict[str, Item] = {}
            for note in notes:
                item = self._item(here, note, sorted({str(name) for name in names.get(note["image_id"], [])}))
                if (earlier := items.get(item["image_id"])) is not None:
                    if earlier == item:
                        self.left_out["annotations_twice"] += 1
                        continue
                    item["image_id"] += f":{digest(json.dumps(note['caption']).encode())[:8]}"  # ids given twice
                    del item["earlier_id"]
                items[item["image_id"]] = item
            return list(items.values())
        except FileNotFoundError as error:
            raise ValueError(f"source coco:{self.root}: expected captions.json and a folder images") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected COCO captions (`images` with id and file_name, `annotations` with id, image_id and "
                f"caption), received {type(error).__name__}: {error}"
            ) from error

    @staticmethod
    def _item(here: str, note: dict[str, Any], paths: list[str]) -> Item:
        """An annotation whose image has these names: one, if all is well."""
        item = {
            "image_id": writable(f"coco-{here}-{note['image_id']}-{note['id']}"),
            "earlier_id": writable(f"coco-{note['image_id']}-{note['id']}"),
            "path": paths[0] if paths else "",
            "text": note["caption"],
        }
        if len(paths) != 1:
            received = f"{len(paths)}: {', '.join(paths[:3])}" if paths else "none"
            item["error"] = f"image_id {note['image_id']}: expected one file_name under `images`, received {received}"
        return item

    def text(self, item: Item) -> str | None:
        if "error" in item:
            raise ValueError(item["error"])
        if not isinstance(item["text"], str | None):
            raise ValueError(f"caption: expected text, received {type(item['text']).__name__}")
        return item["text"]

    def record(self, item: Item) -> Record:
        place = f"images/{posixpath.basename(item['path'])}"
        if "error" in item:
            return Record(place, error=item["error"])
        if leads_outside(item["path"]):
            return Record(place, error="file_name: expected a path below images/, received one that leads outside")
        try:
            return _file_record(place, f"{self.root}/images", item["path"], self.text(item))
        except ValueError as error:
            return Record(place, error=str(error))


class Prompts(Listed):
    """Prompts without images; `image_id` is the file's name and a digest of the text, wherever in the file it stands.

    A text that is there twice is two rows.
    """

    fields = [CAPTION_FIELD]
    has_images = False

    def __init__(self, argument: str):
        self.path = real_place(argument)
        self.name = posixpath.basename(self.path)
        self.suffix = posixpath.splitext(self.name)[1].lower()

    def items(self) -> list[Item]:
        readers = {".txt": self._txt, ".tsv": self._tsv, ".csv": self._csv, ".jsonl": self._jsonl}
        if self.suffix not in readers:
            raise ValueError(f"{self.path}: expected a file ending in {', '.join(readers)}")
        prompts = [prompt for prompt in readers[self.suffix]() if prompt.strip()]
        if not prompts:
            raise ValueError(f"{self.path}: expected prompts, found none")
        name, times = writable(self.name), Counter[str]()
        items = []
        for prompt in prompts:
            again = f":{times[prompt]}" if times[prompt] else ""
            text_digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]
            items.append({"image_id": f"{name}:{text_digest}{again}", "text": prompt})
            times[prompt] += 1
        return items

    def earlier_ids(self, items: list[Item], has: Any, table: Any) -> list[str | None]:
        """Ids once held the prompt's number in the file: such rows are found by their text."""
        if columns.CAPTION not in table.schema.names:
            return [None] * len(items)
        name = writable(self.name)
        begin = name.replace("'", "''")
        rows = table.to_table(
            [columns.IMAGE_ID, columns.CAPTION], filter=f"starts_with({columns.IMAGE_ID}, '{begin}:')"
        )
        found: dict[str, list[str]] = {}
        for image_id, text in zip(*(rows[column].to_pylist() for column in (columns.IMAGE_ID, columns.CAPTION))):
            if EARLIER_PROMPT_ID.fullmatch(image_id.removeprefix(name)) and text is not None:
                found.setdefault(text, []).append(image_id)
        return [ids.pop(0) if (ids := found.get(item["text"])) else None for item in items]

    def record(self, item: Item) -> Record:
        return Record(item["image_id"], values={columns.CAPTION: item["text"]})

    def _txt(self) -> list[str]:
        return _lines_of(_read(self.path))

    def _tsv(self) -> list[str]:
        return self._column([line.split("\t") for line in _lines_of(_read(self.path))])

    def _csv(self) -> list[str]:
        return self._column(_csv_lines(self.path))

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


def _text_beside(root: str, path: str, size: int) -> str:
    """The text of a file. Raises ValueError where it is too large, no UTF-8, or no file of bytes."""
    try:
        data = read_below(root, path, MAX_TEXT_BYTES, size)
    except ValueError as error:
        raise ValueError(f"{posixpath.basename(path)}: {error}") from error
    return data.decode("utf-8-sig").rstrip("\r\n")


def _file_record(place: str, root: str, path: str, text: str | None, size: int | None = None) -> Record:
    """The record of an image file; one that is not there, not ours to read, too large or no file of bytes is a row's error."""
    try:
        return Record(place, read_below(root, path, MAX_IMAGE_BYTES, size), text)
    except UNREADABLE as error:
        return Record(place, error=f"{type(error).__name__}: {shown(posixpath.basename(path))}")
    except ValueError as error:
        return Record(place, error=str(error))


def _folder(argument: str, kind: str) -> str:
    uri = real_place(argument)
    if not is_folder(uri):
        raise ValueError(f"source {kind}:{argument}: expected a folder, nothing is there")
    return uri.rstrip("/")


def _read(uri: str) -> str:
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"source prompts:{uri}: expected a file, nothing is there") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{uri}: expected UTF-8, received byte {error.object[error.start]:#x} at {error.start}"
        ) from error


def _lines_of(text: str) -> list[str]:
    """Lines that end with a line feed, a carriage return before it or not."""
    return [line.removesuffix("\r") for line in _line_feeds(text).split("\n")]


def _line_feeds(text: str) -> str:
    """The text; where no line feed is in it, carriage returns end its lines (old Macs, some spreadsheets)."""
    return text if "\n" in text else text.replace("\r", "\n")


def _csv_lines(uri: str) -> list[list[str]]:
    csv.field_size_limit(MAX_FIELD)  # of this process: 131,072 by itself
    try:
        return list(csv.reader(io.StringIO(_line_feeds(_read(uri)), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{uri}: expected fields quoted as RFC 4180 says: {error}") from error


def _csv_records(uri: str, required: tuple[str, ...]) -> list[dict[str, Any]]:
    lines = _csv_lines(uri)
    header = [name.strip().lower() for name in lines[0]] if lines else []
    if missing := [name for name in required if name not in header]:
        raise ValueError(f"{uri}: expected a header with columns {', '.join(missing)}, received {header}")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        if line in ([], [""]):
            continue
        if len(line) != len(header):
            raise ValueError(f"{uri}, row {number}: expected {len(header)} fields, received {len(line)}")
        records.append(dict(zip(header, line)))
    return records


def _ending(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _is_text(path: str) -> bool:
    """Whether a file of a folder has texts for its images."""
    return _ending(path) in TEXT_SUFFIXES or posixpath.basename(path).lower() in METADATA


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _json_lines(uri: str, required: tuple[str, ...], nullable: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The objects of a file. Raises ValueError where one lacks text under a key that is required (null where it may be)."""

    def has(record: dict[str, Any], key: str) -> bool:
        return isinstance(record.get(key), str) or (key in nullable and record.get(key, "") is None)

    records = []
    for number, line in enumerate(_lines_of(_read(uri)), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{uri}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(record, dict) or not all(has(record, key) for key in required):
            raise ValueError(f"{uri}, line {number}: expected an object with text under {', '.join(required)}")
        records.append(record)
    return records
