"""The loop of a training, called in this process: damaged checkpoints, small images; and a stage's signs of life."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from laboratory import wait_until
from rich.console import Console

from jobs import ingest, progress, train
from jobs.experiment import Images
from jobs.loop import Message, Place, Schedule, run_loop
from jobs.progress import Board, Heartbeat, Row, ask_to_end, is_alive, read_beat
from jobs.resources import TrainResources
from jobs.stage import Node, Task
from pipeline.training.base import BaseSettings, BaseTraining
from pipeline.training.optimization import CheckpointError
from storage.workspace import Workspace

SETTINGS: dict[str, Any] = {
    "N": 4,
    "M": 4,
    "lmbda": 0.01,
    "steps": 6,
    "batch": 1,
    "crop": 64,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "warmup": 2,
    "clip": 1.0,
    "precision": "float32",
    "seed": 3,
}
SCHEDULE = Schedule(steps=6, log_every=2, checkpoint_every=2)
STATE, METRICS = "state.safetensors", "metrics.jsonl"
KEY = "0" * 64


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"))


def training(**changes: Any) -> BaseTraining:
    pixels = np.random.default_rng(0).integers(256, size=(96, 80, 3), dtype=np.uint8)
    return BaseTraining(BaseSettings(**SETTINGS | changes), [pixels])


def run(workspace: Workspace, attempt: str) -> tuple[list[str], bytes]:
    """One attempt to its end: what it says, and the final state."""
    this = training()
    messages = list(run_loop(this, SCHEDULE, Place(workspace.root, "train", KEY, attempt)))
    assert messages[-1]["metrics"].count("\n") == 3
    return [message["say"] for message in messages if "say" in message], this.to_bytes()


def test_longer_measurements_come_with_checkpoints_and_the_end(workspace: Workspace) -> None:
    schedule = Schedule(steps=7, log_every=1, checkpoint_every=3)
    place = Place(workspace.root, "train", KEY, "measured")
    messages = list(run_loop(training(steps=7), schedule, place, lambda: {"held_out_loss": 1.0}))
    assert [message["step"] for message in messages[:-1] if "held_out_loss" in message] == [3, 6, 7]
    assert messages[-1]["metrics"].count("held_out_loss") == 3


def checkpoint(workspace: Workspace, step: int, file: str) -> Path:
    return Path(workspace.path(f"attempts/train/{KEY}/first/checkpoint-{step:09d}/{file}"))


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def scrambled(data: bytes) -> bytes:
    return bytes(reversed(data))


def without_step(data: bytes) -> bytes:
    return data.replace(b'"__metadata__"', b'"__metadota__"')


def wider(data: bytes) -> bytes:
    return training(N=5).to_bytes()


def without_a_moment(data: bytes) -> bytes:
    """The network is as it was, and would be put back before the optimizer is looked at."""
    this = training()
    this.advance()
    state = next(iter(this.main["main"].state.values()))
    del state["exp_avg_sq"]
    return this.to_bytes()


DAMAGES = (truncated, empty, scrambled, without_step, wider, without_a_moment)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_leaves_nothing_behind(damage: Callable[[bytes], bytes]) -> None:
    source, target = training(), training()
    source.advance()
    before = target.to_bytes()
    with pytest.raises(CheckpointError, match=r"expected .*, found "):
        target.resume(damage(source.to_bytes()))
    assert (target.to_bytes(), target.step) == (before, 0)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(place: str) -> None:
    workspace = Workspace.open(place)
    said, undisturbed = run(workspace, "first")
    assert said == []
    newest = f"attempts/train/{KEY}/first/checkpoint-{4:09d}/{STATE}"
    workspace.put(newest, truncated(workspace.get(newest)))
    said, resumed = run(workspace, "second")
    assert said[0].startswith(
        f"checkpoint {place}/{newest} cannot be used: expected a whole checkpoint, found "
    )
    assert said[1:] == ["resumed at step 2 from a checkpoint"]
    assert resumed == undisturbed


def test_a_training_without_a_usable_checkpoint_starts_afresh(workspace: Workspace) -> None:
    _, undisturbed = run(workspace, "first")
    metrics, state = checkpoint(workspace, 4, METRICS), checkpoint(workspace, 2, STATE)
    metrics.write_bytes(b"\xff")
    state.write_bytes(b"")
    said, restarted = run(workspace, "second")
    assert [line.partition(" cannot be used: ")[0] for line in said] == [
        f"checkpoint {metrics}",
        f"checkpoint {state}",
    ]
    assert restarted == undisturbed


class Here:
    """A cluster whose tasks are calls."""

    def map(self, function: Callable[..., Any], items: list[tuple[Any, ...]], share: object) -> Iterator[Any]:
        return ((item, function(*item)) for item in items)

    def stream(
        self, function: Callable[..., Iterator[Message]], args: tuple[Any, ...], share: object
    ) -> Iterator[Message]:
        return function(*args)


def task(workspace: Workspace, node: Node, inputs: dict[str, Any], say: Callable[[str], None]) -> Task:
    return Task(
        node=node,
        key=KEY,
        inputs=inputs,
        workspace=workspace,
        cluster=Here(),  # type: ignore[arg-type]
        resources=TrainResources(),
        attempt="a",
        progress=lambda done, total, text: None,
        say=say,
    )


@pytest.mark.parametrize(("side", "padded"), [(40, True), (64, False)])
def test_that_small_images_are_padded_is_said(
    side: int, padded: bool, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRELLIS_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(1).integers(256, size=(64, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photos/a.png")
    files = ingest.list_files(Images(folders=[str(tmp_path / "photos")]))
    said: list[str] = []
    node = Node("ingest", {}, {"scale": 1.0, "max_pixels": 10_000}, parameters={"files": files})
    images = ingest.compute(task(workspace, node, {}, said.append)).outputs["images"]
    outcome = train.compute(
        task(workspace, Node("train", {}, SETTINGS | {"steps": 1}), {"images": images}, said.append)
    )
    assert outcome.outputs["codec"]["kind"] == "codec"
    assert said == (["some images are smaller than the crop of 64 px: they are reflect-padded"] * padded)


def row_of(label: str) -> Row:
    return Board(Console(file=io.StringIO())).row(label)


def test_the_heartbeat_outlives_errors_of_the_store(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BEAT_EVERY_S", 0.01)
    blocked = Path(workspace.path("attempts"))
    blocked.touch()  # a file where a folder should be
    heartbeat = Heartbeat(workspace, "attempts/train/a", row_of("train"), lambda: None)
    try:
        time.sleep(0.1)
        assert blocked.is_file()
        blocked.unlink()
        wait_until(lambda: is_alive(read_beat(workspace, "attempts/train/a")), "beat")
    finally:
        heartbeat.close()


@pytest.mark.parametrize("beat_every_s", [0.01, 60.0])
def test_what_is_asked_of_an_instance_is_noticed_at_its_end_at_last(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, beat_every_s: float
) -> None:
    monkeypatch.setattr(progress, "BEAT_EVERY_S", beat_every_s)
    asked = threading.Event()
    heartbeat = Heartbeat(workspace, "attempts/train/a", row_of("train"), asked.set)
    wait_until(lambda: read_beat(workspace, "attempts/train/a"), "beat")
    assert not asked.is_set()
    ask_to_end(workspace, "attempts/train/a")
    if beat_every_s < 1:
        wait_until(asked.is_set, "end")
    heartbeat.close()
    assert asked.is_set()
