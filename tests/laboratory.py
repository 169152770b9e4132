"""A small experiment in a folder of its own: photographs, an experiment file, a workspace, and ways to run it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import photos
import psutil
from rich.console import Console

from jobs import experiment
from jobs.session import Options, execute, show_plan
from storage.workspace import Workspace

EXPERIMENT = """
name: small
train:
  images: train
  N: 8
  M: 12
  lmbda: 0.013
  steps: 30
  batch: 2
  crop: 64
  optimizer: adam  # by whose first thirty steps the latents are not all zero
  warmup: 4
  precision: float32
quantizers:
  urq: {kind: urq}
  tcq4: {kind: tcq, trellis: vvc4, step: 0.7, lmbda_q: 0.1}
arms:
  base: {}
  noise: {parts: decoder, latents: noise, steps: 6, batch: 2, crop: 96, precision: float32}
  rounded: {parts: decoder, latents: rounded, steps: 6, batch: 2, crop: 96, precision: float32}
  paper: {parts: decoder, steps: 6, batch: 2, crop: 96, precision: float32}
  scale: {parts: decoder+scale, steps: 6, batch: 2, crop: 96, precision: float32}
evaluate: {images: test}
resources:
  train: {num_cpus: 1, log_every: 5, checkpoint_every: 10}
  finetune: {num_cpus: 1}
"""
# A shell's background jobs ignore Ctrl-C, and so would what they start
INTERRUPTIBLE = ("env", "--default-signal=INT")
COMMAND = str(Path(sys.executable).with_name("retrellis"))
COMPARED = frozenset(
    {"codec", "tables", "latents", "scores"}
)  # kinds of outputs that are a function of content
WAIT_S = 120.0
STARTS = 3  # of what Ray gives up too soon on a busy machine


@dataclass(frozen=True)
class Lab:
    """Photographs and an experiment file in `folder`, results in a workspace at `root`."""

    folder: Path
    root: str

    @classmethod
    def new(cls, folder: Path) -> Lab:
        """With nothing run yet."""
        photos.write(folder / "train", photos.TRAIN)
        photos.write(folder / "test", photos.TEST)
        (folder / "experiment.yaml").write_text(EXPERIMENT)
        return cls(folder, str(folder / "workspace"))

    def beside(self, root: Path | str) -> Lab:
        """The same photographs and file with a new workspace."""
        return replace(self, root=str(root))

    def copy(self, root: Path, without: Iterable[str] = ()) -> Lab:
        """The same with a copy of the workspace, as if some stages had never run."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("mlflow*"))
        gone = [
            f"{kind}/{stage}"
            for stage in without
            for kind in ("records/results", "records/attempts", "attempts")
        ]
        gone += ["records/latents", "latents"] if "quantize" in without else []
        gone += ["records/images", "images"] if "ingest" in without else []
        for name in ["records/experiments", *gone]:
            shutil.rmtree(root / name, ignore_errors=True)
        return self.beside(root)

    @property
    def file(self) -> str:
        return str(self.folder / "experiment.yaml")

    @property
    def workspace(self) -> Workspace:
        return Workspace.open(self.root)

    def run(self, *overrides: str, tracking: str | None = "off", **options: Any) -> str:
        """`retrellis run` in this process; what it prints."""
        console = _console()
        loaded = experiment.load(self.file, list(overrides))
        execute(loaded, Options(self.root, tracking=tracking, **options), console)
        return _printed(console)

    def plan(self, *overrides: str) -> str:
        """`retrellis plan` in this process; what it prints."""
        console = _console()
        show_plan(experiment.load(self.file, list(overrides)), Options(self.root), console)
        return _printed(console)

    def start(self, *arguments: str, address: str | None = None, cwd: Path | None = None) -> Running:
        """A `retrellis` process on this workspace, in a process group of its own as a shell would start it."""
        environment = {**os.environ, "RETRELLIS_WORKSPACE": self.root, "MLFLOW_TRACKING_URI": "off"}
        environment |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"} if address else {}
        output = self.folder / f"{uuid.uuid4().hex[:8]}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [*INTERRUPTIBLE, COMMAND, *arguments],
                env=environment,
                cwd=cwd or self.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(process, output)

    def records(self, prefix: str) -> dict[str, dict[str, Any]]:
        return self.workspace.records.load(prefix)

    def content(self) -> dict[str, str]:
        """What was computed, by instance and output: digests that know no path, time or host."""
        return {
            f"{record['instance']}: {name}": output["digest"]
            for record in self.records("results").values()
            for name, output in record["outputs"].items()
            if output["kind"] in COMPARED
        }

    def record(self, stage: str, **axes: Any) -> dict[str, Any]:
        """The one result of a stage with these axes."""
        records = self.records(f"results/{stage}").values()
        (record,) = [r for r in records if axes.items() <= r["axes"].items()]
        return record

    def scores(self, quantizer: str, arm: str) -> dict[str, Any]:
        """One arm's scores."""
        output = self.record("evaluate", quantizer=quantizer, arm=arm)["outputs"]["scores"]
        scores: dict[str, Any] = json.loads(self.workspace.blobs.get(output["blob"]))
        return scores

    def checkpoints(self) -> list[str]:
        return [name for name in self.workspace.list("attempts") if name.endswith("/state.safetensors")]

    def parts(self) -> list[str]:
        return [name for name in self.workspace.records.list("latents") if "/parts/" in name]


@dataclass(frozen=True)
class Running:
    """A process, and the file with all it prints."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    def finish(self, timeout: float = WAIT_S) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(timeout)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition while the process runs."""
        wait_until(condition, what, lambda: self.process.poll() is None, lambda: self.text)


def wait_until(
    condition: Callable[[], Any],
    what: str,
    going_on: Callable[[], bool] = lambda: True,
    text: Callable[[], str] = str,
) -> None:
    """Poll until a condition holds; fails after a while, or when what it waits for can no longer come."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert going_on(), f"ended before {what}:\n{text()}"
        assert time.monotonic() < end, f"no {what} within {WAIT_S:g} s:\n{text()}"
        time.sleep(0.02)


def patiently(start: Callable[[], Any]) -> Any:
    """What `start` gives of Ray, tried `STARTS` times."""
    for _ in range(STARTS - 1):
        with contextlib.suppress(Exception):
            return start()
    return start()


def resize(disk: Path, kibibytes: int) -> None:
    """Give a small disk (the fixture) another size."""
    subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", str(disk)], check=True)


def workers_at(functions: str | Iterable[str], parent: int) -> list[psutil.Process]:
    """Ray workers below a process that are at work on a function (or one of several) just now."""
    functions = [functions] if isinstance(functions, str) else functions
    titles = {f"ray::{function}" for function in functions}
    return [p for p in psutil.Process(parent).children(recursive=True) if _title(p) in titles]


def _title(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):  # it has just ended
        return ""


def mean(scores: Mapping[str, Any], name: str) -> float:
    """Mean over the images of a score."""
    return float(scores["mean"][name])


def _console() -> Console:
    return Console(file=io.StringIO(), width=400, soft_wrap=True)


def _printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
