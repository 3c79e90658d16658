"""The tables that a run reads: one for each phase, each pinned to the version that the run began with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lance.file import LanceFileReader

from lidit.config import LIDiTConfig
from lidit.diffusion import Objective
from lidit.runtime.places import store_place
from lidit.store.buckets import parse_bucket
from lidit.store.features import Features
from lidit.store.fingerprints import comparable, warn_unrecorded
from lidit.store.stale import stale_columns
from trainer.config import DataConfig, ModelConfig, RunPhase
from trainer.data.plan import Plan
from trainer.data.survey import Survey, survey
from trainer.storage import Storage

TAG = "lidit-train-"  # and the run's name, and what tells it from others of that name
TOKEN = "tag.token"  # in the run's folder: what its tags are told by
VERSIONS = "tables.json"  # in the run's folder: store -> version, from the run's first start on


@dataclass(frozen=True)
class PhaseTable:
    """The data of one phase: its table, the survey of it, the order of rows, and the objective."""

    features: Features
    survey: Survey
    plan: Plan
    objective: Objective

    @property
    def bucket(self) -> str:
        """The bucket with most rows."""
        return self.survey.rows.buckets[int(np.argmax(self.survey.rows.counts))]


class Tables:
    """The feature tables of all phases.

    Args:
        phases: of the run.
        data: which encoders and texts are read, and what is held out.
        versions: store -> version; a store that is not in it is opened at its newest.

    Raises:
        ValueError: a table, version or column is not there, or the phases' tables do not belong to one model.
    """

    def __init__(self, phases: Sequence[RunPhase], data: DataConfig, versions: Mapping[str, int]):
        self.phases, self.data, self.versions = phases, data, dict(versions)
        self._features: dict[int, Features] = {}
        self._surveyed: tuple[int, PhaseTable] | None = None
        for number, phase in enumerate(phases):
            version = self.versions.get(phase.store, phase.version)
            features = Features(phase.store, data.encoders, data.text_mix, phase.latents, phase.bucket, version)
            self._features[number] = features
            self.versions.setdefault(phase.store, features.version)
        self._check_alike()

    def features(self, number: int) -> Features:
        """Returns the table of the phase of that number."""
        return self._features[number]

    def phase(self, number: int) -> PhaseTable:
        """Surveys a phase's table, which reads the small columns of every row, and plans the phase; the latest is kept."""
        if self._surveyed is not None and self._surveyed[0] == number:
            return self._surveyed[1]
        phase, data, features = self.phases[number], self.data, self._features[number]
        surveyed = survey(features, data.holdout)
        features.check_resolution(surveyed.rows.buckets, phase.resolution)
        plan = Plan(surveyed.rows, phase.global_batch_size, phase.order_seed, data.block_rows, data.block_steps)
        self._surveyed = number, PhaseTable(features, surveyed, plan, phase.objective)
        return self._surveyed[1]

    def model_config(self, model: ModelConfig) -> LIDiTConfig:
        """Builds the config of the model that fits the tables."""
        first = self._features[0]
        widths = {name: states.width for name, states in first.encoders.items()}
        return model.build(widths, first.latents.channels)

    def pin(self, storage: Storage, known: Mapping[str, int]) -> list[str]:
        """Tags the versions, so that no clean-up of the store takes them away while the run is unfinished.

        Args:
            storage: the run's folder, which the tag's name belongs to.
            known: store -> version, as an earlier start of the run has written them down.

        Returns:
            Warnings: stores that take no tag.

        Raises:
            ValueError: the run's tag keeps another version than this one, and no earlier start has written that down.
        """
        tag, warnings = tag_of(storage), []
        for number, features in self._features.items():
            problem = features.pin(tag, move=known.get(self.phases[number].store) == features.version)
            if problem is not None:
                warnings.append(f"{problem}: a clean-up of old versions there may end this run")
        return list(dict.fromkeys(warnings))

    def stale(self) -> list[str]:
        """Returns warnings about columns that were made from captions or images that have changed since."""
        warnings = []
        for features in {features.table.uri: features for features in self._features.values()}.values():
            fields = [features.table.schema.field(name) for name in features.columns]
            stale = stale_columns(LanceFileReader, features.table, features.table.uri, fields)
            if stale:
                names = sorted({name for names in stale.values() for name in names})
                warnings.append(
                    f"{features.store}: {', '.join(names)} were made from values that have changed since, in {len(stale):,} "
                    f"fragments; they are trained on as they are. `lidit inspect` names the commands that make them again"
                )
        return warnings

    def unpin(self, storage: Storage) -> list[str]:
        """Deletes this run's tags. Returns warnings about stores that keep theirs, or have one that may be this run's."""
        tag, shared, warnings = tag_of(storage), f"{TAG}{storage.name}", []
        for features in self._features.values():
            if (problem := features.unpin(tag)) is not None:
                warnings.append(problem)
            if features.keeps(shared):
                warnings.append(
                    f"{features.table.uri} has the tag {shared}, which earlier versions gave all runs of this name: delete it "
                    f"if no other run needs version {features.version}"
                )
        return list(dict.fromkeys(warnings))

    def check_trained(self, saved: Mapping[str, Any], number: int, begun: bool) -> None:
        """Checks that a checkpoint's run may go on with these tables.

        Args:
            saved: state.json of the checkpoint.
            number: of the phase that the next step is in.
            begun: whether that phase has taken a step, so that its order is fixed.

        Raises:
            ValueError: the features were made otherwise, or their rows would come in another order; says what.
        """
        trained = saved["table"]
        self.features(min(trained["phase"], number)).check_same(trained["features"])
        plan = self.phase(number).plan.fingerprint()
        if trained["phase"] == number and begun and trained["plan"] != plan:
            differing = ", ".join(sorted(key for key in plan if trained["plan"].get(key) != plan[key]))
            raise ValueError(
                f"checkpoint at step {saved['step']:,}: the order of rows would be another one ({differing} changed). Set "
                f"data.* and the phase back, or train under another `name`"
            )

    def _check_alike(self) -> None:
        first = self._features[0]
        for number, features in self._features.items():
            for name, states in features.encoders.items():
                this, other, unrecorded = comparable(states.fingerprint, first.encoders[name].fingerprint)
                warn_unrecorded(f"encoder {name!r} of {features.store} and {first.store}", unrecorded)
                if this != other:
                    raise ValueError(
                        f"phases: encoder {name!r} of {features.store} is not the one of {first.store}: all phases of a run "
                        f"need the same encoders"
                    )
            if features.latents.channels != first.latents.channels:
                raise ValueError(
                    f"phases: latents of phase {number} have {features.latents.channels} channels, those of phase 0 "
                    f"{first.latents.channels}: all phases of a run need the same autoencoder"
                )


