"""What the commands share: where results lie, where words go, and what a failure is to a shell."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

console = Console(soft_wrap=True)

WorkspaceOption = Annotated[
    str | None,
    typer.Option(
        help="folder or s3://bucket/prefix of all results; else RETRELLIS_WORKSPACE, else ./workspace"
    ),
]


def workspace_root(option: str | None) -> str:
    """The workspace's root, by the option, the environment, or the default."""
    return option or os.environ.get("RETRELLIS_WORKSPACE") or "workspace"


def exit_if(failed: int) -> None:
    """End with exit code 1 if anything failed."""
    if failed:
        raise typer.Exit(1)
