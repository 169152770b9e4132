"""Trainings on two workers, started by Ray Train: the curve of one worker, and no trace of a worker that was killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from laboratory import Lab, _title, wait_until

from jobs.cluster import Cluster, Interrupted, TaskFailed
from jobs.loop import Message, Place, Schedule, run_loop
from jobs.shares import Share

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
TWO = Share(num_cpus=1, workers=2)
STEPS, CHECKPOINT_EVERY = 120, 20


@pytest.fixture
def cluster(ray_address: str) -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.stop()
    wait_until(lambda: ray.available_resources().get("CPU") == 2, "free cores")


def train(folder: str, step_s: float) -> Iterator[Message]:
    """A small training, at a pace that leaves time to disturb it; at its end the digest of its whole state."""
    import numpy as np

    from pipeline.training.base import BaseSettings, BaseTraining
    from pipeline.training.group import Group

    class Paced(BaseTraining):
        def advance(self) -> dict[str, float]:
            time.sleep(step_s)
            return super().advance()

    group = Group.of_process()
    Path(folder, f"rank-{group.rank}").write_text(str(os.getpid()))
    pixels = np.random.default_rng(0).integers(256, size=(96, 80, 3), dtype=np.uint8)
    settings = BaseSettings(4, 4, 0.01, STEPS, 4, 64, 1e-3, 2, 1.0, "float32", 3, "muon", "transform", 0.3)
    training = Paced(settings, [pixels], group=group)
    place = Place(f"{folder}/workspace", "train", "0" * 64, "attempt")
    yield from run_loop(training, Schedule(STEPS, CHECKPOINT_EVERY, CHECKPOINT_EVERY), place)
    yield {"state": hashlib.sha256(training.to_bytes()).hexdigest()}


def fail_in_the_second() -> Iterator[Message]:
    import torch

    from pipeline.training.group import Group

    group = Group.of_process()
    yield {"say": "begun"}
    if group.rank == 1:
        raise ValueError("the second has no images")
    group.average([torch.zeros(1)])  # waits for the other


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("state.safetensors"))


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"rank-{rank}").read_text())


def test_a_killed_worker_leaves_no_trace(cluster: Cluster, tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    *_, metrics, end = cluster.stream(train, (str(undisturbed), 0.0), TWO)

    messages: list[Message] = []
    running = threading.Thread(
        target=lambda: messages.extend(cluster.stream(train, (str(disturbed), 0.05), TWO))
    )
    running.start()
    wait_until(lambda: checkpoints(disturbed), "checkpoint", running.is_alive)
    os.kill(pid_of(disturbed, 1), signal.SIGKILL)
    running.join(300)
    *_, metrics_after, end_after = messages
    assert next(m["say"] for m in messages if "say" in m).startswith("resumed at step ")
    assert (metrics_after, end_after) == (metrics, end)  # to the byte


def test_an_interruption_ends_the_group(cluster: Cluster, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            list(cluster.stream(train, (str(tmp_path), 1.0), TWO))
        except Interrupted as error:
            caught.append(error)

    running = threading.Thread(target=run)
    running.start()
    wait_until(lambda: len(list(tmp_path.glob("rank-*"))) == 2, "both workers", running.is_alive)
    cluster.interrupt()
    running.join(60)
    assert len(caught) == 1
    wait_until(
        lambda: not any(psutil.pid_exists(pid_of(tmp_path, rank)) for rank in (0, 1)), "end of workers"
    )
    wait_until(
        lambda: not _processes("TrainController", "_QueueActor", "PlacementGroupCleaner"), "end of all"
    )


def test_an_error_of_a_worker_is_told_and_not_retried(cluster: Cluster) -> None:
    with pytest.raises(TaskFailed, match="ValueError: the second has no images") as failed:
        list(cluster.stream(fail_in_the_second, (), TWO))
    assert "in fail_in_the_second" in failed.value.__notes__[0]


def test_an_experiment_with_two_workers_has_the_curves_of_one(ray_address: str, tmp_path: Path) -> None:
    one, two = Lab.new(tmp_path / "lab"), Lab(tmp_path / "lab", str(tmp_path / "two"))
    chosen = {"stage": "finetune", "only": {"quantizer": "urq", "arm": "scale"}}
    every_step = [f"resources.{stage}.log_every=1" for stage in ("train", "finetune")]
    one.run(*every_step, **chosen)
    two.run(*every_step, *(f"resources.{stage}.workers=2" for stage in ("train", "finetune")), **chosen)
    curves = [[_curve(lab, lab.record(stage)) for lab in (one, two)] for stage in ("train", "finetune")]
    assert [len(curve) for curve, _ in curves] == [30, 6]
    # The finetunings start from codecs that differ in their last bits, and so may a few latents
    for (curve, other), tolerance in zip(curves, (1e-4, 1e-2), strict=True):
        assert other == pytest.approx(curve, rel=tolerance)


def _curve(lab: Lab, record: dict[str, Any]) -> list[float]:
    """The loss of each step."""
    lines = lab.workspace.blobs.get(record["outputs"]["metrics"]["blob"]).decode().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _processes(*names: str) -> list[str]:
    """Titles of this Ray's processes with such names."""
    children = psutil.Process().children(recursive=True)
    titles = [_title(child) for child in children]
    return [title for title in titles if any(name in title for name in names)]
