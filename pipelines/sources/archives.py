"""Sources whose samples are groups of files: WebDataset tars, and what img2dataset leaves (tars, Parquet, plain files).

Files that follow each other and share their name up to the first dot are one sample: `000123.jpg`, `000123.txt`,
`000123.json`. A name that comes twice makes two samples.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lidit.runtime.uris import shown
from pipelines.sources.base import (
    IMAGE_ENDINGS,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    MAX_TEXT_BYTES,
    USUAL_NAMES,
    ColumnsConfig,
    Piece,
    Record,
    Sharded,
)
from pipelines.sources.locations import (
    count_left_out,
    find_files,
    is_folder,
    is_hidden,
    links_elsewhere,
    list_folder,
    read_below,
    real_place,
    stamp_of,
    too_large,
    what_is_left_out,
)
from pipelines.sources.tars import DamagedShard, tar_files
from pipelines.sources.text_files import is_unreadable

TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tar.zstd", ".tzst",
)  # fmt: skip
CAPTION_CHOICES = ("txt", "caption", "text", "json.caption", "json.text")
PEEK_SAMPLES = 16  # of the first shard, read beforehand: wrong names stop the job before it begins
PEEK_FOR_NAMES = 1000  # of the first shard, as long as a caption or score that was named has not been seen
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES + 2 * MAX_JSON_BYTES  # of all files of a sample that are read
MAX_PARTS = 100_000  # files of one sample; those that follow make another one
MAX_WORDS = 200  # characters of what a message quotes of a sample
MISSING = object()  # no such file, or no such key in it; JSON's null is a value


@dataclass
class Sample:
    """Files of one name: extension -> bytes, or the reason why there are none."""

    key: str
    parts: dict[str, bytes | str] = field(default_factory=dict)


class Grouped(Sharded):
    """A source whose shards are files in order, several a sample."""

    names: SampleNames

    def _records(self, samples: Iterable[Sample], piece: Piece) -> Iterator[Record]:
        """The samples' records. Those without an image are known by their place, which is made to differ where it does not."""
        without: Counter[str] = Counter()
        for sample in samples:
            self.left_out["more_images"] += self.names.more_images(sample)
            for extension in sample.parts:
                if not self.names.knows(extension):
                    count_left_out(self.left_out, f".{extension}" if extension else "without an ending")
            for record in self.names.records(sample, piece["place"]):
                if record.image is None:
                    without[record.place] += 1
                    if (times := without[record.place]) > 1:
                        record.place += f" ({times})"
                yield record


class WebDataset(Grouped):
    """Tar shards: one file, braces (`{0000..0012}`), a wildcard, or all tars below a folder."""

    def __init__(self, argument: str, names: ColumnsConfig = USUAL_NAMES):
        self.argument = real_place(argument)
        self.names = SampleNames(names)

    def pieces(self) -> list[Piece]:
        files = find_files(self.argument, TAR_SUFFIXES, "webdataset", self.left_out)
        try:
            self.names.check(grouped(tar_files(files[0].uri, self.names.needed_to_check)), files[0].uri)
        except OSError as error:
            if not is_unreadable(error):  # then it is a row with a reason, and says nothing of the others
                raise
        return [
            {"place": file.place, "uri": file.uri, "stamp": file.stamp, "rows": None, "bytes": file.size}
            for file in files
        ]

    def read(self, piece: Piece) -> Iterator[Record]:
        samples = grouped(tar_files(piece["uri"], self.names.wanted, self.left_out))
        try:
            yield from self._records(samples, piece)
        except DamagedShard as error:
            yield Record(f"{piece['place']}#end", error=str(error))
        except OSError as error:  # a link that leads nowhere, for one
            if not is_unreadable(error):
                raise
            yield Record(f"{piece['place']}#end", error=f"the shard cannot be read: {type(error).__name__}")


