"""One invocation: plan, run what is missing, show the result, let MLflow follow. Shared by all stage commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs import report
from jobs.cluster import Cluster
from jobs.experiment import AllResources, Experiment
from jobs.plan import Results, Step, expand, import_node, input_outputs, resolve, select
from jobs.progress import Board
from jobs.run import STAGES, Drive, load_results, record_experiment, run
from storage.workspace import Workspace

if TYPE_CHECKING:
    from storage.lineage import Projector

PROJECTION_WAIT_S = 60.0  # at the end of a run, for MLflow to catch up


class WouldRetrain(ValueError):
    """Settings of a trained codec were changed; training again must be asked for."""


@dataclass(frozen=True)
class Options:
    """What the command line decides beside the experiment."""

    workspace: str
    stage: str | None = None
    only: Mapping[str, str] | None = None
    address: str | None = None
    tracking: str | None = None  # MLflow URI, "off", or None for the database in the workspace
    retrain: bool = False
    rehash: bool = False


def show_plan(experiment: Experiment, options: Options, console: Console) -> None:
    """Print, for each stage instance, reuse or compute, why, and how much."""
    workspace = Workspace.open(options.workspace)
    steps, _ = _plan(experiment, options, workspace)
    width = max(len(step.node.id) for step in steps)
    for step in steps:
        detail = _made(step) if step.record else f"{_amount(step, steps, workspace)}; {step.why}"
        console.print(f"{step.action:8}{step.node.id:{width}}  {detail}", markup=False, highlight=False)
    counts = Counter(step.action for step in steps)
    console.print(f"{counts['reuse']} to reuse, {counts['compute']} to compute", highlight=False)


def execute(experiment: Experiment, options: Options, console: Console) -> dict[str, dict[str, Any]]:
    """Bring the selected instances to results and print them; the records by node id.

    Raises:
        WouldRetrain, RunFailed, ExperimentError, StorageError.
    """
    workspace = Workspace.open(options.workspace)
    steps, results = _plan(experiment, options, workspace)
    todo = [step for step in steps if not step.record]
    _say_short(steps, todo, workspace, console)
    if not options.retrain:
        _refuse_retraining(experiment, todo, results)
    produced = {step.node.id: step.record for step in steps if step.record}
    if todo:
        produced = _compute(experiment, options, workspace, steps, results, console)
    elif record_experiment(workspace, experiment.name, experiment.model_dump(mode="json"), steps, produced):
        with _Projection(workspace, options.tracking, console):
            pass  # what was reused stands under a new experiment: MLflow should show it there too
    for node, record in produced.items():
        if record["stage"] == "report":
            report.show(workspace, node, record, console)
    return produced


def import_checkpoint(file: str, lmbda: float, options: Options, console: Console) -> dict[str, Any]:
    """`retrellis import`: one node, without an experiment around it; its record."""
    workspace = Workspace.open(options.workspace)
    node = import_node(lmbda, file, None)
    with Board(console) as board, _Projection(workspace, options.tracking, console) as notify:
        drive = Drive(workspace, Cluster(), AllResources(), "imported", board, notify)
        return run([node], load_results(workspace), drive)[node.id]


def sync(workspace_root: str, tracking: str | None, console: Console) -> None:
    """Bring MLflow up to the records."""
    from storage.lineage import default_tracking_uri
    from storage.lineage import sync as project

    workspace = Workspace.open(workspace_root, create=False)
    uri = tracking or default_tracking_uri(workspace.root)
    console.print(
        f"{uri}: {project(_records(workspace)(), workspace.blobs.get, uri, workspace.root)}", highlight=False
    )


def _plan(experiment: Experiment, options: Options, workspace: Workspace) -> tuple[list[Step], Results]:
    nodes = select(expand(experiment, options.rehash), options.stage, options.only)
    results = load_results(workspace)
    return resolve(nodes, results), results


def _compute(
    experiment: Experiment,
    options: Options,
    workspace: Workspace,
    steps: list[Step],
    results: Results,
    console: Console,
) -> dict[str, dict[str, Any]]:
    cluster = Cluster(options.address)
    try:
        with Board(console) as board, _Projection(workspace, options.tracking, console) as notify:
            drive = Drive(workspace, cluster, experiment.resources, experiment.name, board, notify)
            produced = run([step.node for step in steps], results, drive)
            record_experiment(workspace, experiment.name, experiment.model_dump(mode="json"), steps, produced)
            notify()
    finally:
        cluster.stop()
    return produced


class _Projection:
    """MLflow follows the records in a thread of its own while the block runs; yields what tells it of news."""

    def __init__(self, workspace: Workspace, tracking: str | None, console: Console) -> None:
        self._console = console
        self._projector: Projector | None = None
        if tracking != "off":
            from storage.lineage import Projector, default_tracking_uri

            uri = tracking or default_tracking_uri(workspace.root)
            self._projector = Projector(_records(workspace), workspace.blobs.get, uri, workspace.root)

    def __enter__(self) -> Callable[[], None]:
        return self._projector.notify if self._projector else lambda: None

    def __exit__(self, *error: object) -> None:
        behind = self._projector.close(0.0 if error[0] else PROJECTION_WAIT_S) if self._projector else None
        if behind:
            self._console.print(behind, style="yellow", markup=False, highlight=False)


def _records(workspace: Workspace) -> Callable[[], dict[str, dict[str, Any]]]:
    """What MLflow is a projection of."""
    return lambda: workspace.records.load("results") | workspace.records.load("experiments")


def _say_short(steps: list[Step], todo: list[Step], workspace: Workspace, console: Console) -> None:
    """The plan in short, as `run` prints it: what is reused, what is computed, and why where that is known yet."""
    for action in ("reuse", "compute"):
        counts = Counter(step.node.stage for step in steps if step.action == action)
        if counts:
            listed = ", ".join(f"{count} {stage}" for stage, count in counts.items())
            console.print(f"{action}: {listed}", highlight=False)
    if not todo:
        console.print("nothing to compute: no training step, no image quantized", highlight=False)
    for step in todo:
        if step.key:
            line = f"  {step.node.id}: {_amount(step, steps, workspace)}; {step.why}"
            console.print(line, markup=False, highlight=False)


def _refuse_retraining(experiment: Experiment, todo: list[Step], results: Results) -> None:
    """Stop where a codec of this experiment and λ exists and would be trained anew with other ingredients."""
    for step in todo:
        if step.node.stage != "train" or step.key is None:
            continue
        for old in results.get("train", {}).values():
            if old["experiment"] == experiment.name and old["axes"] == dict(step.node.axes):
                raise WouldRetrain(
                    f"{step.node.id} has been trained before in experiment {experiment.name!r} "
                    f"({old['seconds']:.0f} s, ended {old['ended']}), and now {step.why}. To train it again, add "
                    "--retrain; to keep the old one, undo the change (images under `latents.images` need no retraining)"
                )


def _amount(step: Step, steps: list[Step], workspace: Workspace) -> str:
    done = {other.node.id: other.record for other in steps if other.record}
    inputs = input_outputs(step.node, done) if step.key else None
    text: str = import_module(STAGES[step.node.stage]).amount(step.node, inputs, workspace)
    return text


def _made(step: Step) -> str:
    assert step.record
    summary = ", ".join(f"{name} {value}" for name, value in step.record["summary"].items())
    return f"made {step.record['ended'][:19]} in {step.record['seconds']:.1f} s ({summary})"
