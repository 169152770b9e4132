"""cancel: ask a run to end, wherever it is, through the workspace alone. Its driver sees that within seconds.

A run on a cluster, started by `ray job submit` or on a machine that nobody is logged in to, has no Ctrl-C.
"""

from __future__ import annotations

from rich.console import Console

from jobs.progress import ask_to_end
from jobs.status import rows
from storage.workspace import Workspace


class NothingToCancel(ValueError):
    """Nothing runs that was meant, or it is not clear what is meant."""


def cancel(root: str, experiment: str | None, console: Console) -> None:
    """Ask what runs of an experiment to end, and say what was asked.

    Args:
        experiment: its name; None where only one is running.

    Raises:
        NothingToCancel: says what runs.
    """
    workspace = Workspace.open(root, create=False)
    running = [row for row in rows(workspace) if row["state"] == "running"]
    names = sorted({row["experiment"] for row in running})
    listed = ", ".join(names) or "nothing"
    if experiment is None and len(names) != 1:
        raise NothingToCancel(
            f"{root}: expected one experiment that runs, found {listed}" + ("; name it" if names else "")
        )
    asked = [row for row in running if row["experiment"] == (experiment or names[0])]
    if not asked:
        raise NothingToCancel(f"{root}: expected {experiment!r} to run, found {listed}")
    for row in asked:
        ask_to_end(workspace, row["place"])
        console.print(f"asked to end: {row['instance']}", markup=False, highlight=False, soft_wrap=True)
    console.print("what finished is kept, and the same `retrellis run` goes on from there", highlight=False)
