"""tables: quantizer settings -> tables, designed on Gaussian samples for each σ level.

Reads   nothing.
Key     the quantizer's settings.
Work    one Ray task of seconds.
Commits the tables that drive search, rate estimate and entropy coder alike.
"""

from __future__ import annotations

from typing import Any

from jobs.stage import Node, Outcome, Output, Task
from storage.workspace import Workspace


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    return "one design, seconds"


def compute(task: Task) -> Outcome:
    """Design one quantizer's tables."""
    task.progress(0, 1, "designs")
    output, summary = task.cluster.run(
        design_tables, (task.workspace.root, dict(task.node.settings)), task.share
    )
    return Outcome({"tables": output}, summary)


def design_tables(root: str, settings: dict[str, Any]) -> tuple[Output, dict[str, Any]]:
    """Runs in a worker."""
    from pipeline.quantizers import Settings, design

    chosen = {name: value for name, value in settings.items() if name != "centroids"}
    tables = design(Settings(**chosen), centroids=settings["centroids"])
    data = tables.to_bytes()
    blob = Workspace.open(root).blobs.put(data, ".safetensors")
    kilobytes = round(len(data) / 1000, 1)
    return {"kind": "tables", "digest": tables.digest, "blob": blob, "note": settings}, {
        "kilobytes": kilobytes
    }
