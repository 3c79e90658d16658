"""Sources whose rows are known beforehand: image folders, COCO captions, prompt files.

A folder's texts come from `<name>.txt` or `<name>.caption` beside the image, or from a `metadata.jsonl` or `metadata.csv`
(`file_name`, `text`) of its folder or one above. A COCO set is `URI/captions.json` and the folder `URI/images`.

Prompt files are UTF-8; text is taken as it stands, edge spaces included, and blank lines are no rows.
`.txt`: one prompt a line. `.tsv`: header with `prompt` (any case), **no** quoting: a `"` is a character. `.csv`: header
with `prompt`, fields quoted as RFC 4180 says. `.jsonl`: one object a line with key `prompt`. Of a header with one column
a line is one field, commas and tabs included, where it is not quoted. A byte order mark at the begin of any line is none of it.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from lidit.runtime.uris import shown
from lidit.store import columns
from pipelines.sources.base import (
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
from pipelines.sources.image_check import digest
from pipelines.sources.locations import (
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
from pipelines.sources.spelling import Spelling
from pipelines.sources.text_files import (
    csv_lines,
    csv_records,
    is_unreadable,
    json_lines,
    lines_of,
    ragged,
    read_text,
    without_marks,
)

TEXT_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl")  # of one folder the last one counts
EARLIER_PROMPT_ID = re.compile(r":\d{7,}:[0-9a-f]{8}")  # after the file's name: the prompt's number and digest


class Folder(Listed):
    """Images below a folder; `image_id` is the folder's name, a digest of where it lies in full, and the path in it."""

    fields = IMAGE_FIELDS
    may_differ = True

    def __init__(self, argument: str):
        self.root = _folder(argument, "folder")
        self.unsure: set[str] = set()  # folders whose metadata cannot be read: what texts they have is not known

    def items(self) -> list[Item]:
        sizes = walk_files(self.root, self.left_out)
        files = [path for path in sizes if not is_hidden(path)]
        images = [path for path in files if _ending(path)[1:] in IMAGE_ENDINGS]
        elsewhere = links_elsewhere(self.root)
        read = {path for path in files if _is_text(path) and not elsewhere(path)}
        self.unsure.clear()
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
            if any(_is_below(path, folder) for folder in self.unsure):
                item["text_unsure"] = True
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
            for name, text in self._lines_or_none(path, folder):
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

    def _lines_or_none(self, path: str, folder: str) -> Iterable[tuple[str, str | None]]:
        """(file name, text) of each line; of a file below the topmost folder that is damaged none, and it is counted."""
        try:
            return list(self._lines(path, topmost=not folder))
        except ValueError:
            if not folder:
                raise
            self.left_out["metadata_unreadable"] += 1
            self.unsure.add(folder)
            return ()

    def _lines(self, path: str, topmost: bool) -> Iterator[tuple[str, str | None]]:
        """(file name, text) of each line; what the topmost file lacks is an error, others may be there for other purposes."""
        uri = f"{self.root}/{path}"
        required = ("file_name", "text") if topmost else ()
        records = (
            json_lines(uri, required, ("text",)) if path.lower().endswith(".jsonl") else csv_records(uri, required)
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
            names = self._names(record["images"])
            notes = self._notes(record["annotations"])
            self.left_out["images_without_text"] += len(names.keys() - {note["image_id"] for note in notes})
            if notes and not any(note["image_id"] in names for note in notes):
                raise ValueError(f"no annotation's image is there, such as {notes[0]['image_id']}")
            items: dict[str, Item] = {}
            for note in notes:
                item = self._item(here, note, sorted(names.get(note["image_id"], ())))
                if (earlier := items.get(item["image_id"])) is not None:
                    if earlier == item:
                        self.left_out["annotations_twice"] += 1
                        continue
                    item["image_id"] += f":{digest(json.dumps(note.get('caption')).encode())[:8]}"  # ids given twice
                    del item["earlier_id"]
                items[item["image_id"]] = item
            return list(items.values())
        except FileNotFoundError as error:
            raise ValueError(f"source coco:{self.root}: expected captions.json and a folder images") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected COCO captions (`images` with id and file_name, `annotations` with id, image_id and "
                f"caption), received {type(error).__name__}: {error}"
            ) from error
        except OSError as error:
            if not is_unreadable(error):
                raise
            raise ValueError(f"{path}: expected a file that can be read, received {type(error).__name__}") from error

    def _names(self, images: list[Any]) -> dict[int | float | str, set[str]]:
        """Id of an image -> the file names that it has; ValueError where none has any."""
        names: dict[int | float | str, set[str]] = {}
        for image in images:
            if (lacks := _lacks(image, "id")) is not None:
                count_left_out(self.left_out, f"image {lacks}")
                continue
            found = names.setdefault(image["id"], set())
            if isinstance(image.get("file_name"), str):
                found.add(image["file_name"])
        if names and not any(names.values()):
            raise ValueError("no image has a file_name")
        return names

    def _notes(self, annotations: list[Any]) -> list[dict[str, Any]]:
        """Annotations that have ids, in their order; ValueError where none has, or none has a caption."""
        notes = []
        for note in annotations:
            if (lacks := _lacks(note, "image_id", "id")) is None:
                notes.append(note)
            else:
                count_left_out(self.left_out, f"annotation {lacks}")
        if annotations and not any("caption" in note for note in notes):
            raise ValueError("no annotation has ids and a caption")
        return sorted(notes, key=lambda note: (_rank(note["image_id"]), _rank(note["id"]), str(note.get("caption"))))

    @staticmethod
    def _item(here: str, note: dict[str, Any], paths: list[str]) -> Item:
        """An annotation whose image has these names: one, if all is well."""
        item = {
            "image_id": writable(f"coco-{here}-{note['image_id']}-{note['id']}"),
            "earlier_id": writable(f"coco-{note['image_id']}-{note['id']}"),
            "path": paths[0] if paths else "",
            "text": note.get("caption"),
        }
        if "caption" not in note:
            item["error"] = f"annotation {note['id']} of image_id {note['image_id']}: expected a caption, there is none"
        elif len(paths) != 1:
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
        return lines_of(read_text(self.path))

    def _tsv(self) -> list[str]:
        lines = lines_of(read_text(self.path))
        return self._column([line.split("\t") if "\t" in lines[0] else [line] for line in lines])

    def _csv(self) -> list[str]:
        return self._column(csv_lines(self.path))

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
            if not index < len(line) <= len(header):
                raise ValueError(ragged(self.path, number, len(header), len(line)))
            prompts.append(line[index])
        return prompts

    def _jsonl(self) -> list[str]:
        return [record["prompt"] for record in json_lines(self.path, required=("prompt",))]


def _text_beside(root: str, path: str, size: int) -> str:
    """The text of a file. Raises ValueError where it is too large, no UTF-8, no file of bytes, or cannot be opened."""
    name = posixpath.basename(path)
    try:
        return without_marks(read_below(root, path, MAX_TEXT_BYTES, size).decode()).rstrip("\r\n")
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError as error:
        if not is_unreadable(error):
            raise
        raise ValueError(f"{shown(name)} cannot be read ({type(error).__name__})") from error


def _file_record(place: str, root: str, path: str, text: str | None, size: int | None = None) -> Record:
    """The record of an image file; one that is not there, not ours to read, too large or no file of bytes is a row's error."""
    try:
        return Record(place, read_below(root, path, MAX_IMAGE_BYTES, size), text)
    except ValueError as error:
        return Record(place, error=str(error))
    except OSError as error:
        if not is_unreadable(error):
            raise
        return Record(place, error=f"{type(error).__name__}: {shown(posixpath.basename(path))}")


def _lacks(entry: Any, *ids: str) -> str | None:
    """What makes an entry of a COCO set of no use: it is no object, or an id that it must have is not there."""
    if not isinstance(entry, dict):
        return "that is no object"
    return next((f"without {name}" for name in ids if not isinstance(entry.get(name), int | float | str)), None)


def _rank(identity: int | float | str) -> tuple[bool, float, str]:
    """Numbers in their order, then texts in theirs."""
    return (True, 0, identity) if isinstance(identity, str) else (False, identity, "")


def _folder(argument: str, kind: str) -> str:
    uri = real_place(argument)
    if not is_folder(uri):
        raise ValueError(f"source {kind}:{argument}: expected a folder, nothing is there")
    return uri.rstrip("/")


def _ending(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _is_text(path: str) -> bool:
    """Whether a file of a folder has texts for its images."""
    return _ending(path) in TEXT_SUFFIXES or posixpath.basename(path).lower() in METADATA


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")
