"""An object store on a bad day: jobs finish, or stop and go on; nothing is lost or doubled, nobody retries for ever."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lidit.runtime.lease import Lease, LeaseHeld
from lidit.store.codec import decode_bytes
from pipelines.engine.table import Table
from tests.support import cluster, s3_proxy
from tests.support.stores import World

pytestmark = pytest.mark.faults

ROWS, FRAGMENTS = 240, 6
LARGE_ROWS = 3000  # whose embeddings, in one file, are more than a part of a multipart upload
COLUMN = "caption_embeds_one"


@pytest.fixture(scope="module")
def bad_day(s3: Any, llms: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A world whose store is on S3 by way of the proxy, and what an unbroken run on a disk makes of the same prompts."""
    world = World(tmp_path_factory.mktemp("bad_day"), llms)
    world.ingest(world.prompts(ROWS), ROWS // FRAGMENTS)
    world.run("embed", "--config", world.config())
    s3.filesystem().mkdir("faults")
    proxy = s3_proxy.S3Proxy(s3.port)
    with cluster.environment(s3.env(proxy.url)):
        yield SimpleNamespace(world=world, proxy=proxy, clean=world.rows(), runs=0)
    proxy.stop()


class Store:
    """A store of its own for a test, with the commands that work on it."""

    def __init__(self, bad_day: Any, rows: int, fragments: int):
        bad_day.runs += 1
        self.world, self.proxy = bad_day.world, bad_day.proxy
        self.uri = f"s3://faults/{bad_day.runs}"
        self.source = ("--source", f"prompts:{self.world.prompts(rows)}", "--rows-per-fragment", rows // fragments)

    def ingest(self, expect: int = 0) -> Any:
        return self.world.run("ingest", "--store", self.uri, *self.source, expect=expect)

    def embed(self, expect: int = 0, **changes: Any) -> Any:
        config = self.world.config(store=self.uri, **changes)
        return self.world.run("embed", "--config", config, expect=expect)

    def dataset(self) -> Any:
        return Table(f"{self.uri}/samples.lance").open()

    def rows(self) -> list[dict[str, Any]]:
        return self.dataset().to_table(columns=["caption", COLUMN, "embed_error"]).to_pylist()

    def assert_like(self, clean: dict[str, dict[str, Any]]) -> None:
        """Every prompt once, embedded as on a quiet day; no file that nothing refers to."""
        dataset, wanted = self.dataset(), {row["caption"]: row for row in clean.values()}
        rows, width = self.rows(), int(dataset.schema.field(COLUMN).metadata[b"lidit:width"])
        assert len(rows) == len(wanted) and {row["caption"] for row in rows} == set(wanted)
        for row in rows:
            mine, theirs = (decode_bytes(v[COLUMN], "bf16", width) for v in (row, wanted[row["caption"]]))
            np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=1e-4)
            assert row["embed_error"] is None
        files = set(dataset.all_files().read_all()["path"].to_pylist())
        known = set(dataset.tracked_files().read_all()["path"].to_pylist())
        assert {path for path in files - known if path.startswith("data/")} == set()


def some(share: float, action: str, only: Callable[[Any], bool] = lambda request: True) -> Callable[[Any], str]:
    """A rule that hits a share of the requests, the same ones every time."""
    draw = random.Random(0)
    return lambda request: action if only(request) and draw.random() < share else "pass"


def first(times: int, action: str, only: Callable[[Any], bool], per: Callable[[Any], Any] = lambda request: 0) -> Any:
    """A rule that hits the first few requests of a kind: of each name that `per` gives them."""
    left: dict[Any, int] = {}

    def rule(request: Any) -> str:
        if only(request) and left.setdefault(per(request), times) > 0:
            left[per(request)] -= 1
            return action
        return "pass"

    return rule


def test_the_answer_to_every_commit_is_lost(bad_day: Any) -> None:
    """It landed, and nobody was told: a blind second try would double the rows."""
    store = Store(bad_day, ROWS, FRAGMENTS)
    path = lambda request: request.path  # noqa: E731
    bad_day.proxy.reset(first(1, "lose_answer", lambda request: request.is_commit, per=path))
    assert store.ingest().summary["rows"] == ROWS
    summary = store.embed().summary
    assert summary["ok"] and summary["errors"] == 0
    assert bad_day.proxy.seen["lose_answer"] >= 3
    store.assert_like(bad_day.clean)


def test_credentials_expire_in_the_middle(bad_day: Any) -> None:
    store = Store(bad_day, ROWS, FRAGMENTS)
    bad_day.proxy.reset(lambda request: "pass")
    store.ingest()
    seen = {"commits": 0}

    def expire(request: Any) -> str:
        seen["commits"] += request.is_commit and "/samples.lance/" in request.path
        return "expired" if seen["commits"] > 2 else "pass"  # the columns, a first fragment, and no more

    bad_day.proxy.reset(expire)
    failed = store.embed(expect=1)
    assert "ExpiredToken" in failed.stderr or "expired" in failed.stderr
    assert 0 < bad_day.proxy.seen["expired"] < 500, "bounded"
    bad_day.proxy.reset(lambda request: "pass")
    done = {row["caption"] for row in store.rows() if row[COLUMN] is not None}
    assert 0 < len(done) < ROWS, "what was committed is kept"
    again = store.embed().summary
    assert again["ok"] and again["rows"] == ROWS - len(done)
    store.assert_like(bad_day.clean)


@pytest.mark.parametrize("action", ["conflict", "precondition"])
def test_a_lease_is_refused(bad_day: Any, action: str) -> None:
    """409 and 412 where nobody holds it: once does no harm, always gives no lease; never are there two."""
    store = Store(bad_day, ROWS, FRAGMENTS)
    bad_day.proxy.reset(first(1000, action, lambda request: request.conditional))
    with pytest.raises(OSError):
        Lease(store.uri, "job").__enter__()
    assert 0 < bad_day.proxy.seen[action] < 50, "bounded"
    bad_day.proxy.reset(first(1, action, lambda request: request.conditional))
    with Lease(store.uri, "job") as held:
        held.check()
        with pytest.raises(LeaseHeld):
            Lease(store.uri, "job").__enter__()


def test_the_answer_to_a_lease_is_lost(bad_day: Any) -> None:
    """Ours all the same: the second try finds it there, written by us."""
    store = Store(bad_day, ROWS, FRAGMENTS)
    bad_day.proxy.reset(first(1, "lose_answer", lambda request: request.conditional))
    with Lease(store.uri, "job") as held:
        held.check()
    assert bad_day.proxy.seen["lose_answer"] == 1


# -- whole jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slow_down_for_a_minute(bad_day: Any) -> None:
    store = Store(bad_day, ROWS, FRAGMENTS)
    bad_day.proxy.reset(some(0.3, "slow_down"))
    store.ingest()
    summary = store.embed(batch_tokens=64).summary
    assert summary["ok"] and summary["errors"] == 0 and bad_day.proxy.seen["slow_down"] > 20
    bad_day.proxy.reset(lambda request: "pass")
    store.assert_like(bad_day.clean)


def test_resets_in_the_middle_of_multipart_uploads(bad_day: Any) -> None:
    store = Store(bad_day, LARGE_ROWS, 1)
    bad_day.proxy.reset(lambda request: "pass")
    store.ingest()
    per_part = lambda request: request.path.rpartition("partNumber=")[2].partition("&")[0]  # noqa: E731
    bad_day.proxy.reset(first(2, "reset", lambda request: request.is_part, per=per_part))
    encoders = [
        {"name": name, "model": str(path), "template": "plain", "dtype": "fp32", "codec": "fp32"}
        for name, path in bad_day.world.llms.items()
    ]
    summary = store.embed(encoders=encoders).summary
    assert summary["ok"] and summary["errors"] == 0 and bad_day.proxy.seen["reset"] >= 4
    verified = bad_day.world.run("verify", "--store", store.uri, "--sample", 0).summary
    assert verified["ok"] and store.dataset().count_rows() == LARGE_ROWS


@pytest.mark.slow
def test_stalls_of_ten_seconds(bad_day: Any) -> None:
    store = Store(bad_day, ROWS, FRAGMENTS)
    data = lambda request: request.method == "PUT" and "/data/" in request.path  # noqa: E731
    bad_day.proxy.reset(first(2, "stall", data))
    store.ingest()
    bad_day.proxy.reset(first(3, "stall", lambda request: request.is_commit or data(request)))
    summary = store.embed().summary
    assert summary["ok"] and bad_day.proxy.seen["stall"] == 3
    store.assert_like(bad_day.clean)


@pytest.mark.parametrize("action", ["conflict", pytest.param("precondition", marks=pytest.mark.slow)])
def test_commits_are_refused_now_and_then(bad_day: Any, action: str) -> None:
    store = Store(bad_day, ROWS, FRAGMENTS)
    path = lambda request: request.path  # noqa: E731
    bad_day.proxy.reset(first(1, action, lambda request: request.is_commit, per=path))
    store.ingest()
    summary = store.embed().summary
    assert summary["ok"] and bad_day.proxy.seen[action] >= 3
    store.assert_like(bad_day.clean)


@pytest.mark.slow
def test_commits_are_always_refused(bad_day: Any) -> None:
    """It ends by itself, says so, and the next run finishes."""
    store = Store(bad_day, ROWS, FRAGMENTS)
    bad_day.proxy.reset(lambda request: "pass")
    store.ingest()
    bad_day.proxy.reset(lambda request: "conflict" if request.is_commit else "pass")
    store.embed(expect=1)
    assert 0 < bad_day.proxy.seen["conflict"] < 1000, "bounded"
    bad_day.proxy.reset(lambda request: "pass")
    assert store.embed().summary["ok"]
    store.assert_like(bad_day.clean)
