"""One call that makes MLflow show what the records say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.lineage.graph import Graph
from storage.lineage.server import prepare_client

RecordBodies = Mapping[str, Mapping[str, Any]]  # name, such as results/train/<key>, -> body


@dataclass(frozen=True)
class SyncReport:
    """What a sync did, in runs and logged models."""

    created: int
    updated: int
    unchanged: int
    waiting: int  # results that no experiment record names yet: they are shown once one does
    page: str  # of the newest experiment in MLflow's UI, to put behind the server's root; "" if there is none

    def __str__(self) -> str:
        text = f"MLflow: {self.created} created, {self.updated} updated, {self.unchanged} unchanged"
        return text + (
            f"; {self.waiting} results wait for an experiment that names them" if self.waiting else ""
        )


def sync(
    records: RecordBodies, read_blob: Callable[[str], bytes], tracking_uri: str, workspace_root: str
) -> SyncReport:
    """Bring MLflow up to the records. Idempotent; what an earlier sync left half done is completed.

    Args:
        records: bodies by name, `results/…` and `experiments/…`; others are passed over.
        read_blob: gives a blob's bytes by its digest.
        tracking_uri: a server, or a database such as `default_tracking_uri` names; it is made if need be.
        workspace_root: a local database's artifacts are kept below it.

    Raises:
        LineageUnavailable: MLflow does not answer or is locked, found out within about 10 s.
        LineageError: a record cannot be projected; nothing was written.
    """
    graph = Graph(records)
    prepare_client()
    from storage.lineage.projection import Projection  # noqa: PLC0415 (MLflow takes seconds to import)
    from storage.lineage.tracker import connected  # noqa: PLC0415

    with connected(tracking_uri, workspace_root) as tracker:
        projection = Projection(graph, tracker, read_blob)
        projection.run()
    mirror = projection.mirror
    created, updated = len(mirror.created), len(mirror.updated - mirror.created)
    unchanged = len(mirror.runs) + len(mirror.models) - created - updated
    waiting = len(graph.results) - len(graph.owner)
    return SyncReport(created, updated, unchanged, waiting, projection.newest_page())
