"""A run is ended from elsewhere, through its workspace alone; the same command completes it."""

from __future__ import annotations

from pathlib import Path

from laboratory import Lab
from typer.testing import CliRunner

from jobs.cli import app
from jobs.status import rows

LONG = (
    "--set",
    "train.steps=100000",
    "--set",
    "resources.train.compile=false",
    "--set",
    "resources.train.checkpoint_every=20",
)


def cancel(lab: Lab, *arguments: str) -> str:
    """What the command says, be it an error."""
    result = CliRunner().invoke(app, ["cancel", *arguments, "--workspace", lab.root])
    return str(result.exception) if result.exception else result.output


def test_a_run_is_cancelled_from_elsewhere(reference: Lab, ray_address: str, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace", without=["train"])
    assert cancel(lab) == f"{lab.root}: expected one experiment that runs, found nothing"
    run = lab.start("train", lab.file, *LONG, address=ray_address)
    run.until(lambda: list(Path(lab.root, "attempts").rglob("state.safetensors")), "a checkpoint")
    assert cancel(lab, "other") == f"{lab.root}: expected 'other' to run, found small"
    said = cancel(lab)
    assert said.startswith("asked to end: train lmbda=0.013\n")
    assert run.finish() == 1
    assert "stopped: train lmbda=0.013: interrupted; what finished is kept" in run.text
    assert "retrellis: cancelled; what finished is kept, and the same command goes on from there" in run.text
    assert [row["state"] for row in rows(lab.workspace) if row["instance"].startswith("train")] == ["stopped"]
    again = lab.start("train", lab.file, *LONG, address=ray_address)
    again.until(lambda: "resumed at step" in again.text, "where it goes on from")
    cancel(lab, "small")
    assert again.finish() == 1
