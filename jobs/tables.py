"""tables: quantizer settings -> tables, designed on Gaussian samples for each σ level.

Reads   nothing.
Key     the quantizer's settings.
Work    one Ray task of seconds.
Commits the tables that drive search, rate estimate and entropy coder alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.stage import Node, Outcome, Output, Task
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantizers import Settings, Tables


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
    from pipeline.quantizers import design

    chosen = {name: value for name, value in settings.items() if name != "centroids"}
    tables = design(quantizer_settings(chosen), centroids=settings["centroids"])
    output = commit_tables(Workspace(root), tables, settings)
    return output, {"kilobytes": output["note"]["kilobytes"]}


def quantizer_settings(section: Mapping[str, Any]) -> Settings:
    """A quantizer's settings as the pipeline takes them."""
    from pipeline.quantizers import settings

    offset = section.get("offset")
    offsets = None if offset is None else tuple(offset) if isinstance(offset, list) else (offset,)
    return settings(**{**section, "offset": offsets})


def commit_tables(workspace: Workspace, tables: Tables, note: Mapping[str, Any]) -> Output:
    """Keep tables; the output entry."""
    data = tables.to_bytes()
    blob = workspace.blobs.put(data, ".safetensors")
    return {
        "kind": "tables",
        "digest": tables.digest,
        "blob": blob,
        "note": {**note, "kilobytes": round(len(data) / 1000, 1)},
    }
