"""The `lidit` command: lists and runs every job; `lidit embed ...` is `python pipelines/embed.py ...`.

A job is a module with a config dataclass `<Job>Config` and `main(config)`. Its flags are the config's fields, nested ones
dotted (`--actors.max 4`), also into a list (`--phases.0.steps 10`); `--config FILE.yaml` sets them from a file, flags after
it override. A module with `RECIPES`, functions that return a config, takes `--recipe NAME`: the fields to start from.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NoReturn, TextIO

from lidit.runtime.config_files import check_flags, load_yaml, packages
from lidit.runtime.places import settled
from lidit.runtime.printable import printable_streams

JOBS = {
    "demo": ("demo.store", "the demo's store: rendered scenes, described; to try everything else on"),
    "ingest": ("pipelines.ingest", "rows of a source -> the samples table"),
    "recaption": ("pipelines.recaption", "images -> captions by a vision-language model, behind a quality gate"),
    "embed": ("pipelines.embed", "text columns -> prompt embeddings of several LLMs"),
    "latents": ("pipelines.latents", "images -> latents of an autoencoder, in buckets of one size"),
    "verify": ("pipelines.verify", "checks a store: counts, checksums, embeddings against an independent path"),
    "preprocess": (
        "pipelines.preprocess",
        "ingest, recaption, embed, latents and verify on what is new: for a schedule",
    ),
    "inspect": ("pipelines.inspection", "shows a store: columns, stages, errors, bytes; or a page with samples"),
    "train": ("trainer.train", "the feature table -> checkpoints of a LI-DiT, through Ray Train and DeepSpeed"),
    "export": ("trainer.export", "a checkpoint -> weights for inference, on a CPU"),
    "generate": ("pipelines.generate", "prompts and weights -> a table of images, and a benchmark's files"),
    "probe": ("pipelines.probe", "texts of known truth -> what a linear probe reads from encoders' states, ranked"),
    "score": ("pipelines.score", "generated images -> score columns, and figures with confidence intervals"),
    "sample": ("lidit.sample", "trained weights and a prompt -> images"),
    "info": ("lidit.info", "a model's parameters and FLOPs, part by part"),
}
ON_THE_DEMO = ("embed", "latents")
"""Jobs that, called with no argument at all, are shown on the demo's store, which is made first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job; returns its exit status: 0 done, 1 not finished, 2 the user's input is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"lidit {version('lidit')}")
        return 0
    if argv[0] not in JOBS:
        print(f"lidit: no job {argv[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with printable_streams():  # captions, file names and servers' words come to the terminal below
        return _run(argv)


def run(job: str) -> NoReturn:
    """Runs a job with this process's arguments, and ends the process: what `python pipelines/embed.py` does."""
    sys.exit(main([job, *sys.argv[1:]]))


def _run(argv: list[str]) -> int:
    module = importlib.import_module(JOBS[argv[0]][0])
    try:
        config = parse_config(argv[0], module, argv[1:])
        with _stdout_to_stderr() as stdout, _ray_of_its_own():
            if argv == argv[:1] and argv[0] in ON_THE_DEMO:
                _make_demo(argv[0])
            summary = module.main(settled(config))
            print(summary.to_text(), file=sys.stderr)
            print(summary.to_json(), file=stdout, flush=True)
        return 0 if summary.ok else 1
    except ValueError as error:
        print(f"lidit {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lidit {argv[0]}: stopped; what is committed is kept, the same command goes on", file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        print(f"lidit {argv[0]}: {_last_cause(error)}", file=sys.stderr)
        return 1
    except Exception:  # a fault of lidit's own
        traceback.print_exc()
        return 1


def _make_demo(job: str) -> None:
    """Makes the demo's store in ./store, unless somebody's own rows are there."""
    demo = importlib.import_module(JOBS["demo"][0])
    config = demo.DemoConfig()
    if demo.may_be_ours(config.store):
        print(f"lidit {job}: no arguments, so this is the demo: its store is {config.store}", file=sys.stderr)
        print(demo.main(config).to_text(), file=sys.stderr)


def parse_config(job: str, module: Any, argv: list[str]) -> Any:
    """Command line and YAML -> the job's config. Raises ValueError naming the flag or key that does not fit."""
    import jsonargparse

    class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults beside each flag, the job's description as it is written."""

    config_class = getattr(module, f"{job.capitalize()}Config")
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        import_path_denylist=["*"],  # no value has a module imported
        import_path_allowlist=sorted(packages(config_class)),
    )
    fields = dataclasses.fields(config_class)
    names, argv = _take_names(argv, "--encoders") if hasattr(config_class, "only") else ([], argv)
    recipe, argv = _take_recipe(argv, getattr(module, "RECIPES", {}))
    argv = check_flags(argv, config_class)
    argv, changes = _take_list_changes(argv, [field.name for field in fields])
    parser = jsonargparse.ArgumentParser(
        prog=f"lidit {job}",
        description=module.__doc__,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(config_class, as_group=False)
    if hasattr(module, "RECIPES"):
        parser.add_argument("--recipe", help=f"Fields to start from: {', '.join(module.RECIPES)}.")
    if recipe is not None:
        parser.set_defaults(dataclasses.asdict(recipe))
    try:
        parsed = parser.instantiate(parser.parse_args(_normalise(argv, fields), env=False))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        known = ", ".join(field.name for field in fields)
        raise ValueError(
            f"{error}\nexpected flags or YAML keys: {known} (`lidit {job} --help` explains them)"
        ) from error
    values = {field.name: parsed[field.name] for field in fields}
    for name, index, key, value in changes:
        values[name] = _changed(values[name], index, key, value, f"--{name}.{index}.{key}")
    config = config_class(**values)
    return config.only(names) if names else config


def _normalise(argv: list[str], fields: Sequence[dataclasses.Field[Any]]) -> list[str]:
    """`--rows-per-fragment 8 --dry-run` -> `--rows_per_fragment 8 --dry_run true`: the spelling that the parser knows."""
    switches = {f"--{field.name}" for field in fields if field.type in (bool, "bool")}
    normal: list[str] = []
    for index, word in enumerate(argv):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag.replace("-", "_").replace("__", "--", 1) + equals + value
        normal.append(word)
        if word in switches and argv[index + 1 : index + 2] not in (["true"], ["false"]):
            normal.append("true")
    return normal


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[TextIO]:
    """Sends all that is printed meanwhile to stderr, Ray's own processes included; gives the real stdout.

    Stdout carries the JSON summary and nothing else, so that scripts can read it.
    """
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(stdout.fileno(), 1)
        stdout.close()


@contextlib.contextmanager
def _ray_of_its_own() -> Iterator[None]:
    """Ends the Ray that the job has started before stdout is given back: its threads print of killed workers, seconds later.

    This file imports no Ray: whether a job did is asked of the loaded modules.
    """

    def is_up() -> bool:
        return "ray" in sys.modules and sys.modules["ray"].is_initialized()

    was_up = is_up()
    try:
        yield
    finally:
        if is_up() and not was_up:
            sys.modules["ray"].shutdown()


def _take_names(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Takes `FLAG NAME ...` out of a command line; `FLAG=[{...}]` is left to the parser."""
    if flag not in argv:
        return [], argv
    first = argv.index(flag) + 1
    last = first
    while last < len(argv) and not argv[last].startswith(("-", "[", "{")):
        last += 1
    if last == first:
        return [], argv
    return argv[first:last], argv[: first - 1] + argv[last:]


def _take_recipe(argv: list[str], recipes: Mapping[str, Callable[[], Any]]) -> tuple[Any, list[str]]:
    """Takes `--recipe NAME` out of a command line: (its config, the rest). The first recipe where nothing is asked for.

    None where a file decides: what it leaves out are the fields' own defaults.
    """
    words = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--recipe=") else [arg])]
    if not recipes or "--recipe" not in words:
        by_file = any(word == "--config" or word.startswith("--config=") for word in words)
        return (None if by_file or not recipes else next(iter(recipes.values()))()), argv
    place = words.index("--recipe")
    name = words[place + 1] if place + 1 < len(words) else ""
    if name not in recipes:
        raise ValueError(f"--recipe: expected one of {', '.join(recipes)}, received {name!r}")
    return recipes[name](), words[:place] + words[place + 2 :]


def _take_list_changes(argv: list[str], fields: Sequence[str]) -> tuple[list[str], list[tuple[str, int, str, Any]]]:
    """Takes every `--FIELD.N.KEY VALUE` out of a command line: (the rest, [(field, n, key, value read as YAML)])."""
    rest: list[str] = []
    changes = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name, _, tail = flag.removeprefix("--").replace("-", "_").partition(".")
        index, _, key = tail.partition(".")
        if not (word.startswith("--") and name in fields and index.isdecimal() and key):
            rest.append(word)
            continue
        text = value if equals else next(words, None)
        if text is None:
            raise ValueError(f"{flag}: expected a value after it")
        changes.append((name, int(index), key, load_yaml(text, flag)))
    return rest, changes


def _changed(items: Sequence[Any], index: int, key: str, value: Any, flag: str) -> tuple[Any, ...]:
    """The items with one field of one of them changed."""
    if index >= len(items):
        raise ValueError(f"{flag}: there are {len(items)}, the first is 0")
    known = [field.name for field in dataclasses.fields(items[index])]
    if key not in known:
        raise ValueError(f"{flag}: expected one of {', '.join(known)} after the number")
    return tuple(dataclasses.replace(item, **{key: value}) if n == index else item for n, item in enumerate(items))


def _last_cause(error: BaseException) -> str:
    """The innermost message: Ray wraps a worker's error in its own, with a remote traceback."""
    cause = getattr(error, "cause", None) or error.__cause__
    return _last_cause(cause) if isinstance(cause, BaseException) and cause is not error else str(error).strip()


def _usage() -> str:
    jobs = "\n".join(f"  {name:10} {text}" for name, (_, text) in JOBS.items())
    return f"usage: lidit JOB [--help] [--config FILE.yaml] [flags]\n\njobs:\n{jobs}\n\n`lidit JOB --help` explains every flag."


if __name__ == "__main__":
    sys.exit(main())
