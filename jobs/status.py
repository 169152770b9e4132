"""status: what ran, runs and failed, from the records alone."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.progress import BEAT_EVERY_S, is_alive, read_beat
from storage.workspace import Workspace

Records = dict[str, dict[str, Any]]


def show(root: str, follow: bool, console: Console) -> None:
    """Print the state once, or follow it until Ctrl-C: a live table, or without a terminal each change of state."""
    workspace = Workspace.open(root, create=False)
    if not follow:
        console.print(_table(workspace))
        return
    with suppress(KeyboardInterrupt):  # the way to end it
        (_follow_live if console.is_terminal else _follow_lines)(workspace, console)


def _follow_live(workspace: Workspace, console: Console) -> None:
    known: Records = {}
    with Live(_table(workspace, known), console=console, refresh_per_second=1) as live:
        while True:
            time.sleep(BEAT_EVERY_S)
            live.update(_table(workspace, known))


def _follow_lines(workspace: Workspace, console: Console) -> None:
    known: Records = {}
    told: dict[str, str] = {}
    while True:
        for row in rows(workspace, known):
            if told.get(row["instance"]) != row["state"]:
                told[row["instance"]] = row["state"]
                line = f"{row['state']:8}{row['instance']}: {row['detail']}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        time.sleep(BEAT_EVERY_S)


def rows(workspace: Workspace, known: Records | None = None) -> list[dict[str, Any]]:
    """One entry per stage instance that was ever started, in order of start.

    Each has instance, experiment, started, place (of its newest attempt), state, detail.

    Args:
        known: as `Records.load` has it, for those who look again and again.
    """
    load = partial(workspace.records.load, known=known)
    results = {record["attempt"]: record for record in load("results").values()}
    finished = {
        (record["stage"], record.get(key)) for record in results.values() for key in ("key", "early_key")
    }
    failures = {record["attempt"]: record for record in load("failures").values()}
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for attempt in sorted(load("attempts").values(), key=lambda record: record["started"]):
        identity = (attempt["stage"], attempt["key"])
        if identity not in finished or attempt["attempt"] in results:
            newest[identity] = attempt
    return [_row(workspace, attempt, results, failures) for attempt in newest.values()]


def _row(
    workspace: Workspace, attempt: dict[str, Any], results: dict[str, Any], failures: dict[str, Any]
) -> dict[str, Any]:
    row = {
        "instance": attempt["instance"],
        "experiment": attempt["experiment"],
        "started": attempt["started"],
        "place": f"attempts/{attempt['stage']}/{attempt['key']}/{attempt['attempt']}",
    }
    if result := results.get(attempt["attempt"]):
        summary = ", ".join(f"{name} {value}" for name, value in result["summary"].items())
        return row | {"state": "done", "detail": f"{result['seconds']:.1f} s; {summary}"}
    if failure := failures.get(attempt["attempt"]):
        state = "stopped" if failure["interrupted"] else "failed"
        return row | {"state": state, "detail": failure["error"].splitlines()[0]}
    beat = read_beat(workspace, row["place"])
    if beat is None:
        return row | {"state": "stopped", "detail": "no sign of life"}
    detail = f"{beat['done']}/{beat['total']} {beat['text']}"
    if is_alive(beat):
        return row | {"state": "running", "detail": detail}
    silent = time.time() - beat["time"]
    return row | {"state": "stopped", "detail": f"{detail}; last sign of life {silent:.0f} s ago"}


def _table(workspace: Workspace, known: Records | None = None) -> Table:
    table = Table(title=f"{workspace.root}", title_justify="left")
    for column in ("state", "instance", "experiment", "started", "detail"):
        table.add_column(column, overflow="fold")
    for row in rows(workspace, known):
        table.add_row(row["state"], row["instance"], row["experiment"], row["started"][:19], row["detail"])
    return table
