"""Deduplicates rows across the workers of an ingest and the table: the one place that says "this is new".

`DedupIndex` is a small actor beside the driver. A worker shows it the identities (and digests, and perceptual hashes) of a
window of rows and is told which to keep; what it keeps is claimed for its unit. A unit that is begun again, because its worker
died, may claim the same rows again, and nobody else may have them meanwhile. So of whichever attempt the driver gets the
result first, its files may be committed (`settle`), and no other's: no row gets in twice, whoever is killed and whatever Ray
repeats, and none is lost. (Ray does give the result of a worker that died after it had handed it over, and repeats the unit
all the same, without giving the second result.)

Memory a row of the table: 16 bytes for its identity, 16 for its digest (with `duplicates`), 32 for its perceptual hash (with
`near_duplicates`). The rows themselves are never here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lidit.store import columns
from pipelines.engine.table import Table
from pipelines.ingestion.hash_index import HashIndex, KeySet, keys_of

LOAD_ROWS = 1 << 18  # of the table, read at a time
Key = tuple[int, int]

# What `seen` says of an identity.
UNKNOWN, IN_TABLE, IN_RUN = "unknown", "in_table", "in_run"
# What `claim` says of a row: keep it, or why not, which may also be IN_TABLE. The last two are names of filters.
NEW, REPEATED, DUPLICATE, NEAR_DUPLICATE = "new", "repeated", "duplicates", "near_duplicates"
# What `settle` says of a result: the unit has one already; good; good, but duplicates of rows in units that are not settled yet
# were dropped from it.
REJECTED, FINAL, PROVISIONAL = "rejected", "final", "provisional"


@dataclass
class _Claims:
    """What one attempt at a unit has been given."""

    hashes: HashIndex
    keys: set[Key] = field(default_factory=set)
    digests: set[Key] = field(default_factory=set)
    provisional: bool = False


class DedupIndex:
    """Identities of the table's rows and of this run's; digests and hashes where a filter needs them."""

    def __init__(self, table_uri: str, duplicates: bool = False, near_duplicates: int | None = None):
        self._duplicates, self._distance = duplicates, near_duplicates
        self._table, self._run, self._digests = KeySet(), KeySet(), KeySet()
        self._hashes = HashIndex(near_duplicates or 0)
        self._claims: dict[str, dict[int, _Claims]] = {}  # unit in hand -> its attempts
        self._owner: dict[Key, str] = {}  # identity in hand -> its unit
        self._digest_owner: dict[Key, str] = {}
        self._attempts = 0
        self._load(table_uri)

    def begin(self, unit: str) -> int:
        """A worker takes up a unit, perhaps not the first one. Returns the attempt's number."""
        self._attempts += 1
        self._claims.setdefault(unit, {})[self._attempts] = _Claims(HashIndex(self._distance or 0))
        return self._attempts

    def seen(self, ids: Sequence[str]) -> list[str]:
        """Per identity: `in_table` before this run, `in_run` (a unit that is settled), or `unknown`."""
        keys = keys_of(ids)
        in_table, in_run = self._table.contains(keys), self._run.contains(keys)
        return [IN_TABLE if old else IN_RUN if new else UNKNOWN for old, new in zip(in_table, in_run)]

    def claim(
        self, unit: str, attempt: int, ids: Sequence[str], digests: Sequence[str | None], hashes: Sequence[int | None]
    ) -> list[str]:
        """Per row, in order: `new`, and now the unit's; or why it is not to be kept.

        Digest or hash None: the row has no image, or nobody asks.
        """
        claims = self._claims.get(unit, {}).get(attempt)
        if claims is None:
            return [REPEATED] * len(ids)  # another attempt's result is settled: this one's will be rejected
        keys = keys_of(ids)
        in_table, in_run = self._table.contains(keys), self._run.contains(keys)
        image_keys = keys_of([text or "" for text in digests])
        double = self._digests.contains(image_keys)
        near = self._near([value or 0 for value in hashes])
        given: list[int] = []  # hashes that this call has given
        verdicts = []
        for row, (key, image_key) in enumerate(zip(_tuples(keys), _tuples(image_keys))):
            has_digest = self._duplicates and digests[row] is not None
            has_hash = self._distance is not None and hashes[row] is not None
            if in_table[row]:
                verdicts.append(IN_TABLE)
            elif in_run[row] or self._taken(key, claims.keys, self._owner, claims, unit):
                verdicts.append(REPEATED)
            elif has_digest and (
                double[row] or self._taken(image_key, claims.digests, self._digest_owner, claims, unit)
            ):
                verdicts.append(DUPLICATE)
            elif has_hash and (near[row] or self._near_one(hashes[row], given, claims, unit)):
                verdicts.append(NEAR_DUPLICATE)
            else:
                verdicts.append(NEW)
                self._owner[key] = unit
                claims.keys.add(key)
                if has_digest:
                    self._digest_owner[image_key] = unit
                    claims.digests.add(image_key)
                if has_hash:
                    given.append(hashes[row])  # type: ignore[arg-type]
        claims.hashes.add(np.array(given, np.uint64))
        return verdicts

    def settle(self, unit: str, attempt: int) -> str:
        """The driver has a result of the unit: `rejected` if it has had one before.

        `provisional`: some of its rows were left out for the sake of units that are still in hand. Should those never be
        committed, this unit must be read again; so it must not be noted as done before them.
        """
        attempts = self._claims.pop(unit, {})
        if attempt not in attempts:
            return REJECTED
        for claims in attempts.values():
            for key in claims.keys:
                self._owner.pop(key, None)
            for key in claims.digests:
                self._digest_owner.pop(key, None)
        settled = attempts[attempt]
        self._run.add(_array(settled.keys))
        self._digests.add(_array(settled.digests))
        self._hashes.add(settled.hashes.values())
        return PROVISIONAL if settled.provisional else FINAL

    def _near(self, hashes: Sequence[int]) -> np.ndarray:
        """Against all that is settled."""
        if self._distance is None:
            return np.zeros(len(hashes), bool)
        return self._hashes.near(np.array(hashes, np.uint64))

    def _near_one(self, value: Any, given: list[int], claims: _Claims, unit: str) -> bool:
        """Against what this call has given, and what all units have in hand."""
        if any((value ^ other).bit_count() <= (self._distance or 0) for other in given):
            return True
        wanted = np.array([value], np.uint64)
        if claims.hashes.near(wanted)[0]:
            return True
        others = (claim for name, attempts in self._claims.items() if name != unit for claim in attempts.values())
        if any(other.hashes.near(wanted)[0] for other in others):
            claims.provisional = True
            return True
        return False

    @staticmethod
    def _taken(key: Key, mine: set[Key], owner: dict[Key, str], claims: _Claims, unit: str) -> bool:
        """Whether this attempt has the key already, or another unit; an earlier attempt at the same unit does not count."""
        if key in mine:
            return True
        if owner.get(key, unit) == unit:
            return False
        claims.provisional = True
        return True

    def _load(self, table_uri: str) -> None:
        names = [columns.IMAGE_ID]
        names += [columns.IMAGE_DIGEST] * self._duplicates + [columns.IMAGE_PHASH] * (self._distance is not None)
        for batch in Table(table_uri).open().to_batches(columns=names, batch_size=LOAD_ROWS, batch_readahead=2):
            self._table.add(_new(self._table, keys_of(batch.column(columns.IMAGE_ID).to_pylist())))
            if self._duplicates:
                digests = batch.column(columns.IMAGE_DIGEST).drop_null().to_pylist()
                self._digests.add(_new(self._digests, keys_of(list(dict.fromkeys(digests)))))
            if self._distance is not None:
                self._hashes.add(batch.column(columns.IMAGE_PHASH).drop_null().cast(pa.uint64()).to_numpy())


def start_index(table_uri: str, duplicates: bool, near_duplicates: int | None) -> Any:
    """The actor, on the driver's own node, which must not go away either; ready when the table's rows are loaded."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(DedupIndex)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote(table_uri, duplicates, near_duplicates)


def _new(keys: KeySet, candidates: np.ndarray) -> np.ndarray:
    return candidates[~keys.contains(candidates)]


def _tuples(keys: np.ndarray) -> list[Key]:
    return [(first, second) for first, second in keys.tolist()]


def _array(keys: set[Key]) -> np.ndarray:
    return np.array(list(keys), np.uint64).reshape(-1, 2)
