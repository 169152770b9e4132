"""Faults of processes, nodes, memory, disks and servers in the midst of stages: the same command completes the run.

After each the content is that of an undisturbed run, nothing recorded is touched or computed again, and no image is
quantized twice (`Trial.complete`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from laboratory import resize, wait_until
from lineage_records import Shown, listening, served
from nodes import Nodes
from trial import FUNCTIONS, RUN_S, STAGES, Trial

from jobs.cluster import OUT_OF_MEMORY
from jobs.head import SILENT_S
from storage.lineage import default_tracking_uri

Begin = Callable[..., Trial]
Enter = Callable[[str, str, str], None]
NOTHING = "nothing to compute"
COMPLETED = "the same command completes it"
BY_ITSELF = "the run goes on by itself"
STOPPED_S = 30  # that a driver may take to end; on an idle machine it takes 2
AMPLE_KIB = 256 * 1024
ROOM_BYTES = 3 * 2**30
SPARE_BYTES = 2**30
THRESHOLD = "RAY_memory_usage_threshold"


@pytest.mark.parametrize("stage", STAGES)
def test_driver_killed(stage: str, entry: Enter, trial_from: Begin) -> None:
    entry("`kill -9` of the driver", stage, COMPLETED)
    trial = trial_from(stage)
    run = trial.start()
    trial.until_amid(stage, run)
    run.process.kill()
    run.finish()
    said = trial.complete()
    if stage in ("train", "finetune"):
        assert "resumed at step" in said


@pytest.mark.parametrize("stage", ["train", "quantize", "finetune"])
@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_driver_told_to_stop(signal_: signal.Signals, stage: str, entry: Enter, trial_from: Begin) -> None:
    entry(
        {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[signal_.name], stage, f"ends within seconds; {COMPLETED}"
    )
    trial = trial_from(stage)
    run = trial.start()
    trial.until_amid(stage, run)
    os.killpg(run.process.pid, signal_)
    assert run.finish(STOPPED_S) == 128 + signal_
    assert run.text.endswith("interrupted: what finished is kept, and the same command goes on from there\n")
    assert "Traceback" not in run.text
    wait_until(lambda: not trial.nodes.workers(FUNCTIONS.values()), "end of its tasks")
    trial.complete()


@pytest.mark.parametrize("stage", ["train", "quantize", "finetune", "evaluate"])
def test_worker_killed(stage: str, entry: Enter, trial_from: Begin) -> None:
    entry("`kill -9` of a worker", stage, BY_ITSELF)
    trial = trial_from(stage)
    run = trial.start()
    trial.until_amid(stage, run)
    victim = trial.nodes.workers(FUNCTIONS[stage])[0]
    victim.kill()
    finished_by_itself(trial, run.finish(RUN_S), run.text)


@pytest.mark.parametrize("stage", ["quantize", "finetune"])
def test_node_killed(stage: str, entry: Enter, trial_from: Begin) -> None:
    entry("`kill -9` of a node", stage, BY_ITSELF)
    trial = trial_from(stage)
    run = trial.start()
    trial.until_amid(stage, run)
    trial.nodes.kill(trial.nodes.working(FUNCTIONS[stage])[0])
    try:
        code = run.finish(RUN_S)
    finally:
        trial.nodes.add()
    finished_by_itself(trial, code, run.text)
    if stage in ("train", "finetune"):
        assert "resumed at step" in run.text


def test_node_killed_just_before(entry: Enter, trial_from: Begin) -> None:
    entry("`kill -9` of a node", "before a run, which still counts on it", BY_ITSELF)
    trial = trial_from("quantize")
    trial.nodes.kill(0)
    run = trial.start()
    trial.nodes.add()
    finished_by_itself(trial, run.finish(RUN_S), run.text)


def finished_by_itself(trial: Trial, code: int, text: str) -> None:
    assert code == 0, text
    trial.check()
    assert NOTHING in trial.complete()


@pytest.mark.parametrize("stage", ["quantize", "finetune"])
def test_head_killed(stage: str, entry: Enter, trial_from: Begin) -> None:
    entry(
        "`kill -9` of the head", stage, f"ends in half a minute with a message; {COMPLETED} on a new cluster"
    )
    with Nodes(2) as doomed:
        trial = trial_from(stage, on=doomed)
        run = trial.start()
        trial.until_amid(stage, run)
        doomed.kill_head()
        began = time.monotonic()
        assert run.finish(90) == 1
        assert time.monotonic() - began < SILENT_S + STOPPED_S
        assert f"the head of the Ray cluster at {doomed.address} has not answered for 2" in run.text
        assert "Start the cluster again and give the same command" in run.text
    trial_from(stage, lab=trial.lab).complete()


@pytest.fixture
def short_of_memory(scratch: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Nodes on which Ray kills tasks as soon as the machine uses some gigabytes more than now."""
    total, used = memory()
    monkeypatch.setenv(THRESHOLD, str((used + ROOM_BYTES) / total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with Nodes(2) as nodes:
        yield nodes


def memory() -> tuple[int, int]:
    """Of the machine in bytes: all, and what is in use."""
    found = psutil.virtual_memory()
    return found.total, found.total - found.available


@contextmanager
def hog() -> Iterator[None]:
    """A process that takes all that room, and some more, for others may give theirs back meanwhile."""
    total, used = memory()
    taken = int(float(os.environ[THRESHOLD]) * total) - used + SPARE_BYTES
    hold = f"import time; held = bytearray(b'x') * {taken}; print('full', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("stage", ["quantize", "finetune"])
def test_out_of_memory_once(stage: str, entry: Enter, trial_from: Begin, short_of_memory: Nodes) -> None:
    entry("a task out of memory, once", stage, BY_ITSELF)
    trial = trial_from(stage, on=short_of_memory)
    run = trial.start()
    trial.until_amid(stage, run)
    victims = trial.nodes.workers(FUNCTIONS[stage])
    with hog():
        wait_until(lambda: not all(victim.is_running() for victim in victims), "a task killed")
    finished_by_itself(trial, run.finish(RUN_S), run.text)


@pytest.mark.parametrize("stage", ["train", "quantize"])
def test_out_of_memory_always(stage: str, entry: Enter, trial_from: Begin, short_of_memory: Nodes) -> None:
    entry("a task out of memory, whenever it is tried", stage, f"ends with what to lower; {COMPLETED}")
    trial = trial_from(stage, on=short_of_memory)
    run = trial.start("--set", "resources.quantize.max_failures=2")
    trial.until_amid(stage, run)
    with hog():
        assert run.finish(RUN_S) == 1
    assert f"OutOfMemoryError: {OUT_OF_MEMORY}" in run.text
    trial_from(stage, lab=trial.lab).complete()  # where the machine's other work counts less


@pytest.mark.parametrize("stage", ["train", "quantize", "finetune", "evaluate"])
def test_disk_full(stage: str, entry: Enter, trial_from: Begin, small_disk: Path) -> None:
    entry("the workspace's disk full", stage, f"ends with a message; {COMPLETED} once there is room")
    resize(small_disk, AMPLE_KIB)
    trial = trial_from(stage, root=small_disk / "workspace")
    run = trial.start()
    trial.until_amid(stage, run)
    fill(small_disk)
    assert run.finish(RUN_S) == 1
    assert "disk full: expected room for" in run.text
    resize(small_disk, AMPLE_KIB)
    trial.complete()


def fill(disk: Path) -> None:
    """Leave no room, whatever is written meanwhile."""
    while (usage := psutil.disk_usage(str(disk))).free > 0:
        with suppress(subprocess.CalledProcessError):
            resize(disk, -(-usage.used // 1024))


def test_mlflow_away(entry: Enter, trial_from: Begin, tmp_path: Path) -> None:
    entry(
        "MLflow's server stopped, and back later",
        "quantize",
        "the run ends well; `retrellis sync` catches up",
    )
    trial = trial_from("quantize")
    server = tmp_path / "server"
    server.mkdir()
    Shown(default_tracking_uri(str(server)))  # makes the database
    with listening() as port:
        pass
    uri = f"http://127.0.0.1:{port}"
    with served(server, port):
        run = trial.start("--tracking-uri", uri)
        trial.until_amid("quantize", run)
        run.until(lambda: Shown(uri).runs, "run in MLflow")
    assert run.finish(RUN_S) == 0, run.text
    assert "MLflow is behind" in run.text
    trial.check()
    sync = ("sync", "--tracking-uri")
    with served(server, port):
        for expected in (r"[1-9]\d* created", "0 created"):
            done = trial.lab.start(*sync, uri)
            assert done.finish() == 0
            assert re.search(expected, done.text), done.text
        shown = Shown(uri).snapshot()
    fresh = default_tracking_uri(str(tmp_path))
    assert trial.lab.start(*sync, fresh).finish() == 0
    assert shown == Shown(fresh).snapshot()
    assert NOTHING in trial.complete()
