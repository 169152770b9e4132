"""One invocation: plan, run what is missing, show the result, let MLflow follow. Shared by all stage commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from rich.console import Console

from jobs import report
from jobs.cluster import Cluster, Share
from jobs.experiment import AllResources, Experiment
from jobs.lineage import Account, Follower
from jobs.plan import Results, Step, expand, import_node, input_outputs, resolve, select
from jobs.progress import Board
from jobs.run import STAGES, Drive, load_results, run
from jobs.stage import share
from storage.workspace import Workspace


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
    approve = (lambda step: None) if options.retrain else partial(_refuse_retraining, experiment, results)
    for step in todo:
        approve(step)
    account = Account(workspace, experiment, steps)
    produced = {step.node.id: step.record for step in steps if step.record}
    if todo:
        produced = _compute(experiment, options, workspace, steps, results, account, approve, console)
    else:
        account.results = produced
        if account.commit():  # what is reused stands under a new experiment: MLflow shows it there too
            with Follower(account, workspace, options.tracking, console) as follower:
                follower.notify(produced)
    for node, record in produced.items():
        if record["stage"] == "report":
            report.show(workspace, node, record, console)
    return produced


def import_checkpoint(file: str, lmbda: float, options: Options, console: Console) -> dict[str, Any]:
    """`retrellis import`: one node, without an experiment around it; its record. MLflow shows it once one uses it."""
    workspace = Workspace.open(options.workspace)
    node = import_node(lmbda, file, None)
    with Board(console) as board:
        drive = Drive(workspace, Cluster(), AllResources(), "imported", board)
        return run([node], load_results(workspace), drive)[node.id]


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
    account: Account,
    approve: Callable[[Step], None],
    console: Console,
) -> dict[str, dict[str, Any]]:
    cluster = Cluster(options.address)
    try:
        cluster.require(_shares(experiment, steps))
        with Board(console) as board, Follower(account, workspace, options.tracking, console) as follower:
            drive = Drive(
                workspace, cluster, experiment.resources, experiment.name, board, follower.notify, approve
            )
            produced = run([step.node for step in steps], results, drive)
            follower.notify(produced)
            account.commit()
    finally:
        cluster.stop()
    return produced


def _shares(experiment: Experiment, steps: list[Step]) -> dict[str, Share]:
    """What the tasks of each stage with work to do occupy; an import runs in this process."""
    stages = dict.fromkeys(step.node.stage for step in steps if not step.record)
    return {stage: share(getattr(experiment.resources, stage)) for stage in stages if stage != "import"}


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


def _refuse_retraining(experiment: Experiment, results: Results, step: Step) -> None:
    """Stop where a codec of this experiment and λ exists and would be trained anew with other ingredients.

    Asked before a run, and again before a training starts: its images may first have to be read.
    """
    if step.node.stage != "train" or step.key is None:
        return
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
