"""A config's fields are checked against their types, whoever makes it."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import pkgutil
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import lidit
import pipelines
import trainer
from lidit.cli import JOBS
from lidit.runtime.fields import (
    Config,
    Fraction,
    Interval,
    JobConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    _words,
)

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class PartConfig(Config):
    """A part of a job's config."""

    steps: PositiveInt = 1
    rate: PositiveFloat = 1.0
    ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    stage: Literal[0, 1, 2] = 0
    mode: Literal["auto", "never"] | None = None
    limit: NonNegativeInt | None = None
    layers: Sequence[int] | Literal["all"] = "all"
    name: str = ""


@dataclass(frozen=True)
class WholeConfig(JobConfig):
    """A job's config."""

    share: Fraction = 0.5
    store: str = "./store"
    part: PartConfig = PartConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "part.steps: expected a whole number >= 1, received 0"),
        ({"steps": "3"}, "part.steps: expected a whole number >= 1, received '3'"),
        ({"steps": 3.0}, "part.steps: expected a whole number >= 1, received 3.0"),
        ({"steps": True}, "part.steps: expected a whole number >= 1, received True"),
        ({"steps": None}, "part.steps: expected a whole number >= 1, received None"),
        ({"rate": 0}, "part.rate: expected a number > 0, received 0"),
        ({"rate": float("nan")}, "part.rate: expected a number > 0, received nan"),
        ({"rate": "1"}, "part.rate: expected a number > 0, received '1'"),
        ({"rate": True}, "part.rate: expected a number > 0, received True"),
        ({"ratio": 1.0}, "part.ratio: expected a number >= 0 and < 1, received 1.0"),
        ({"stage": 3}, "part.stage: expected 0, 1 or 2, received 3"),
        ({"stage": True}, "part.stage: expected 0, 1 or 2, received True"),
        ({"stage": "1"}, "part.stage: expected 0, 1 or 2, received '1'"),
        ({"mode": "no"}, "part.mode: expected auto, never or null, received 'no'"),
        ({"mode": ["auto"]}, "part.mode: expected auto, never or null, received"),
        ({"limit": -1}, "part.limit: expected a whole number >= 0 or null, received -1"),
    ],
)
def test_a_field_that_does_not_fit_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        PartConfig(**values)
    assert str(error.value).startswith(message)
    with pytest.raises(ValueError):
        dataclasses.replace(PartConfig(), **values)


def test_what_fits_is_kept_as_it_is() -> None:
    config = PartConfig(steps=np.int64(3), rate=2, ratio=np.float32(0.5), stage=2, mode="auto", limit=0, layers=[1])  # type: ignore[arg-type]
    assert (config.steps, config.rate, config.ratio, config.layers) == (3, 2, 0.5, [1])
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_job_names_its_own_fields_alone_and_refuses_secrets_first() -> None:
    with pytest.raises(ValueError, match=r"^share: expected a number >= 0 and <= 1, received 1.5"):
        WholeConfig(share=1.5)
    with pytest.raises(ValueError, match=r"^store: expected an address without credentials"):
        WholeConfig(share=1.5, store="s3://user:secret@bucket/store")


@pytest.mark.parametrize("job", JOBS)
def test_every_jobs_config_is_checked(job: str) -> None:
    config_class = getattr(importlib.import_module(JOBS[job][0]), f"{job.capitalize()}Config")
    assert issubclass(config_class, JobConfig)


def test_every_config_whose_fields_say_what_they_take_is_checked() -> None:
    """A class with bounds beside its fields and another base would check none of them."""
    unchecked = set()
    for package in (lidit, pipelines, trainer):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Config"):
                    hints = [_words(hint) for hint in _hints(value)]
                    if any(hints) and not issubclass(value, Config):
                        unchecked.add(value.__name__)
    assert not unchecked


def _hints(config_class: Any) -> list[Any]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    return [hints[field.name] for field in dataclasses.fields(config_class)]
