"""What made what, read off the records: results, experiments, and the edges between them. No MLflow here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from storage.errors import StorageError
from storage.keys import flatten

# A codec is also known by the digests of its encoder side: latents name those, not the whole codec.
_CODEC_ALIASES = ("grid", "rate")


class LineageError(StorageError):
    """A record is not of the shape that can be projected."""


@dataclass(frozen=True)
class Input:
    """One digest that a result read, under the name its ingredients give it."""

    name: str
    digest: str


@dataclass(frozen=True)
class Output:
    """One thing a result made."""

    name: str
    kind: str
    digest: str
    blob: str | None
    note: Mapping[str, Any]
    files: Mapping[str, str]  # relative name -> blob digest; reports have them

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every digest by which others may name it."""
        parts = (
            [self.note[name] for name in _CODEC_ALIASES if name in self.note] if self.kind == "codec" else []
        )
        return (self.digest, *parts)


@dataclass(frozen=True)
class Result:
    """A finished stage instance; times in milliseconds since the epoch."""

    id: str  # <stage>/<key>
    stage: str
    key: str
    instance: str
    stage_version: int
    settings: Mapping[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    summary: Mapping[str, Any]
    started: int
    ended: int
    host: str
    record: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Instance:
    """A line of an experiment record."""

    result_id: str
    label: str
    reused: bool


@dataclass(frozen=True)
class Experiment:
    """One expansion of an experiment file."""

    id: str  # experiments/<digest>
    name: str
    created: int  # milliseconds since the epoch
    instances: tuple[Instance, ...]
    record: Mapping[str, Any] = field(repr=False)


class Graph:
    """The records of a workspace as a graph.

    Attributes:
        results: by id, in the order they were started.
        experiments: in the order they were created.
        owner: result id -> the experiment under whose run it is shown: the first that computed it or, if the one
            that did never got to say so, the first that names it.
    """

    def __init__(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Read records by name; names other than `results/…` and `experiments/…` are passed over.

        Raises:
            LineageError: a record lacks a field or is of another version.
        """
        results, experiments = [], []
        for name, record in records.items():
            if name.startswith("results/"):
                results.append(_parsed(_result, name, record))
            elif name.startswith("experiments/"):
                experiments.append(_parsed(_experiment, name, record))
        self.results = {r.id: r for r in sorted(results, key=lambda r: (r.started, r.id))}
        self.experiments = sorted(experiments, key=lambda e: (e.created, e.id))
        self.owner = self._owners()
        self._producers: dict[str, tuple[Result, Output]] = {}
        self._consumers: dict[str, list[Result]] = {}
        for result in self.results.values():
            for output in result.outputs:
                for alias in output.aliases:
                    self._producers.setdefault(alias, (result, output))
        for result in self.results.values():
            for read in {output_id(*made) for made in map(self.producer, _digests(result)) if made}:
                self._consumers.setdefault(read, []).append(result)

    def producer(self, digest: str) -> tuple[Result, Output] | None:
        """The first result that made something of this digest, and the output it is."""
        return self._producers.get(digest)

    def consumers(self, result: Result, output: Output) -> list[Result]:
        """The results that read an output, in the order they were started."""
        return self._consumers.get(output_id(result, output), [])

    def _owners(self) -> dict[str, str]:
        owner: dict[str, str] = {}
        for reused in (False, True):
            for experiment in self.experiments:
                for instance in experiment.instances:
                    if instance.reused == reused and instance.result_id in self.results:
                        owner.setdefault(instance.result_id, experiment.id)
        return owner


def output_id(result: Result, output: Output) -> str:
    """Names an output across all records: <stage>/<key>/<output>."""
    return f"{result.id}/{output.name}"


def _digests(result: Result) -> list[str]:
    return [read.digest for read in result.inputs]


def _parsed(parse: Any, name: str, record: Mapping[str, Any]) -> Any:
    if record.get("version") != 1:
        raise LineageError(
            f"record {name}: expected version 1, found {record.get('version')!r}. "
            "Use the version of retrellis that made it."
        )
    try:
        return parse(name, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LineageError(
            f"record {name}: expected the shape given in docs/design/structure.md, found {type(error).__name__}: "
            f"{error} in one with the fields {', '.join(record)}. Move it away to go on without it."
        ) from error


def _result(name: str, record: Mapping[str, Any]) -> Result:
    ingredients = record["ingredients"]
    return Result(
        id=name.removeprefix("results/"),
        stage=record["stage"],
        key=record["key"],
        instance=record["instance"],
        stage_version=ingredients["stage_version"],
        settings=ingredients["settings"],
        inputs=tuple(Input(read, digest) for read, digest in flatten(ingredients["inputs"]).items()),
        outputs=tuple(_output(made, body) for made, body in record["outputs"].items()),
        summary=record["summary"],
        started=_milliseconds(record["started"]),
        ended=_milliseconds(record["ended"]),
        host=record["host"],
        record=record,
    )


def _output(name: str, body: Mapping[str, Any]) -> Output:
    return Output(
        name, body["kind"], body["digest"], body.get("blob"), body.get("note") or {}, body.get("files") or {}
    )


def _experiment(name: str, record: Mapping[str, Any]) -> Experiment:
    instances = tuple(
        Instance(f"{i['stage']}/{i['key']}", i["instance"], i["reused"]) for i in record["instances"]
    )
    return Experiment(name, record["name"], _milliseconds(record["created"]), instances, record)


def _milliseconds(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
