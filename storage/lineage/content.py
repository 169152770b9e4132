"""What a result becomes in MLflow: parameters, metrics, tags, datasets, files. Conversions only, nothing is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from storage.keys import flatten
from storage.lineage.graph import Graph, Output, Result

MODEL_KINDS = frozenset({"codec", "latents"})
_FILE_NAMES = {"codec": ".safetensors", "tables": ".safetensors", "scores": ".json", "images": ".json"}
_DIGEST_CHARACTERS = 36  # of a dataset's digest in MLflow
_SHORT = 12


def is_number(value: Any) -> bool:
    """Whether MLflow can take it as a metric; true and false are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def params(result: Result) -> list[Param]:
    """Settings by dotted name, and the first digits of what was read, as `input.<name>`."""
    found = {"stage_version": result.stage_version, **flatten(result.settings)}
    found |= {f"input.{read.name}": read.digest[:_SHORT] for read in result.inputs}
    return [Param(name, value) for name, value in _texts(found).items()]


def metrics(result: Result, read_blob: Callable[[str], bytes]) -> list[Metric]:
    """Every number of the `metrics` outputs by step, spread evenly over the run's time; then the summary.

    A summary number stands at the last step. One whose name a curve has already becomes `summary/<name>`.
    """
    rows = [row for output in result.outputs if output.kind == "metrics" for row in _rows(output, read_blob)]
    duration = result.ended - result.started
    found = [
        Metric(_name(name), value, result.started + duration * (i + 1) // len(rows), row["step"])
        for i, row in enumerate(rows)
        for name, value in row.items()
        if name != "step" and is_number(value)
    ]
    curves, last = {metric.key for metric in found}, max((row["step"] for row in rows), default=0)
    for name, value in flatten(result.summary).items():
        if is_number(value):
            key = f"summary/{_name(name)}" if _name(name) in curves else _name(name)
            found.append(Metric(key, value, result.ended, last))
    return found


def tags(result: Result) -> dict[str, str]:
    """What one may want to search for, in names short enough for the UI; the rest is in the record's own file."""
    found = {f"output.{made.name}": made.digest for made in result.outputs}
    return _texts({"stage": result.stage, "host": result.host, **found})


def dataset_inputs(graph: Graph, result: Result) -> list[DatasetInput]:
    """Image sets: those read, in the context of the stage's name, and those made, in the context `output`."""
    made = [_dataset(result, output, "output") for output in result.outputs if output.kind == "images"]
    sources = [graph.producer(read.digest) for read in result.inputs]
    read = [_dataset(*s, result.stage) for s in sources if s and s[1].kind == "images"]
    return made + read


def model_params(output: Output) -> dict[str, str]:
    """What the codec or latent set says of itself."""
    return _texts(flatten(output.note))


def model_tags(result: Result, output: Output) -> dict[str, str]:
    """Where the thing itself is to be found; MLflow calls what it does not keep external."""
    found = {"retrellis.kind": output.kind, "retrellis.digest": output.digest, "retrellis.made_by": result.id}
    if output.blob:
        found["retrellis.blob"] = output.blob
    else:
        found["mlflow.model.isExternal"] = "true"
    return found


def model_name(result: Result, output: Output) -> str:
    """The maker's label and the output; MLflow refuses some characters."""
    return re.sub(r"[/:.%\"']", "_", f"{output.name} of {result.instance}")


def record_file(name: str, record: Mapping[str, Any]) -> dict[str, bytes]:
    """A record as a file for people."""
    return {f"{name}.json": json.dumps(record, indent=2, ensure_ascii=False).encode()}


def blob_file(output: Output, read_blob: Callable[[str], bytes]) -> dict[str, bytes]:
    """The output's own bytes; none where there are none (latent sets) or where they are shown as curves."""
    if output.blob is None or output.kind == "metrics":
        return {}
    return {f"{output.name}{_FILE_NAMES.get(output.kind, '')}": read_blob(output.blob)}


def run_files(result: Result, read_blob: Callable[[str], bytes]) -> dict[str, bytes]:
    """The record, and what the result made, except for the models: those keep their own files."""
    files = record_file("record", result.record)
    for output in result.outputs:
        if output.kind not in MODEL_KINDS:
            files |= blob_file(output, read_blob)
        files |= {name: read_blob(digest) for name, digest in output.files.items()}
    return files


def _rows(output: Output, read_blob: Callable[[str], bytes]) -> Iterator[dict[str, Any]]:
    if output.blob is not None:
        yield from map(json.loads, read_blob(output.blob).splitlines())


def _dataset(maker: Result, output: Output, context: str) -> DatasetInput:
    dataset = Dataset(
        name=maker.instance,
        digest=output.digest[:_DIGEST_CHARACTERS],
        source_type="retrellis",
        source=json.dumps({"record": f"results/{maker.id}"}),
        profile=json.dumps(dict(output.note)),
    )
    return DatasetInput(
        dataset, [InputTag("mlflow.data.context", context), InputTag("retrellis.digest", output.digest)]
    )


def _name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        _name(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }
