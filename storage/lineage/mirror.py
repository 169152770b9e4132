"""What MLflow has of us, found by the tag `retrellis.id`, and the few ways of changing it. All can be repeated.

A run is complete when it is FINISHED and a model when it is READY: that is written last, so that what was cut off is
seen to be so and done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import (
    DatasetInput,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)

from storage.lineage.tracker import Tracker

ID = "retrellis.id"
NOTE = "mlflow.note.content"
PARENT = "mlflow.parentRunId"

_PARAMS = 100  # limits of one log_batch: parameters; and everything together
_METRICS = 800
_RUNS = 250  # a page of a search: more take a server longer than we wait


@dataclass
class Entry:
    """A run or logged model of ours, as MLflow has it."""

    mlflow_id: str
    experiment_id: str  # MLflow's
    artifact_uri: str
    tags: dict[str, str]
    complete: bool
    ended: int | None = None  # milliseconds since the epoch
    outputs: frozenset[str] = frozenset()  # MLflow ids of the models a run is known to have made

    @property
    def place(self) -> tuple[str, str]:
        """For links: MLflow's ids of the experiment and of this."""
        return self.experiment_id, self.mlflow_id


class Mirror:
    """Runs and models by our ids.

    Attributes:
        runs, models: what there is, kept up to date by the methods.
        created, updated: our ids of what this sync has made and changed.
    """

    def __init__(self, tracker: Tracker) -> None:
        """Nothing is known before `look`."""
        self.runs: dict[str, Entry] = {}
        self.models: dict[str, Entry] = {}
        self.created: set[str] = set()
        self.updated: set[str] = set()
        self._tracker = tracker
        self._client = tracker.client

    def experiments(self, names: Iterable[str]) -> dict[str, str]:
        """MLflow's experiment ids by name; missing ones are made and deleted ones restored."""
        return {name: self._experiment(name) for name in names}

    def look(self, experiment_ids: Sequence[str]) -> None:
        """Find our runs and models in these experiments. Of two with one id, the first made is kept."""
        ids, ours = list(experiment_ids), f"tags.`{ID}` != ''"
        if not ids:
            return
        for run in _pages(
            lambda token: self._client.search_runs(
                ids, ours, ViewType.ACTIVE_ONLY, _RUNS, ["attributes.start_time", "attributes.run_id"], token
            )
        ):
            self.runs.setdefault(run.data.tags[ID], _run_entry(run))
        for model in _pages(lambda token: self._client.search_logged_models(ids, ours, page_token=token)):
            self.models.setdefault(model.tags[ID], _model_entry(model))

    def create_run(
        self, name: str, experiment_id: str, started: int, label: str, tags: Mapping[str, str]
    ) -> Entry:
        """Make a run with our id `name`."""
        run = self._client.create_run(experiment_id, started, {ID: name, **tags}, label)
        self.created.add(name)
        self.runs[name] = _run_entry(run)
        return self.runs[name]

    def create_model(
        self, name: str, run: Entry, label: str, kind: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> Entry:
        """Make a logged model with our id `name`, made by `run`."""
        model = self._client.create_logged_model(
            run.experiment_id, label, run.mlflow_id, {ID: name, **tags}, dict(params), kind
        )
        self.created.add(name)
        self.models[name] = _model_entry(model)
        return self.models[name]

    def log(
        self, entry: Entry, params: Sequence[Param], metrics: Sequence[Metric], tags: Mapping[str, str]
    ) -> None:
        """Parameters, metrics and tags of a run, in as few calls as MLflow's limits allow."""
        entry.tags.update(tags)
        texts = [RunTag(key, value) for key, value in tags.items()]
        for i in range(max(1, -(-len(params) // _PARAMS), -(-len(metrics) // _METRICS))):
            self._client.log_batch(
                entry.mlflow_id,
                metrics[i * _METRICS : (i + 1) * _METRICS],
                params[i * _PARAMS : (i + 1) * _PARAMS],
                texts if i == 0 else (),
            )

    def log_inputs(self, entry: Entry, datasets: list[DatasetInput], models: Iterable[str]) -> None:
        """Name the datasets and the models (MLflow's ids) that a run read."""
        read = [LoggedModelInput(model) for model in dict.fromkeys(models)]
        if datasets or read:
            self._client.log_inputs(entry.mlflow_id, datasets, read)

    def log_outputs(self, entry: Entry, models: Iterable[str]) -> None:
        """Name the models (MLflow's ids) that a run made; MLflow refuses to be told twice."""
        new = [LoggedModelOutput(model, 0) for model in models if model not in entry.outputs]
        if new:
            self._client.log_outputs(entry.mlflow_id, new)

    def describe_run(self, name: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, those that differ."""
        entry = self.runs[name]
        new = {key: value for key, value in tags.items() if entry.tags.get(key) != value}
        if new:
            self.log(entry, (), (), new)
            self.updated.add(name)

    def describe_model(self, name: str, note: str) -> None:
        """Set a model's description, if it differs."""
        entry = self.models[name]
        if entry.tags.get(NOTE) != note:
            self._client.set_logged_model_tags(entry.mlflow_id, {NOTE: note})
            entry.tags[NOTE] = note
            self.updated.add(name)

    def finish_run(self, name: str, ended: int) -> None:
        """Declare a run complete, ended at this time."""
        entry = self.runs[name]
        self._client.set_terminated(entry.mlflow_id, "FINISHED", ended)
        entry.complete, entry.ended = True, ended
        self.updated.add(name)

    def finish_model(self, name: str) -> None:
        """Declare a model complete."""
        entry = self.models[name]
        self._client.finalize_logged_model(entry.mlflow_id, LoggedModelStatus.READY)
        entry.complete = True
        self.updated.add(name)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, self._tracker.artifact_location(name)))
        if found.lifecycle_stage == "deleted":  # its name stays taken
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def _pages(fetch: Callable[[str | None], Any]) -> Iterable[Any]:
    page = fetch(None)
    yield from page
    while page.token:
        page = fetch(page.token)
        yield from page


def _run_entry(run: Run) -> Entry:
    outputs = run.outputs.model_outputs if run.outputs else []
    return Entry(
        run.info.run_id,
        run.info.experiment_id,
        run.info.artifact_uri,
        dict(run.data.tags),
        run.info.status == "FINISHED",
        run.info.end_time,
        frozenset(output.model_id for output in outputs),
    )


def _model_entry(model: LoggedModel) -> Entry:
    ready = model.status == LoggedModelStatus.READY
    return Entry(model.model_id, model.experiment_id, model.artifact_location, dict(model.tags), ready)