class PlainFiles(Grouped):
    """The `files` layout of img2dataset: a folder per shard, `00000/000000123.jpg` and `.txt` and `.json`."""

    def __init__(self, argument: str, names: ColumnsConfig = USUAL_NAMES):
        self.root = real_place(argument).rstrip("/")
        self.names = SampleNames(names)

    def pieces(self) -> list[Piece]:
        entries = list_folder(self.root)
        stats = {posixpath.basename(entry["name"]): entry for entry in entries}
        pieces = []
        for entry in entries:
            name = posixpath.basename(entry["name"].rstrip("/"))
            if entry["type"] == "directory" and not name.startswith(("_", ".")):
                stamp = stamp_of(stats.get(f"{name}_stats.json", {}))  # written when the shard is whole
                place = f"{posixpath.basename(self.root)}/{name}"
                uri = f"{self.root}/{name}"
                pieces.append({"place": place, "uri": uri, "stamp": stamp, "rows": None, "bytes": 0})
            elif entry["type"] == "directory":
                count_left_out(self.left_out, "folder that is no shard")
            elif not name.endswith(("_stats.json", ".parquet")):  # which img2dataset leaves beside the shards
                count_left_out(self.left_out, what_is_left_out(self.root, name))
        if pieces:
            first = str(pieces[0]["uri"])
            self.names.check(grouped(folder_files(first, self.names.needed_to_check)), first)
        return pieces

    def read(self, piece: Piece) -> Iterator[Record]:
        yield from self._records(grouped(folder_files(piece["uri"], self.names.wanted, self.left_out)), piece)


def open_img2dataset(argument: str, names: ColumnsConfig = USUAL_NAMES) -> Sharded:
    """Opens what img2dataset left in a folder, by its output format: webdataset, parquet or files.

    Raises:
        ValueError: no such folder, or TFRecord, or nothing downloaded yet.
    """
    from pipelines.sources.tables import Parquet

    if not is_folder(argument):
        raise ValueError(f"source img2dataset:{argument}: expected a folder, nothing is there")
    entries = list_folder(argument)
    files = [posixpath.basename(entry["name"]) for entry in entries if entry["type"] != "directory"]
    if any(name.endswith(".tar") for name in files):
        return WebDataset(argument, names)
    if any(name.endswith(".tfrecord") for name in files):
        raise ValueError(f"source img2dataset:{argument}: TFRecord is not read; download as webdataset or parquet")
    folders = [entry for entry in entries if entry["type"] == "directory"]
    if any(not posixpath.basename(entry["name"].rstrip("/")).startswith(("_", ".")) for entry in folders):
        return PlainFiles(argument, names)
    if any(name.endswith(".parquet") for name in files):
        return Parquet(argument, names, downloaded=True)
    raise ValueError(f"source img2dataset:{argument}: expected shards (.tar, .parquet or folders), found none")


