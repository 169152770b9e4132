"""Makes MLflow show what the records say; what is there already is left alone."""

from __future__ import annotations

from collections.abc import Callable

from storage.lineage import content, pages
from storage.lineage.graph import Experiment, Graph, Output, Result, output_id
from storage.lineage.mirror import NOTE, PARENT, Entry, Mirror
from storage.lineage.tracker import Tracker


class Projection:
    """One sync: everything is created first, so that every link has its target, and filled then."""

    def __init__(self, graph: Graph, tracker: Tracker, read_blob: Callable[[str], bytes]) -> None:
        """Project `graph` into `tracker`; `read_blob` gives a blob's bytes by its digest."""
        self.mirror = Mirror(tracker)
        self._graph = graph
        self._save_artifacts = tracker.save_artifacts
        self._read_blob = read_blob
        self._places = pages.Places()
        # results that no experiment names wait until one does
        self._results = [result for result in graph.results.values() if result.id in graph.owner]

    def run(self) -> None:
        """Create what is missing, fill what is incomplete, renew what has changed."""
        homes = self.mirror.experiments({e.name: None for e in self._graph.experiments})
        self.mirror.look(list(homes.values()))
        for experiment in self._graph.experiments:
            self._create_experiment(experiment, homes[experiment.name])
        for result in self._results:
            self._create_result(result)
        self._places.runs = {name: entry.place for name, entry in self.mirror.runs.items()}
        self._places.models = {name: entry.place for name, entry in self.mirror.models.items()}
        for result in self._results:
            self._fill_result(result)
        for experiment in self._graph.experiments:
            self._fill_experiment(experiment)

    def newest_page(self) -> str:
        """Where the UI shows the newest experiment; "" if there is none."""
        if not self._graph.experiments:
            return ""
        return pages.address("runs", self._places.runs[self._graph.experiments[-1].id])

    def _create_experiment(self, experiment: Experiment, home: str) -> None:
        if experiment.id not in self.mirror.runs:
            own = [r.started for r in self._results if self._graph.owner[r.id] == experiment.id]
            started = min([experiment.created, *own])
            tags = {"stage": "experiment", "mlflow.source.name": "retrellis run"}
            self.mirror.create_run(experiment.id, home, started, experiment.name, tags)

    def _create_result(self, result: Result) -> None:
        parent = self.mirror.runs[self._graph.owner[result.id]]
        entry = self.mirror.runs.get(result.id)
        if entry is None:
            tags = {PARENT: parent.mlflow_id, "mlflow.source.name": f"retrellis {result.stage}"}
            entry = self.mirror.create_run(
                result.id, parent.experiment_id, result.started, result.instance, tags
            )
        elif not self._has_parent(entry) and entry.experiment_id == parent.experiment_id:
            self.mirror.describe_run(result.id, {PARENT: parent.mlflow_id})  # a user deleted its parent
        for output in _models(result):
            name = output_id(result, output)
            if name not in self.mirror.models:
                self.mirror.create_model(
                    name,
                    entry,
                    content.model_name(result, output),
                    output.kind,
                    content.model_params(output),
                    content.model_tags(result, output),
                )

    def _fill_result(self, result: Result) -> None:
        for output in _models(result):
            self._fill_model(result, output)
        entry = self.mirror.runs[result.id]
        tags = {NOTE: pages.result_page(self._graph, self._places, result)}
        if entry.complete:
            self.mirror.describe_run(result.id, tags)
            return
        tags |= content.tags(result)
        self.mirror.log(entry, content.params(result), content.metrics(result, self._read_blob), tags)
        self.mirror.log_inputs(entry, content.dataset_inputs(self._graph, result), self._models_read(result))
        made = [self.mirror.models[output_id(result, output)].mlflow_id for output in _models(result)]
        self.mirror.log_outputs(entry, made)
        self._save_artifacts(entry.artifact_uri, content.run_files(result, self._read_blob))
        self.mirror.finish_run(result.id, result.ended)

    def _fill_model(self, result: Result, output: Output) -> None:
        name = output_id(result, output)
        entry = self.mirror.models[name]
        self.mirror.describe_model(name, pages.model_page(self._graph, self._places, result, output))
        if not entry.complete:
            files = content.blob_file(output, self._read_blob) | content.record_file("note", output.note)
            self._save_artifacts(entry.artifact_uri, files)
            self.mirror.finish_model(name)

    def _fill_experiment(self, experiment: Experiment) -> None:
        entry = self.mirror.runs[experiment.id]
        named = [
            self._graph.results[i.result_id]
            for i in experiment.instances
            if i.result_id in self._graph.results
        ]
        borrowed = [r for r in named if self.mirror.runs[r.id].tags.get(PARENT) != entry.mlflow_id]
        for result in borrowed:
            self._point(experiment, entry, result)
        shown = {result.id for result in borrowed}
        note = pages.experiment_page(self._graph, self._places, experiment, shown)
        self.mirror.describe_run(experiment.id, {NOTE: note})
        ended = max([experiment.created, *(r.ended for r in named if r.id not in shown)])
        if not entry.complete or entry.ended != ended:
            self._save_artifacts(entry.artifact_uri, content.record_file("experiment", experiment.record))
            self.mirror.finish_run(experiment.id, ended)

    def _point(self, experiment: Experiment, parent: Entry, result: Result) -> None:
        """A small run under the parent that leads to the one that made the result."""
        name = f"{experiment.id}#{result.id}"
        if name not in self.mirror.runs:
            tags = {PARENT: parent.mlflow_id, "stage": result.stage, "reused": "true"}
            label = f"{result.instance} (reused)"
            self.mirror.create_run(name, parent.experiment_id, experiment.created, label, tags)
        self.mirror.describe_run(name, {NOTE: pages.reused_page(self._places, result)})
        if not self.mirror.runs[name].complete:
            self.mirror.finish_run(name, experiment.created)

    def _has_parent(self, entry: Entry) -> bool:
        parents = {self.mirror.runs[e.id].mlflow_id for e in self._graph.experiments}
        return entry.tags.get(PARENT) in parents

    def _models_read(self, result: Result) -> list[str]:
        """MLflow's ids of the codecs and latent sets that a result read."""
        sources = [self._graph.producer(read.digest) for read in result.inputs]
        names = [output_id(*source) for source in sources if source]
        return [self.mirror.models[name].mlflow_id for name in names if name in self.mirror.models]


def _models(result: Result) -> list[Output]:
    return [output for output in result.outputs if output.kind in content.MODEL_KINDS]
