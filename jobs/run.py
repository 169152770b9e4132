"""The driver: walks the graph, reuses what records hold, computes the rest, and commits each result as a record."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from threading import Event
from typing import Any

from jobs.cluster import Cluster, Interrupted, Withdrawn
from jobs.early import EarlyStep, HeadStart, Watch
from jobs.plan import Results, Step, input_outputs, resolve
from jobs.progress import Board, Heartbeat, is_alive, read_beat
from jobs.resources import AllResources
from jobs.stage import Node, Outcome, Output, Task
from storage.errors import StorageFull
from storage.workspace import Workspace

# One file per stage; imported when the stage is computed.
STAGES: Mapping[str, str] = {
    "ingest": "jobs.ingest",
    "train": "jobs.train",
    "import": "jobs.import_codec",
    "tables": "jobs.tables",
    "tune": "jobs.tune",
    "quantize": "jobs.quantize",
    "finetune": "jobs.finetune",
    "evaluate": "jobs.evaluate",
    "report": "jobs.report",
}
AT_ONCE = 16  # stage instances driven at once; how many tasks really run is Ray's to decide
VERSIONS_OF = ("retrellis", "torch", "numpy", "ray", "zarr", "numba")

Record = dict[str, Any]


class RunFailed(RuntimeError):
    """Some stage instances failed; what finished is kept."""


class RunCancelled(RunFailed):
    """Somebody has asked for an end by `retrellis cancel`; what finished is kept."""


@dataclass(frozen=True)
class Drive:
    """What a run needs beside its nodes."""

    workspace: Workspace
    cluster: Cluster
    resources: AllResources
    experiment: str  # its name, noted in records
    board: Board
    # called with all results, after each new one
    committed: Callable[[Mapping[str, Record]], None] = lambda results: None
    # called before a step is computed; raises where that must be asked for
    approve: Callable[[Step], None] = lambda step: None
    # names of result records that exist, but whose data is not whole any more
    distrusted: frozenset[str] = frozenset()
    cancelled: Event = field(default_factory=Event)

    def cancel(self) -> None:
        """End what runs and start nothing more."""
        self.cancelled.set()
        self.cluster.interrupt()


def load_results(workspace: Workspace) -> dict[str, dict[str, Record]]:
    """Every result record, by stage and key."""
    results: dict[str, dict[str, Record]] = {}
    for name, record in workspace.records.load("results").items():
        _, stage, key = name.split("/")
        results.setdefault(stage, {})[key] = record
    return results


def run(nodes: list[Node], results: Results, drive: Drive) -> dict[str, Record]:
    """Bring every node to a result; independent ones go on when one fails.

    Returns:
        The records by node id.

    Raises:
        RunFailed: names each instance that failed and why; the others' results are kept.
        RunCancelled: somebody asked for an end.
        KeyboardInterrupt: after Ray has been stopped; what finished is kept.
    """
    produced: dict[str, Record] = {}
    failed: dict[str, BaseException] = {}
    running: dict[Future[Record], Step] = {}
    early = HeadStart(drive.resources, drive.board, drive.cluster, results.get("finetune", {}).values())
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="stage")

    def begin(steps: list[Step]) -> None:
        for step in _ready(steps, running, failed):
            running[pool.submit(_compute, step, dict(produced), drive)] = step
        for begun in early.steps(steps, produced, running, failed):
            running[pool.submit(_compute_early, begun, dict(produced), drive)] = begun.step

    def end(step: Step, error: BaseException) -> None:
        verb = "stopped" if isinstance(error, Interrupted) else "failed"
        if isinstance(error, Withdrawn):
            verb = "withdrawn"
            early.withdraw(step)
        else:
            failed[step.node.id] = error
        drive.board.say(f"{verb}: {step.node.id}: {error}")

    steps: list[Step] = []
    finished: set[Future[Record]] | None = None
    try:
        while True:
            if finished is None or finished:
                steps = resolve(nodes, results, produced)
                produced |= {step.node.id: step.record for step in steps if step.record}
            if not drive.cancelled.is_set():
                begin(steps)
            if not running:
                break
            finished = wait(running, early.look_every_s, return_when=FIRST_COMPLETED).done
            for future in finished:
                step = running.pop(future)
                if error := future.exception():
                    end(step, error)
                else:
                    produced[step.node.id] = future.result()
                    drive.committed(produced)
    except KeyboardInterrupt:
        drive.cluster.interrupt()  # ends the tasks, so that the threads that wait for them end too
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if drive.cancelled.is_set() and any(node.id not in produced for node in nodes):
        raise RunCancelled("cancelled; what finished is kept, and the same command goes on from there")
    if failed:
        raise _failure(failed, [node.id for node in nodes if node.id not in produced])
    return produced


def _ready(
    steps: list[Step], running: Mapping[Future[Record], Step], failed: Mapping[str, Any]
) -> list[Step]:
    """Steps to start now: inputs known, not finished, and nobody is at work on the same key."""
    busy = {name for step in running.values() for name in (step.key, step.node.id)}
    ready = []
    for step in steps:
        mine = {step.key, step.node.id}
        if step.key and not step.record and step.node.id not in failed and not mine & busy:
            busy.add(step.key)
            ready.append(step)
    return ready


def _compute(step: Step, produced: Mapping[str, Record], drive: Drive) -> Record:
    """Compute one node and create its record, under an attempt that `status` can see."""
    drive.approve(step)
    name = f"results/{step.node.stage}/{step.key}"
    if name not in drive.distrusted and (record := drive.workspace.records.get(name)):
        drive.board.say(f"done: {step.node.id}: another run has made it meanwhile")
        return record
    inputs = input_outputs(step.node, produced)
    about, outcome = _work(step, inputs, drive)
    return _commit(about, step, inputs, outcome, drive)


def _compute_early(begun: EarlyStep, produced: Mapping[str, Record], drive: Drive) -> Record:
    """Finetune while the latents are still being quantized; the record is created once they are there.

    Raises:
        Withdrawn: it goes on in the usual way, once they are there.
    """
    node = begun.step.node
    drive.board.say(f"early: {node.id} begins while its latents are being quantized")
    about, outcome = _work(begun.step, begun.inputs, drive, Watch(begun, drive.board))
    try:
        if wait([begun.latents]).done and begun.latents.exception():
            raise Withdrawn("its latents could not be quantized")
        produced = {**produced, node.inputs["latents"].node: begun.latents.result()}
        inputs = input_outputs(node, produced)
        if not begun.saw(outcome.seen, inputs, drive.workspace):
            raise Withdrawn("it was trained on latents that have been replaced since: it begins anew")
    except Withdrawn as error:
        place = f"failures/{node.stage}/{begun.step.key}/{about['attempt']}"
        _note_failure(drive.workspace, place, about, error)
        raise
    (step,) = resolve([node], {}, produced)
    return _commit(about | {"key": step.key}, step, inputs, outcome, drive)


def _work(
    step: Step, inputs: Mapping[str, Output], drive: Drive, watch: Callable[[], None] = lambda: None
) -> tuple[Record, Outcome]:
    """Compute one node, under an attempt that `status` can see; what its record says of that, and the outcome."""
    node, attempt, clock = step.node, str(uuid.uuid4()), time.monotonic()
    about: Record = {
        "attempt": attempt,
        "instance": node.id,
        "stage": node.stage,
        "key": step.key,
        "started": _now(),
    }
    about |= {"experiment": drive.experiment, "host": platform.node()}
    place = f"attempts/{node.stage}/{step.key}/{attempt}"
    drive.workspace.records.create(place, about)
    row = drive.board.row(node.id)
    heartbeat = Heartbeat(drive.workspace, place, row, drive.cancel)
    task = Task(
        node=node,
        key=step.key or "",
        inputs=inputs,
        workspace=drive.workspace,
        cluster=drive.cluster,
        resources=getattr(drive.resources, "train" if node.stage == "import" else node.stage),
        attempt=attempt,
        progress=row.update,
        say=lambda line: drive.board.say(f"  {node.id}: {line}"),
        watch=watch,
    )
    before = drive.cluster.worked_s()
    try:
        outcome = import_module(STAGES[node.stage]).compute(task)
    except BaseException as error:
        _note_failure(drive.workspace, f"failures/{node.stage}/{step.key}/{attempt}", about, error)
        raise
    finally:
        heartbeat.close()
        row.close()
    # Where several instances want the same cores, most of the time is spent waiting for them
    spent = {"seconds": time.monotonic() - clock, "worker_seconds": drive.cluster.worked_s() - before}
    about |= {"ended": _now(), **{name: round(value, 3) for name, value in spent.items()}}
    return about, outcome


def _commit(
    about: Record, step: Step, inputs: Mapping[str, Output], outcome: Outcome, drive: Drive
) -> Record:
    """Create the result's record; the loser of a race adopts the winner's. Checkpoints have served, and go."""
    record = about | {
        "version": 1,
        "axes": dict(step.node.axes),
        "ingredients": step.ingredients,
        "reads": {name: output["digest"] for name, output in inputs.items()},
        "outputs": outcome.outputs,
        "summary": outcome.summary,
        "versions": {name: version(name) for name in VERSIONS_OF},
    }
    if outcome.early_key:
        record["early_key"] = outcome.early_key
    name = f"results/{step.node.stage}/{step.key}"
    if drive.workspace.records.create(name, record):
        worked = f" ({record['worker_seconds']:.1f} s of work)" if record["worker_seconds"] else ""
        drive.board.say(f"done: {step.node.id} in {record['seconds']:.1f} s{worked}")
    else:
        record = drive.workspace.records.get(name) or record
        drive.board.say(f"done: {step.node.id}: a record of it was there first, and is taken")
    for key in filter(None, (step.key, outcome.early_key)):
        _clear(drive.workspace, f"attempts/{step.node.stage}/{key}", about["attempt"])
    return record


def _clear(workspace: Workspace, place: str, own: str) -> None:
    """Delete the unfinished work of this attempt and of dead ones; one that lives still writes, and clears its own."""
    for attempt in {name.removeprefix(f"{place}/").partition("/")[0] for name in workspace.list(place)}:
        if attempt == own or not is_alive(read_beat(workspace, f"{place}/{attempt}")):
            workspace.delete(f"{place}/{attempt}")


def _note_failure(workspace: Workspace, name: str, about: Record, error: BaseException) -> None:
    """For `status`. Where the disk is full even for this, the error itself is what the user must see."""
    body = about | {"error": f"{type(error).__name__}: {error}", "ended": _now()}
    try:
        workspace.records.create(name, body | {"interrupted": isinstance(error, Interrupted | Withdrawn)})
    except StorageFull as full:
        error.add_note(f"`retrellis status` will not show this failure: {full}")


def _failure(failed: Mapping[str, BaseException], missing: list[str]) -> RunFailed:
    """One error for all: instances that failed for the same reason stand together, with one traceback."""
    alike: dict[str, list[str]] = {}
    for name, error in failed.items():
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        alike.setdefault(f"{error}{notes}", []).append(name)
    lines = [
        f"{len(failed)} stage instance(s) failed; what finished is kept, and the same command goes on from there:"
    ]
    for reason, names in alike.items():
        lines.append(f"  {', '.join(names)}:\n    {reason}")
    skipped = [name for name in missing if name not in failed]
    if skipped:
        lines.append(f"  {len(skipped)} that read what failed were not started")
    return RunFailed("\n".join(lines))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
