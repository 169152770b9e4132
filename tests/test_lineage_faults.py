"""Lineage when things go wrong: cut off, deleted, raced, out of reach."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lineage_records import (
    History,
    Record,
    Shown,
    find,
    kodak,
    listening,
    project,
    served,
    small,
    workspace,
)

from storage.lineage import (
    LineageUnavailable,
    Projector,
    SyncReport,
    default_tracking_uri,
    tracker,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return workspace(tmp_path)


class Cut(Exception):
    """The process dies here."""


def test_a_sync_that_was_cut_off_anywhere_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, calls, limit = small(), 0, 10**9
    inner = tracker.MlflowClient

    class Dying(inner):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            nonlocal calls
            found = super().__getattribute__(name)
            if name.startswith("_") or not callable(found):
                return found
            calls += 1
            if calls > limit:
                raise Cut
            return found

    monkeypatch.setattr(tracker, "MlflowClient", Dying)
    whole = workspace(tmp_path / "whole")
    project(history, whole)
    wanted, total = Shown(default_tracking_uri(str(whole))).snapshot(), calls
    assert total > 25
    for cut in range(1, total, 3):
        root, calls, limit = workspace(tmp_path / f"cut{cut}"), 0, cut
        with pytest.raises(Cut):
            project(history, root)
        limit = 10**9
        project(history, root)
        assert Shown(default_tracking_uri(str(root))).snapshot() == wanted, f"cut off after {cut} calls"


def test_what_a_user_deleted_in_mlflow_comes_back(root: Path) -> None:
    history = small()
    project(history, root)
    before = Shown(default_tracking_uri(str(root)))
    parent = next(r for r in before.runs.values() if r.info.run_name == "small")
    before.client.delete_run(parent.info.run_id)
    before.client.delete_experiment(
        next(r for r in before.runs.values() if "#" in r.data.tags["retrellis.id"]).info.experiment_id
    )
    project(history, root)
    assert Shown(default_tracking_uri(str(root))).snapshot() == before.snapshot()


def test_two_syncs_at_once_make_nothing_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = small()
    monkeypatch.setattr(tracker, "PATIENCE_S", 60)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: project(history, root), range(3)))
    assert sorted(r.created for r in reports) == [0, 0, 6]
    assert len(Shown(default_tracking_uri(str(root))).all_runs) == 5


def refused(history: History, root: Path, uri: str | None, seconds: float) -> str:
    began = time.monotonic()
    with pytest.raises(LineageUnavailable) as caught:
        project(history, root, uri)
    assert time.monotonic() - began < seconds
    return str(caught.value)


def test_a_server_that_is_gone_or_silent_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as port:
        pass
    message = refused(small(), tmp_path, f"http://127.0.0.1:{port}", 10)
    assert message.startswith(f"MLflow at http://127.0.0.1:{port} fails: NewConnectionError")
    assert "Connection refused. " in message
    assert message.endswith("run `retrellis sync` when this is mended.")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # what a user has set stands
    with listening() as port:
        assert "timed out" in refused(small(), tmp_path, f"http://127.0.0.1:{port}", 5)


def test_another_process_that_projects_is_not_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "PATIENCE_S", 0.2)
    uri = default_tracking_uri(str(root))
    with tracker.connected(uri, str(root)):
        assert refused(small(), root, None, 5).startswith(
            f"another process has been projecting into {uri} for"
        )


def test_a_locked_or_damaged_database_is_given_up_soon(root: Path) -> None:
    holder = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert "database is locked" in refused(small(), root, None, 10)
    holder.execute("ROLLBACK")
    holder.close()
    assert project(small(), root).created == 6
    other = root / "other"
    other.mkdir()
    (other / "mlflow.db").write_bytes(b"no database" * 1000)
    assert "not a database" in refused(small(), other, None, 5)


def test_a_database_half_made_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise Cut

    monkeypatch.setattr(tracker, "SqlAlchemyStore", dies)
    with pytest.raises(Cut):
        project(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_projector_syncs_in_the_background_and_tells_what_failed(root: Path) -> None:
    history, uri = small(), default_tracking_uri(str(root))
    projector = Projector(lambda: history.records, history.blobs.__getitem__, uri, str(root))
    projector.notify()
    assert projector.close(30) is None
    assert len(Shown(uri).all_runs) == 5

    def broken() -> Mapping[str, Record]:
        raise ValueError("garbled")

    projector = Projector(broken, history.blobs.__getitem__, uri, str(root))
    projector.notify()
    assert (
        projector.close(5) == "MLflow is behind: ValueError: garbled. `retrellis sync` shows the whole error."
    )
    with listening() as port:
        pass
    projector = Projector(
        lambda: history.records, history.blobs.__getitem__, f"http://127.0.0.1:{port}", str(root)
    )
    projector.notify()
    assert "run `retrellis sync` when" in str(projector.close(15))


def test_closing_the_projector_does_not_wait_for_what_hangs(root: Path) -> None:
    hang = threading.Event()

    def load() -> Mapping[str, Record]:
        hang.wait(20)
        return {}

    projector = Projector(load, {}.__getitem__, default_tracking_uri(str(root)), str(root))
    began = time.monotonic()
    projector.notify()
    told = projector.close(0.2)
    assert told == "MLflow is behind: it was not done within 0.2 s. Run `retrellis sync` to catch up."
    assert time.monotonic() - began < 2
    hang.set()


def test_a_moved_workspace_is_served_whole_and_a_server_is_a_place_to_sync_to(root: Path) -> None:
    history, instances = kodak(names=("paper",))
    old = root / "old"
    old.mkdir()
    (root / "mlflow.db").rename(old / "mlflow.db")
    assert project(small(), old).created == 6
    new = old.rename(root / "new")
    with served(new) as uri:
        assert project(small(), new, uri).unchanged == 6
        created = project(history, new, uri).created
        assert project(history, new, uri) == SyncReport(0, 0, created, 0, project(history, new, uri).page)
        shown = Shown(uri)
        runs = [next(i for i in shown.runs if i.startswith("ingest/")), find(instances, "report")]
        files = [{f.path for f in shown.client.list_artifacts(shown.runs[i].info.run_id)} for i in runs]
        assert files == [{"images.json", "record.json"}, {"plots", "record.json", "table.md"}]
    assert project(history, new).unchanged == created