class SampleNames:
    """Names of a sample's files: which one is image, caption, score."""

    def __init__(self, names: ColumnsConfig):
        self.image = None if names.image is None else names.image.lower().lstrip(".")
        self.captions = CAPTION_CHOICES if names.caption is None else (names.caption.lstrip("."),)
        self.score = names.score
        texts = [*self.captions, *([self.score] if self.score else [])]
        self._most = {text.lower(): MAX_TEXT_BYTES for text in texts}  # extension -> bytes of a file with it
        self._most |= {text.partition(".")[0].lower(): MAX_JSON_BYTES for text in texts if "." in text}
        named = {"caption": names.caption and self.captions[0], "score": names.score}
        self._named = {what: name for what, name in named.items() if name}

    def is_image(self, extension: str) -> bool:
        """Tells whether a file with this extension is the sample's image."""
        return extension in IMAGE_ENDINGS if self.image is None else extension == self.image

    def image_words(self) -> str:
        """The extensions, for a message."""
        return f".{self.image}" if self.image else ", ".join(f".{name}" for name in IMAGE_ENDINGS)

    def wanted(self, extension: str) -> int:
        """Bytes that a file with this extension may have; 0: it need not be read at all."""
        return MAX_IMAGE_BYTES if self.is_image(extension) else self._most.get(extension, 0)

    def knows(self, extension: str) -> bool:
        """Tells whether a file with this extension is used, or counted as an image that is not."""
        return bool(self.wanted(extension)) or extension in IMAGE_ENDINGS or _is_dotted_image(extension)

    def needed_to_check(self, extension: str) -> int:
        """The same of the files that `check` looks into."""
        return self._most.get(extension, 0) if self._named else 0

    def check(self, samples: Iterable[Sample], where: str) -> None:
        """Looks at a shard's first samples for what was named.

        Raises:
            ValueError: none has an image by the name that is expected, or none has the caption or score that was named: the
                names are wrong, not a row.
        """
        seen: dict[str, None] = {}
        keys: dict[str, None] = {}
        missing, has_image, number = dict(self._named), False, 0
        with contextlib.suppress(DamagedShard):  # the job says so, and looks at the others
            for number, sample in enumerate(samples, start=1):
                seen |= dict.fromkeys(sample.parts)
                keys |= dict.fromkeys(_keys_of(sample.parts.get("json", b"")) if self._named else ())
                has_image = has_image or any(map(self.is_image, sample.parts))
                missing = {what: name for what, name in missing.items() if not self._has(sample, name)}
                if (has_image and not missing) or number >= (PEEK_SAMPLES if not has_image else PEEK_FOR_NAMES):
                    break
            if seen and not has_image:
                raise ValueError(
                    f"{shown(where)}: expected an image ({self.image_words()}) in every sample, its first ones have "
                    f"{', '.join(seen)}; name the extension with --columns.image"
                )
            for what, name in missing.items() if seen else ():
                there = ", ".join([*seen, *(f"json.{key}" for key in keys)])
                raise ValueError(
                    f"{shown(where)}: expected {name} (--columns.{what}) in its samples, none of the first {number:,} has "
                    f"it; they have {there}"
                )

    def more_images(self, sample: Sample) -> int:
        """Counts the images of a sample that are passed over, because it has one already and none was named."""
        if self.image is not None or not any(map(self.is_image, sample.parts)):
            return 0
        return sum(extension in IMAGE_ENDINGS or _is_dotted_image(extension) for extension in sample.parts) - 1

    def records(self, sample: Sample, shard: str) -> Iterator[Record]:
        """The sample's record; several, where its JSON has a list of captions."""
        images = [extension for extension in sample.parts if self.is_image(extension)]
        place = f"{shard}#{sample.key}{'.' + images[0] if images else ''}"
        if not images:
            dotted = [extension for extension in sample.parts if _is_dotted_image(extension)]
            for extension in dotted:
                yield Record(
                    f"{place}.{extension}",
                    error=f"no image ({self.image_words()}): names are cut at the first dot, and the rest of this one is "
                    f"{extension!r}; give files names without further dots",
                )
            if not dotted:
                yield Record(
                    place,
                    error=f"no image ({self.image_words()}); the sample has {', '.join(sample.parts)[:MAX_WORDS]}. Files of a "
                    f"sample must follow each other in a tar",
                )
            return
        image = sample.parts[images[0]]
        if isinstance(image, str):
            yield Record(place, error=image)
            return
        try:
            captions, score = self._captions(sample), self._score(sample)
        except ValueError as error:
            yield Record(place, image, error=str(error))
            return
        for caption in captions:
            yield Record(place, image, caption, score)

    def _captions(self, sample: Sample) -> list[str | None]:
        """The texts of the first choice that has any; blank ones only where no other has: an empty file may stand beside."""
        blank: list[str | None] = [None]
        for choice in self.captions:
            found = self._look_up(sample, choice)
            if found is MISSING or found is None:
                continue
            texts = [text for text in found if text is not None] if isinstance(found, list) else [found]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{choice}: expected text, or a list of texts, received {json.dumps(found)[:80]}")
            if any(map(str.strip, texts)):
                return texts
            blank = texts or blank
        return blank

    def _score(self, sample: Sample) -> float | None:
        found = self._look_up(sample, self.score) if self.score else None
        try:
            return None if found is None or found is MISSING else float(found)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.score}: expected a number, received {repr(found)[:80]}") from error

    def _has(self, sample: Sample, name: str) -> bool:
        try:
            return self._look_up(sample, name) is not MISSING
        except ValueError:  # it is there, and damaged: a row says so
            return True

    @staticmethod
    def _look_up(sample: Sample, name: str) -> Any:
        """The text of a part, or a value of its JSON: `txt`, `json.caption`, `json.meta.caption`; else `MISSING`."""
        extension, key = name.lower(), ""
        if extension not in sample.parts:
            extension, _, key = name.partition(".")
        part = sample.parts.get(extension.lower())
        if part is None:
            return MISSING
        if isinstance(part, str):
            raise ValueError(f".{extension}: {part}")
        try:
            text = part.decode("utf-8-sig")
            if not key:
                return text.rstrip("\r\n")
            record = json.loads(text)
        except UnicodeDecodeError as error:
            raise ValueError(f".{extension}: expected UTF-8, received byte {part[error.start]:#x}") from error
        except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
            raise ValueError(f".{extension}: expected JSON: {error}") from error
        return _value_at(record, key)


