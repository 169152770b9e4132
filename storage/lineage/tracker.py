"""A connection to MLflow that never waits for long, and the workspace's own database.

The database is `mlflow.db` and the artifacts lie in `mlflow-artifacts/`, in the workspace or, of a remote one, in this
node's scratch. Their URIs begin with `mlflow-artifacts:/`, which the server of `retrellis ui` maps to that folder:
absolute URIs would break when the workspace moves.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from storage.lineage.errors import unavailable
from storage.lineage.server import ARTIFACTS, PATIENCE_S, home

_OURS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
)  # errors of the caller, not states of the server


class Tracker:
    """MLflow at one URI.

    Attributes:
        uri: the tracking URI.
        client: MLflow's own client.
    """

    def __init__(self, tracking_uri: str, workspace_root: str) -> None:
        """Point at a server (`http…`) or a database; `connected` gives one that answers."""
        self.uri = tracking_uri
        self.client = MlflowClient(tracking_uri)
        self._local = None if tracking_uri.startswith("http") else home(workspace_root) / ARTIFACTS

    def artifact_location(self, name: str) -> str | None:
        """Where a new MLflow experiment keeps its artifacts: None leaves it to a server."""
        if self._local is None:
            return None
        return f"{ARTIFACTS}:/{hashlib.sha256(name.encode()).hexdigest()[:12]}"

    def save_artifacts(self, artifact_uri: str, files: Mapping[str, bytes]) -> None:
        """Write files by relative name below a run's or model's artifact URI, over those of the same name."""
        if self._local is not None:
            _write(self._local / artifact_uri.removeprefix(f"{ARTIFACTS}:/"), files)
            return
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), files)
            get_artifact_repository(artifact_uri, tracking_uri=self.uri).log_artifacts(folder)  # type: ignore[no-untyped-call]


@contextmanager
def connected(tracking_uri: str, workspace_root: str) -> Iterator[Tracker]:
    """An MLflow that can be written to, with no other process of this host projecting into it meanwhile.

    Raises:
        LineageUnavailable: within about 10 s when no server answers, when the database is locked, or when another
            process goes on projecting; also when either happens later, inside the block.
    """
    for logger in ("mlflow", "alembic"):  # they print what is raised here anyway
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        with _locked(tracking_uri):
            if tracking_uri.startswith("sqlite:///"):
                _open_database(Path(tracking_uri.removeprefix("sqlite:///")))
            yield Tracker(tracking_uri, workspace_root)
    except MlflowException as error:
        if error.error_code in _OURS:
            raise
        raise unavailable(f"MLflow at {tracking_uri} fails: {_reason(error)}") from error
    except (OSError, sqlite3.Error) as error:
        raise unavailable(f"projecting into {tracking_uri} fails: {_reason(error)}") from error


def _open_database(path: Path) -> None:
    """Create the database if need be, then see that it can be written to: MLflow would wait 20 s a call."""
    if not path.exists():
        _create_database(path)
    with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _create_database(path: Path) -> None:
    """Build it aside, so that it is whole or absent: one left half built never heals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="mlflow-new-") as folder:
        new = Path(folder) / path.name
        store = SqlAlchemyStore(f"sqlite:///{new}", f"{ARTIFACTS}:/")  # type: ignore[no-untyped-call]
        store.engine.dispose()
        with closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # a reader, such as the UI, never blocks the writer
        new.replace(path)


@contextmanager
def _locked(tracking_uri: str) -> Iterator[None]:
    """Hold the right of this host's processes to project into a URI: two at once would make every run twice."""
    name = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"retrellis-lineage-{os.getuid()}-{name}.lock"
    with path.open("w") as file:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    busy = f"another process has been projecting into {tracking_uri} for {PATIENCE_S} s"
                    raise unavailable(busy) from error
                time.sleep(0.05)
        yield


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _reason(error: Exception) -> str:
    """The first line of an error; of a failed request the innermost cause, which stands at its end."""
    line = str(error).strip().partition("\n")[0]
    return (line.rpartition("Caused by ")[2] or line).rstrip(")\"'")[:300]