def tag_of(storage: Storage) -> str:
    """Returns the run's tag, which no other run has: runs of the same name in another folder or on another machine differ.

    A token is kept in the run's folder; with the folder's URI it makes the tag, so that a copy of a run is another run.
    """
    with contextlib.suppress(FileExistsError):
        storage.create(TOKEN, secrets.token_hex(8).encode())
    token = storage.read(TOKEN).decode()
    return f"{TAG}{storage.name}-{hashlib.sha256(f'{token} {storage.uri}'.encode()).hexdigest()[:10]}"


def pinned_versions(storage: Storage) -> dict[str, int]:
    """Reads the versions that the run's first start has written down; empty before that."""
    content = storage.read_if_there(VERSIONS)
    if content is None:
        return {}
    return {_as_named_now(store): int(version) for store, version in json.loads(content).items()}


def _as_named_now(store: str) -> str:
    """Returns a store's settled name; earlier versions wrote the name down as the user had typed it."""
    try:
        return store_place(store)
    except ValueError:
        return store


def write_versions(storage: Storage, tables: Tables, known: Mapping[str, int]) -> None:
    """Writes the versions down for later starts of the run, before they are tagged. `known`: those already written down."""
    if tables.versions != known:
        storage.write(VERSIONS, json.dumps(tables.versions, indent=1).encode())


def describe(tables: Tables, number: int, table: PhaseTable) -> dict[str, Any]:
    """Describes the table of a phase in JSON, for checkpoints and exported weights."""
    features = table.features
    return {
        "phase": number,
        "versions": tables.versions,
        "features": features.fingerprint(),
        "encoders": {
            name: {"config": states.config, "fingerprint": states.fingerprint}
            for name, states in features.encoders.items()
        },
        "image_size": list(parse_bucket(table.bucket)),
        "plan": table.plan.fingerprint(),
    }
