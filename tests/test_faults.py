"""Kills, Ctrl-C and full disks in the middle of real work: the same command completes it, to the same content."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import photos
import psutil
import pytest
from laboratory import Lab, Running, resize, wait_until, workers_at

from jobs.run import RunFailed
from jobs.shares import InfeasibleResources
from jobs.status import rows

CHECKPOINTS = "resources.train.checkpoint_every=20"
LONG = ("train.steps=200", CHECKPOINTS)  # long enough to be hit on the way
LONGER = ("train.steps=400", CHECKPOINTS)  # and to be looked at
LINGER_S = 30.0  # what Ray gets to see that its driver was killed
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # idle; they wait a minute for Ray to come back
CTRL_C_S = 15.0
BIG = (
    ("astronaut", 0, 0, 512, 512),
    ("coffee", 0, 0, 400, 512),
    ("chelsea", 0, 0, 300, 448),
    ("rocket", 0, 0, 427, 512),
)


@pytest.fixture(scope="module")
def trained(reference: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a long training comes to that nobody disturbs."""
    lab = reference.copy(tmp_path_factory.mktemp("trained") / "workspace", without=["train"])
    lab.run(*LONG, stage="train")
    return lab.content()


@pytest.fixture(scope="module")
def big(reference: Lab, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override by which latents are those of whole photographs: seconds of work."""
    folder = tmp_path_factory.mktemp("big") / "photos"
    photos.write(folder, BIG)
    return f"latents.images={folder}"


@pytest.fixture(scope="module")
def quantized(reference: Lab, big: str, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The latents of whole photographs, quantized undisturbed by one quantizer."""
    lab = reference.copy(tmp_path_factory.mktemp("quantized") / "workspace", without=["quantize"])
    lab.run(big, stage="quantize", only={"quantizer": "tcq4"})
    return lab


def test_a_training_goes_on_after_its_driver_was_killed(
    reference: Lab, trained: dict[str, str], tmp_path: Path
) -> None:
    lab = reference.copy(tmp_path / "workspace", without=["train"])
    run = start_training(lab)  # with a Ray of its own
    states = {row["instance"]: row["state"] for row in rows(lab.workspace)}
    assert states["train lmbda=0.013"] == "running"
    ours = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.finish()
    ours = [p for p in ours if p.name() not in AGENTS]
    assert not psutil.wait_procs(ours, LINGER_S)[1], "Ray's processes outlive the driver that embeds them"
    wait_until(lambda: row_of(lab, "train lmbda=0.013")["state"] == "stopped", "state 'stopped'")
    assert "last sign of life" in row_of(lab, "train lmbda=0.013")["detail"]

    printed = lab.run(*LONG, stage="train")
    assert "resumed at step" in printed
    assert lab.content() == trained
    assert row_of(lab, "train lmbda=0.013")["state"] == "done"
    assert not lab.checkpoints()


def test_a_killed_quantize_worker_is_made_up_for(quantized: Lab, big: str, tmp_path: Path) -> None:
    lab = quantized.copy(tmp_path / "workspace", without=["quantize"])
    work = threading.Thread(
        target=lab.run, args=(big,), kwargs={"stage": "quantize", "only": {"quantizer": "tcq4"}}
    )
    work.start()
    wait_until(lambda: workers_at("quantize_part", os.getpid()), "worker that quantizes")
    (victim, *_) = workers_at("quantize_part", os.getpid())
    victim.suspend()  # so that it is surely in mid-task
    assert victim.cmdline()[0] == "ray::quantize_part"
    victim.kill()
    work.join()
    assert lab.content() == quantized.content()


def test_quantizing_goes_on_after_ctrl_c(quantized: Lab, big: str, ray_address: str, tmp_path: Path) -> None:
    lab = quantized.copy(tmp_path / "workspace", without=["quantize"])
    command = ("quantize", lab.file, "--set", big, "--only", "quantizer=tcq4")
    run = lab.start(*command, address=ray_address)
    run.until(lambda: any((Path(lab.root) / "latents").glob("*/*")), "part that is being written")
    assert press_ctrl_c(run) == 130
    assert "interrupted: what finished is kept" in run.text
    assert "Traceback" not in run.text
    wait_until(lambda: not workers_at("quantize_part", os.getpid()), "end of its workers")
    lab.run(big, stage="quantize", only={"quantizer": "tcq4"})
    assert lab.content() == quantized.content()


def test_a_disk_that_is_full_at_a_checkpoint(
    reference: Lab, trained: dict[str, str], small_disk: Path
) -> None:
    lab = reference.beside(small_disk / "workspace")
    with pytest.raises(RunFailed) as failed:
        lab.run(*LONG, stage="train")
    assert "train lmbda=0.013:\n    StorageFull: disk full: expected room for" in str(failed.value)
    assert "make room and give the same command again" in str(failed.value)
    assert row_of(lab, "train lmbda=0.013")["state"] == "failed"
    resize(small_disk, 64 * 1024)
    lab.run(*LONG, stage="train")
    assert lab.content().items() <= trained.items()


def test_a_disk_that_is_full_while_a_part_is_written(quantized: Lab, big: str, small_disk: Path) -> None:
    resize(small_disk, 64 * 1024)
    lab = quantized.copy(small_disk / "workspace", without=["quantize"])
    used = -(-psutil.disk_usage(str(small_disk)).used // 1024)
    resize(small_disk, used + 64)  # for records, not for a part
    only = {"quantizer": "tcq4"}
    with pytest.raises(RunFailed, match=r"disk full: expected room for .* bytes of .*/latents/"):
        lab.run(big, stage="quantize", only=only)
    assert not any((Path(lab.root) / "latents").glob("*/*"))  # what was begun has made room again
    resize(small_disk, 64 * 1024)
    lab.run(big, stage="quantize", only=only)
    assert lab.content() == quantized.content()


def test_impossible_resources_stop_before_any_work(reference: Lab, tmp_path: Path) -> None:
    lab = reference.beside(tmp_path / "workspace")
    with pytest.raises(InfeasibleResources) as told:
        lab.run("resources.finetune.num_cpus=99")
    assert str(told.value).startswith(
        "resources.finetune.num_cpus: a task wants 99, but no node has more than 2"
    )
    assert not lab.records("attempts")


def test_status_from_another_process_while_a_run_goes_on(
    reference: Lab, ray_address: str, tmp_path: Path
) -> None:
    lab = reference.copy(tmp_path / "workspace", without=["train"])
    start_training(lab, LONGER, address=ray_address)
    once = lab.start("status")
    follow = lab.start("status", "--follow")
    assert once.finish() == 0
    assert "running" in once.text
    follow.until(lambda: "running train lmbda=0.013: " in follow.text, "what runs")
    follow.until(lambda: "done    train lmbda=0.013: " in follow.text, "its end")
    assert press_ctrl_c(follow) == 0
    assert "Traceback" not in follow.text


def start_training(lab: Lab, overrides: tuple[str, ...] = LONG, address: str | None = None) -> Running:
    """A long training in a process of its own, past its first checkpoint."""
    sets = [word for override in overrides for word in ("--set", override)]
    run = lab.start("train", lab.file, *sets, address=address)
    run.until(lab.checkpoints, "checkpoint")
    return run


def press_ctrl_c(run: Running) -> int:
    """As a terminal does: to the whole process group. The exit code, which comes within seconds."""
    begin = time.monotonic()
    os.killpg(run.process.pid, signal.SIGINT)
    code = run.finish()
    assert time.monotonic() - begin < CTRL_C_S
    return code


def row_of(lab: Lab, instance: str) -> dict[str, str]:
    """What `status` says of an instance."""
    (row,) = [row for row in rows(lab.workspace) if row["instance"] == instance]
    return row
