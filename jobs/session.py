"""One invocation: plan, run what is missing, show the result, let MLflow follow. Shared by all stage commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from rich.console import Console

from jobs import report
from jobs.cluster import Cluster
from jobs.experiment import Experiment
from jobs.graph import expand, import_node
from jobs.lineage import Account, Follower
from jobs.local import image_digests
from jobs.plan import Results, Step, input_outputs, resolve, select
from jobs.progress import Board
from jobs.quantize import quantized
from jobs.resources import AllResources
from jobs.run import STAGES, Drive, load_results, run
from jobs.stage import share
from storage.images import ImageStore
from storage.latents import LatentSet
from storage.workspace import Workspace, WorkspaceError, WorkspaceVersionError


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
    insecure: bool = False  # use a cluster that asks for no token


def show_plan(experiment: Experiment, options: Options, console: Console) -> None:
    """Print, for each stage instance, reuse or compute, why, and how much."""
    Session(experiment, options, console, creates=False).show_plan()


def execute(experiment: Experiment, options: Options, console: Console) -> dict[str, dict[str, Any]]:
    """Bring the selected instances to results and print them; the records by node id.

    Raises:
        WouldRetrain, RunFailed, ExperimentError, StorageError.
    """
    return Session(experiment, options, console).execute()


class Session:
    """An experiment in the light of a workspace's records."""

    def __init__(
        self, experiment: Experiment, options: Options, console: Console, creates: bool = True
    ) -> None:
        """`creates` makes the workspace where there is none."""
        self.experiment, self.options, self.console = experiment, options, console
        self.workspace = Workspace.open(options.workspace) if creates else _existing(options.workspace)
        self.results = load_results(self.workspace)
        nodes = select(expand(experiment, options.rehash), options.stage, options.only)
        self.steps = resolve(nodes, self.results)
        self.distrusted = frozenset(_without_data(self.workspace, self.steps))
        if self.distrusted:
            for name in self.distrusted:
                _, stage, key = name.split("/")
                self.results[stage].pop(key)
            self.steps = resolve(nodes, self.results)
        self.todo = [step for step in self.steps if not step.record]

    def show_plan(self) -> None:
        """What `execute` would do, instance by instance."""
        width = max(len(step.node.id) for step in self.steps)
        for step in self.steps:
            detail = _made(step) if step.record else f"{self._amount(step)}; {step.why}"
            self._say(f"{step.action:8}{step.node.id:{width}}  {detail}")
        self._say(f"{len(self.steps) - len(self.todo)} to reuse, {len(self.todo)} to compute")

    def execute(self) -> dict[str, dict[str, Any]]:
        """Compute what is missing, then show the reports; all records by node id."""
        self._say_short()
        for step in self.todo:
            self._approve(step)
        account = Account(self.workspace, self.experiment, self.steps)
        produced = {step.node.id: step.record for step in self.steps if step.record}
        if self.todo:
            produced = self._compute(account)
        else:
            account.results = produced
            if account.commit():  # what is reused stands under a new experiment: MLflow shows it there too
                with Follower(account, self.workspace, self.options.tracking, self.console) as follower:
                    follower.notify(produced)
        for record in produced.values():
            if record["stage"] == "report":
                report.show(self.workspace, record, self.console)
        return produced

    def _compute(self, account: Account) -> dict[str, dict[str, Any]]:
        cluster = Cluster(self.options.address, self.options.insecure)
        resources, name = self.experiment.resources, self.experiment.name
        # An import runs in this process
        stages = {step.node.stage for step in self.todo} - {"import"}
        try:
            cluster.require({stage: share(getattr(resources, stage)) for stage in sorted(stages)})
            if nodes := cluster.look_at_nodes(self.workspace):
                self._say(f"cluster: {nodes} nodes with this code, these versions and the workspace")
            with (
                Board(self.console) as board,
                Follower(account, self.workspace, self.options.tracking, self.console) as follower,
            ):
                drive = Drive(
                    self.workspace,
                    cluster,
                    resources,
                    name,
                    board,
                    follower.notify,
                    self._approve,
                    self.distrusted,
                )
                produced = run([step.node for step in self.steps], self.results, drive)
                follower.notify(produced)
                account.commit()
        finally:
            cluster.stop()
        return produced

    def _approve(self, step: Step) -> None:
        """Asked before a run, and again before a training starts: its images may first have to be read."""
        if not self.options.retrain:
            _refuse_retraining(self.experiment, self.results, step, self._stood_on)

    @cached_property
    def _stood_on(self) -> set[str]:
        """Keys of all instances that experiments of this name were recorded with, whoever made them."""
        experiments = self.workspace.records.load("experiments").values()
        mine = [e for e in experiments if e["name"] == self.experiment.name]
        return {instance["key"] for e in mine for instance in e["instances"]}

    def _say_short(self) -> None:
        """The plan as `run` prints it: what is reused, what is computed, and why where that is known yet."""
        for action in ("reuse", "compute"):
            counts = Counter(step.node.stage for step in self.steps if step.action == action)
            if counts:
                self._say(f"{action}: " + ", ".join(f"{count} {stage}" for stage, count in counts.items()))
        if not self.todo:
            self._say("nothing to compute: no training step, no image quantized")
        for step in self.todo:
            if step.key:
                self._say(f"  {step.node.id}: {self._amount(step)}; {step.why}")

    def _amount(self, step: Step) -> str:
        done = {other.node.id: other.record for other in self.steps if other.record}
        inputs = input_outputs(step.node, done) if step.key else None
        text: str = import_module(STAGES[step.node.stage]).amount(step.node, inputs, self.workspace)
        return text

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)


