"""Notes of the pieces of sources that a table has taken in whole, which spare reading them again.

A note is written after the piece's rows are committed, and lies in the table's own folder. It is never needed: without it the
piece is read again, and its rows are found to be there already. It holds as long as the piece's stamp, the source's spec
and the options that choose rows are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import fsspec

from lidit.runtime.files import is_there, make_folder, replace_file
from lidit.runtime.outage import outlast
from pipelines.sources.base import Piece

FOLDER = "_ingested"  # in the table's folder, a JSON file per commit
RULES = {"webdataset": 2, "img2dataset": 2}  # raise a kind's (1) when the same piece and options may give other rows


class DonePieces:
    """The notes of one table for one source and its options."""

    def __init__(self, table_uri: str, options: dict[str, Any]):
        self._options = json.dumps({**options, "rules": RULES.get(options.get("kind", ""), 1)}, sort_keys=True)
        self._fs, root = fsspec.core.url_to_fs(table_uri)
        self._folder = f"{root.rstrip('/')}/{FOLDER}"
        self._written = 0
        self._keys: set[str] = set()
        if is_there(self._fs, self._folder):
            paths = [path for path in self._fs.ls(self._folder, detail=False) if path.endswith(".json")]
            for path in paths:
                with contextlib.suppress(ValueError):  # emptied by a power cut: its pieces are read again
                    self._keys.update(json.loads(self._fs.cat_file(path)))

    def __contains__(self, piece: Piece) -> bool:
        return self.key(piece) in self._keys

    def key(self, piece: Piece) -> str | None:
        """The piece's note; None where nothing tells whether its content has changed."""
        if piece["stamp"] is None:
            return None
        about = json.dumps([self._options, piece["uri"], piece["place"], piece["stamp"], piece["rows"]])
        return hashlib.sha256(about.encode()).hexdigest()[:32]

    def note(self, run_id: str, pieces: list[Piece]) -> None:
        """Pieces whose rows are committed, all of them."""
        keys = [key for key in map(self.key, pieces) if key is not None]
        if not keys:
            return
        path = f"{self._folder}/{run_id}-{self._written:06d}.json"

        def write() -> None:
            make_folder(self._fs, self._folder)
            replace_file(self._fs, path, json.dumps(keys).encode())

        outlast(write, "noting what is done")
        self._written += 1
        self._keys.update(keys)
