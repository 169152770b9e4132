"""Records as stages would have left them, and MLflow as its own client sees it: what the lineage tests share."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from storage.keys import digest
from storage.lineage import SyncReport, default_tracking_uri, sync, ui_command

Record = dict[str, Any]


@dataclass
class History:
    """Records and blobs as stages would have left them; a minute passes with each record."""

    records: dict[str, Record] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    minutes: int = 0

    def blob(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        self.blobs[name] = data
        return name

    def now(self) -> str:
        self.minutes += 1
        return (datetime(2026, 11, 1, 12, tzinfo=UTC) + timedelta(minutes=self.minutes)).isoformat()

    def result(
        self,
        instance: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        outputs: Mapping[str, Record],
        summary: Mapping[str, Any],
    ) -> Record:
        stage = instance.split(maxsplit=1)[0]
        ingredients = {"stage": stage, "stage_version": 1, "settings": settings, "inputs": inputs}
        started = self.now()
        record = {
            "version": 1,
            "attempt": f"attempt-{self.minutes}",
            "stage": stage,
            "key": digest(ingredients),
            "instance": instance,
            "ingredients": ingredients,
            "outputs": dict(outputs),
            "summary": dict(summary),
            "started": started,
            "ended": self.now(),
            "seconds": 60.0,
            "host": "node1",
            "versions": {"torch": "2.13.0"},
        }
        self.records[f"results/{stage}/{record['key']}"] = record
        return record

    def experiment(self, name: str, instances: list[Record], reused: int = 0) -> str:
        """`reused` counts the instances, from the first on, that were there already."""
        body = {
            "version": 1,
            "attempt": name,
            "name": name,
            "config": {"name": name},
            "instances": [
                {"stage": r["stage"], "key": r["key"], "instance": r["instance"], "reused": i < reused}
                for i, r in enumerate(instances)
            ],
            "created": self.now(),
        }
        body["digest"] = digest([body["config"], body["instances"]])
        self.records[f"experiments/{body['digest']}"] = body
        return f"experiments/{body['digest']}"

    def output(self, kind: str, data: bytes, keep: bool = True, **note: Any) -> Record:
        name = self.blob(data) if keep else hashlib.sha256(data).hexdigest()
        return {"kind": kind, "digest": name, "note": note} | ({"blob": name} if keep else {})

    def curve(self, label: str, steps: int) -> Record:
        rows = [{"step": 10 * i, "loss": 1 / (i + 1), "lr": 1e-4, "phase": label} for i in range(steps)]
        return self.output("metrics", "\n".join(map(json.dumps, rows)).encode())


def ingest(history: History, use: str) -> Record:
    images = history.output("images", use.encode(), count=12, megapixels=3.1)
    settings = {"scale": 1.0, "files": digest(use)}
    return history.result(
        f"ingest images={use}", settings, {}, {"images": images}, {"images": 12, "new_files": 12}
    )


def train(history: History, images: Record, lmbda: float, steps: int = 5) -> Record:
    label = f"train lmbda={lmbda}"
    sides = {"grid": digest([lmbda, "grid"]), "rate": digest([lmbda, "rate"])}
    outputs = {
        "codec": history.output("codec", label.encode(), N=64, M=96, **sides),
        "metrics": history.curve(label, steps),
    }
    inputs = {"images": images["outputs"]["images"]["digest"]}
    settings = {"lmbda": lmbda, "steps": 10 * steps, "optimizer": {"name": "adam", "lr": 1e-4}}
    return history.result(label, settings, inputs, outputs, {"loss": 0.41, "psnr_db": 31.2})


def of(record: Record, output: str) -> str:
    return str(record["outputs"][output]["digest"])


def arms(
    history: History, codec: Record, tables: Record, images: Record, test: Record, names: list[str]
) -> list[Record]:
    """quantize, then finetune and evaluate each arm; the latents name the codec by its encoder side alone."""
    lmbda = codec["ingredients"]["settings"]["lmbda"]
    axes, made = f"lmbda={lmbda} quantizer=tcq8", codec["outputs"]["codec"]
    latents = history.result(
        f"quantize {axes}",
        {},
        {
            "grid": made["note"]["grid"],
            "rate": made["note"]["rate"],
            "tables": of(tables, "tables"),
            "images": of(images, "images"),
        },
        {"latents": history.output("latents", f"latents {axes}".encode(), keep=False, images=12, parts=3)},
        {"images": 12, "bits": 123456},
    )
    records = [latents]
    for name in names:
        label = f"lmbda={lmbda} quantizer=tcq8 arm={name} seed=0"
        tuned = history.result(
            f"finetune {label}",
            {"parts": "decoder", "latents": name, "steps": 30, "seed": 0},
            {"codec": made["digest"], "tables": of(tables, "tables"), "latents": of(latents, "latents")},
            {
                "codec": history.output("codec", label.encode(), **made["note"]),
                "metrics": history.curve(label, 3),
            },
            {"loss": 0.4},
        )
        scores = history.result(
            f"evaluate {label}",
            {"metrics": ["psnr"], "rate": "tables"},
            {"codec": of(tuned, "codec"), "tables": of(tables, "tables"), "images": of(test, "images")},
            {"scores": history.output("scores", json.dumps({"arm": label}).encode())},
            {"bpp": 0.4838, "psnr_db": 29.81},
        )
        records += [tuned, scores]
    return records


def kodak(
    lmbdas: tuple[float, ...] = (0.013,), names: tuple[str, ...] = ("noise", "rounded", "paper")
) -> tuple[History, list[Record]]:
    """A whole experiment and its records in the order of the stages."""
    history = History()
    images, test = ingest(history, "train"), ingest(history, "test")
    tables = history.result(
        "tables quantizer=tcq8",
        {"kind": "tcq", "trellis": "vvc8"},
        {},
        {"tables": history.output("tables", b"tables")},
        {"levels": 64},
    )
    instances = [images, test, tables]
    for lmbda in lmbdas:
        codec = train(history, images, lmbda)
        instances += [codec, *arms(history, codec, tables, images, test, list(names))]
    scores = {r["instance"]: of(r, "scores") for r in instances if r["stage"] == "evaluate"}
    page = {
        "kind": "report",
        "digest": digest(scores),
        "files": {
            "table.md": history.blob(b"| arm | bpp |\n|---|---|\n"),
            "plots/rd.svg": history.blob(b"<svg/>"),
        },
    }
    instances.append(history.result("report experiment=kodak", {"arms": {}}, scores, {"report": page}, {}))
    history.experiment("kodak", instances)
    return history, instances


def small() -> History:
    history = History()
    images = ingest(history, "train")
    codec = train(history, images, 0.013, steps=2)
    history.experiment("small", [images, codec])
    history.experiment("again", [images], reused=1)
    return history


@functools.cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as root:
        assert sync({}, {}.__getitem__, default_tracking_uri(root), root) == SyncReport(0, 0, 0, 0, "")
        return (Path(root) / "mlflow.db").read_bytes()


def workspace(folder: Path) -> Path:
    """A folder with an empty database: making one takes seconds, so all are copies."""
    folder.mkdir(exist_ok=True)
    (folder / "mlflow.db").write_bytes(_empty_database())
    return folder


def project(history: History, root: Path, uri: str | None = None) -> SyncReport:
    read_blob = history.blobs.__getitem__
    return sync(history.records, read_blob, uri or default_tracking_uri(str(root)), str(root))


class Shown:
    """What MLflow has, by our ids, read with its own client."""

    def __init__(self, uri: str) -> None:
        self.client = MlflowClient(uri)
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        found = self.client.search_runs(experiments, max_results=1000)
        self.all_runs = [self.client.get_run(r.info.run_id) for r in found]
        self.runs = {r.data.tags["retrellis.id"]: r for r in self.all_runs}
        self.models = {m.tags["retrellis.id"]: m for m in self.client.search_logged_models(experiments)}

    def note(self, name: str) -> str:
        there = self.runs[name].data.tags if name in self.runs else self.models[name].tags
        return str(there["mlflow.note.content"])

    def follow(self, name: str, text: str) -> str:
        """Our id of what the first link with `text` in it leads to."""
        pattern = rf"\[[^]]*{re.escape(text)}[^]]*\]\(#/experiments/(\d+)/(runs|models)/([\w-]+)\?"
        match = re.search(pattern, self.note(name))
        assert match, f"no link {text!r} in {self.note(name)}"
        experiment, page, target = match.groups()
        if page == "models":
            return next(i for i, m in self.models.items() if m.model_id == target)
        run = next(r for r in self.all_runs if r.info.run_id == target)
        assert run.info.experiment_id == experiment
        return str(run.data.tags["retrellis.id"])

    def snapshot(self) -> Any:
        """Everything but MLflow's own ids, which differ from one database to the next."""
        ids = {r.info.run_id: i for i, r in self.runs.items()} | {
            m.model_id: i for i, m in self.models.items()
        }

        def named(text: str) -> str:
            for theirs, ours in ids.items():
                text = text.replace(theirs, ours)
            return text

        runs = {
            name: (
                {k: named(v) for k, v in r.data.tags.items()},
                r.data.params,
                {
                    k: [
                        (m.step, m.value, m.timestamp)
                        for m in self.client.get_metric_history(r.info.run_id, k)
                    ]
                    for k in r.data.metrics
                },
                (r.info.status, r.info.start_time, r.info.end_time),
                sorted((d.dataset.name, d.dataset.digest) for d in r.inputs.dataset_inputs),
                sorted(ids[m.model_id] for m in r.inputs.model_inputs),
                sorted(ids[m.model_id] for m in r.outputs.model_outputs),
            )
            for name, r in self.runs.items()
        }
        models = {
            name: ({k: named(v) for k, v in m.tags.items()}, m.params, m.status, named(m.source_run_id))
            for name, m in self.models.items()
        }
        return runs, models, len(self.all_runs)


TUNED = "finetune lmbda=0.013 quantizer=tcq8 arm=paper"


def name_of(record: Record) -> str:
    return f"{record['stage']}/{record['key']}"


def find(instances: list[Record], text: str) -> str:
    return next(name_of(r) for r in instances if r["instance"].startswith(text))


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield server.getsockname()[1]


@contextlib.contextmanager
def served(root: Path, port: int | None = None) -> Iterator[str]:
    """MLflow's server over a workspace, for as long as the block runs; its address."""
    if port is None:
        with listening() as free:
            port = free
    command, variables = ui_command(str(root), port)
    with (
        (root / "ui.log").open("w") as log,
        subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log, cwd=root) as server,
    ):
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