def import_checkpoint(file: str, lmbda: float, options: Options, console: Console) -> dict[str, Any]:
    """`retrellis import`: one node, without an experiment around it; its record. MLflow shows it once one uses it."""
    workspace = Workspace.open(options.workspace)
    node = import_node(lmbda, file, None)
    with Board(console) as board:
        drive = Drive(workspace, Cluster(), AllResources(), "imported", board)
        return run([node], load_results(workspace), drive)[node.id]


def _existing(root: str) -> Workspace:
    """A workspace to look into; where there is none, one that holds nothing is looked into."""
    try:
        return Workspace.open(root, create=False)
    except WorkspaceVersionError:
        raise
    except WorkspaceError:
        return Workspace(root)


def _without_data(workspace: Workspace, steps: list[Step]) -> Iterator[str]:
    """Names of result records whose images or latents are no longer all there: a part retired, a record moved away.

    Raises:
        BlobError: an output itself is gone; it says what to do.
    """
    done = {step.node.id: step.record for step in steps if step.record}
    index = ImageStore(workspace).index()
    for step in steps:
        if step.record is None:
            continue
        outputs = step.record["outputs"]
        for output in outputs.values():
            for blob in filter(None, [output.get("blob"), *output.get("files", {}).values()]):
                workspace.blobs.path(blob)
        name = f"results/{step.node.stage}/{step.key}"
        if step.node.stage == "ingest":
            if not index.images.keys() >= set(image_digests(workspace, outputs["images"]["blob"])):
                yield name
        elif step.node.stage == "quantize":
            manifest = input_outputs(step.node, done)["images"]["blob"]
            latents = LatentSet(workspace, outputs["latents"]["note"]["set"])
            if latents.missing(quantized(image_digests(workspace, manifest), outputs["latents"])):
                yield name


def _refuse_retraining(
    experiment: Experiment, results: Results, step: Step, stood_on: Set[str] = frozenset()
) -> None:
    """Stop where a codec of this experiment and λ exists and would be trained anew with other ingredients.

    A training that is the first to go on from one of them has nothing to ask for: it adds to what they cost.

    Args:
        stood_on: keys of codecs that this experiment took from another that had trained them.
    """
    if step.node.stage != "train" or step.key is None:
        return
    trained = [
        old
        for key, old in results.get("train", {}).items()
        if (old["experiment"] == experiment.name or key in stood_on) and old["axes"] == dict(step.node.axes)
    ]
    codecs = [old["outputs"]["codec"]["digest"] for old in trained]
    assert step.ingredients
    start = step.ingredients["inputs"].get("start")
    goes_on = start in codecs and start not in [old["ingredients"]["inputs"].get("start") for old in trained]
    if trained and not goes_on:
        old = max(trained, key=lambda record: str(record["ended"]))
        raise WouldRetrain(
            f"{step.node.id} has been trained before in experiment {experiment.name!r} "
            f"({old['seconds']:.0f} s, ended {old['ended']}), and now {step.why}. To train it again, add "
            "--retrain; to keep the old one, undo the change (images under `latents.images` need no retraining; "
            "`train.ladder: false` trains every λ from scratch); to go on from it for `train.steps` more steps, "
            f"--set train.start.digest={old['outputs']['codec']['digest']}"
        )


def _made(step: Step) -> str:
    assert step.record
    summary = ", ".join(f"{name} {value}" for name, value in step.record["summary"].items())
    return f"made {step.record['ended'][:19]} in {step.record['seconds']:.1f} s ({summary})"
