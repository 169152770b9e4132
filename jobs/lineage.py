"""What MLflow is told of one invocation: the experiment's record, as far as it has come, and all results."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from jobs.experiment import Experiment
from jobs.plan import Step
from storage.keys import digest
from storage.workspace import Workspace

if TYPE_CHECKING:
    from storage.lineage import Projector

CATCH_UP_S = 20.0  # what MLflow gets at the end of a run; the rest is for `retrellis sync`

Record = dict[str, Any]


class Account:
    """The experiment's record while it grows. MLflow follows it in a thread of its own; the run never waits for it."""

    def __init__(self, workspace: Workspace, experiment: Experiment, steps: list[Step]) -> None:
        self._workspace = workspace
        self._reused = {step.node.id for step in steps if step.record}
        config = experiment.model_dump(mode="json", exclude={"resources"})
        # Known before anything has run, so that the record has its name from the start
        roots = {step.node.id: step.key for step in steps if not step.node.inputs}
        identity = {
            "name": experiment.name,
            "config": config,
            "nodes": [step.node.id for step in steps],
            "roots": roots,
        }
        self._name = f"experiments/{digest(identity)}"
        self._body = {
            "version": 1,
            "attempt": str(uuid.uuid4()),
            "name": experiment.name,
            "config": config,
            "digest": digest(identity),
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self.results: Mapping[str, Record] = {}
        self._known: dict[str, Record] = {}

    def commit(self) -> bool:
        """Create the record, naming every result. Returns whether it is news: the same experiment is recorded once."""
        return self._workspace.records.create(self._name, self._so_far())

    def records(self) -> dict[str, Record]:
        """What MLflow is a projection of."""
        recorded = all_records(self._workspace, self._known)
        return recorded if self._name in recorded else recorded | {self._name: self._so_far()}

    def _so_far(self) -> Record:
        instances = [
            {"stage": r["stage"], "key": r["key"], "instance": label, "reused": label in self._reused}
            for label, r in self.results.items()
        ]
        return self._body | {"instances": instances}


class Follower:
    """MLflow follows an account while the block runs; at its end it gets a while to catch up."""

    def __init__(
        self, account: Account, workspace: Workspace, tracking: str | None, console: Console
    ) -> None:
        """`tracking` is MLflow's URI, None for the database in the workspace, "off" for no MLflow."""
        self._account, self._console = account, console
        self._projector: Projector | None = None
        if tracking != "off":
            from storage.lineage import Projector, default_tracking_uri

            uri = tracking or default_tracking_uri(workspace.root)
            self._projector = Projector(account.records, workspace.blobs.get, uri, workspace.root)

    def notify(self, results: Mapping[str, Record]) -> None:
        """There are new results; by node id."""
        self._account.results = dict(results)
        if self._projector:
            self._projector.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        behind = self._projector.close(0.0 if error else CATCH_UP_S) if self._projector else None
        if behind and not error:
            self._console.print(behind, style="yellow", markup=False, highlight=False)


def all_records(workspace: Workspace, known: dict[str, Record] | None = None) -> dict[str, Record]:
    """Results and experiments, by name; `known` as `Records.load` has it."""
    return workspace.records.load("results", known) | workspace.records.load("experiments", known)


def synchronise(workspace_root: str, tracking: str | None, console: Console) -> str:
    """`retrellis sync`: bring MLflow up to the records.

    Returns:
        The newest experiment's page, to put behind the server's address.

    Raises:
        LineageUnavailable: MLflow does not answer or is locked.
    """
    from storage.lineage import default_tracking_uri, sync

    workspace = Workspace.open(workspace_root, create=False)
    uri = tracking or default_tracking_uri(workspace.root)
    report = sync(all_records(workspace), workspace.blobs.get, uri, workspace.root)
    console.print(f"{uri}: {report}", markup=False, highlight=False)
    return report.page