def _is_dotted_image(extension: str) -> bool:
    """Whether it is an image's extension behind further dots, such as `01.png` of `cat.01.png`."""
    return "." in extension and extension.rpartition(".")[2] in IMAGE_ENDINGS


def _value_at(record: Any, key: str) -> Any:
    """What stands under a key of an object, or of the objects in it: `caption`, `meta.caption`; else `MISSING`."""
    if not isinstance(record, dict):
        return MISSING
    if key in record:
        return record[key]
    outer, dot, inner = key.partition(".")
    return _value_at(record.get(outer), inner) if dot else MISSING


def _keys_of(part: bytes | str) -> list[str]:
    """The keys of a JSON object, for a message."""
    try:
        record = json.loads(part)
    except (ValueError, RecursionError):
        return []
    return list(record) if isinstance(record, dict) else []


def grouped(files: Iterable[tuple[str, bytes | str]]) -> Iterator[Sample]:
    """Files in order -> samples. The last one is given only when the files have ended well: it may lack something."""
    sample: Sample | None = None
    size = 0
    try:
        for name, content in files:
            folder, base = posixpath.split(name)
            stem, _, extension = base.partition(".")
            key, extension = posixpath.join(folder, stem), extension.lower()
            if sample is None or key != sample.key or extension in sample.parts or len(sample.parts) == MAX_PARTS:
                if sample is not None:
                    yield sample
                sample, size = Sample(key), 0
            size += len(content)
            sample.parts[extension] = content if size <= MAX_SAMPLE_BYTES else too_large(size, MAX_SAMPLE_BYTES)
    except DamagedShard as error:
        if error.behind_end and sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def folder_files(uri: str, wanted: Any, left_out: Counter[str] | None = None) -> Iterator[tuple[str, bytes | str]]:
    """Gives the files of a folder as `tar_files` does those of a tar. Links to texts elsewhere are left out, too."""
    elsewhere = links_elsewhere(uri)
    for entry in list_folder(uri):
        name = posixpath.basename(entry["name"])
        if entry["type"] == "directory":
            if left_out is not None:
                count_left_out(left_out, "folder in a shard")
            continue
        extension = name.partition(".")[2].lower()
        away = extension not in IMAGE_ENDINGS and elsewhere(name)
        if away or is_hidden(name):
            if left_out is not None:
                count_left_out(left_out, "link to a text elsewhere" if away else "hidden")
            continue
        most = wanted(extension)
        if not most:
            yield name, b""
        elif entry["size"] > most:
            yield name, too_large(entry["size"], most)
        else:
            try:
                yield name, read_below(uri, name, most, entry["size"])
            except OSError as error:
                if not is_unreadable(error):
                    raise
                yield name, type(error).__name__
            except ValueError as error:  # such as a pipe
                yield name, str(error)
