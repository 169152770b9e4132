"""Ctrl-C in a training on an embedded Ray: all its processes end, and `status` says how."""

from __future__ import annotations

from pathlib import Path

import psutil
from laboratory import Lab
from test_faults import CTRL_C_S, LONG, press_ctrl_c, row_of, start_training, trained

__all__ = ["trained"]  # a fixture


def test_ctrl_c_stops_a_training_within_seconds(
    reference: Lab, trained: dict[str, str], tmp_path: Path
) -> None:
    lab = reference.copy(tmp_path / "workspace", without=["train"])
    run = start_training(lab)
    ours = psutil.Process(run.process.pid).children(recursive=True)
    assert press_ctrl_c(run) == 130
    assert run.text.endswith("interrupted: what finished is kept, and the same command goes on from there\n")
    assert "Traceback" not in run.text
    assert not psutil.wait_procs(ours, CTRL_C_S)[1]
    row = row_of(lab, "train lmbda=0.013")
    assert (row["state"], row["detail"]) == ("stopped", "Interrupted: interrupted; what finished is kept")
    assert "resumed at step" in lab.run(*LONG, stage="train")
    assert lab.content() == trained
