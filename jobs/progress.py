"""What a person sees while stages run: bars in a terminal, lines elsewhere, and a file for `status`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from storage.errors import StorageError
from storage.keys import canonical_json
from storage.workspace import Workspace

LINE_EVERY_S = 5.0  # without a terminal
BEAT_EVERY_S = 2.0  # how often a running stage says in the workspace that it is alive
DEAD_AFTER_S = 5 * BEAT_EVERY_S  # without a beat
_ASKED = "asked-to-end"


class Board:
    """All running stages. Safe to use from several threads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._live = console.is_terminal
        self._rows: dict[str, Row] = {}

    def __enter__(self) -> Board:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False)

    def row(self, label: str) -> Row:
        """A row for one stage instance."""
        bar = self._bars.add_task(label, total=None, text="") if self._live else None
        self._rows[label] = Row(self, label, bar)
        return self._rows[label]

    def progress(self, label: str) -> tuple[int, int]:
        """How far an instance is: done, and of how many; 0 of 0 where it has not begun."""
        row = self._rows.get(label)
        return (row.done, row.total) if row else (0, 0)

    def _update(self, row: Row) -> None:
        if row.bar is not None:
            self._bars.update(row.bar, completed=row.done, total=row.total or None, text=row.text)
        elif time.monotonic() - row.printed >= LINE_EVERY_S or row.done == row.total:
            row.printed = time.monotonic()
            self.say(f"  {row.label}: {row.done}/{row.total} {row.text}")

    def _close(self, row: Row) -> None:
        if row.bar is not None:
            self._bars.remove_task(row.bar)


class Row:
    """The progress of one stage instance."""

    def __init__(self, board: Board, label: str, bar: TaskID | None) -> None:
        self.board, self.label, self.bar = board, label, bar
        self.done, self.total, self.text = 0, 0, ""
        self.printed = time.monotonic()

    def update(self, done: int, total: int, text: str) -> None:
        """`done` of `total`; `text` says of what, and how it stands."""
        self.done, self.total, self.text = done, total, text
        self.board._update(self)

    def close(self) -> None:
        self.board._close(self)


def read_beat(workspace: Workspace, place: str) -> dict[str, Any] | None:
    """An attempt's last sign of life, if any: `time` (seconds since 1970), `done`, `total`, `text`."""
    try:
        beat: dict[str, Any] = json.loads(workspace.get(f"{place}/progress.json"))
    except FileNotFoundError:
        return None
    return beat


def is_alive(beat: Mapping[str, Any] | None) -> bool:
    """Whether an attempt with this last sign of life still runs."""
    return beat is not None and time.time() - beat["time"] < DEAD_AFTER_S


def ask_to_end(workspace: Workspace, place: str) -> None:
    """Ask who works on an attempt to end the whole run, as Ctrl-C does."""
    workspace.put(f"{place}/{_ASKED}", b"")


class Heartbeat:
    """Writes a row's progress under `attempts/` until closed, so that `status` elsewhere tells running from dead.

    Each time it also looks whether somebody has asked for an end, and if so calls `cancel`.
    """

    def __init__(self, workspace: Workspace, place: str, row: Row, cancel: Callable[[], None]) -> None:
        self._workspace, self._place, self._row, self._cancel = workspace, place, row, cancel
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            self._look()
            row = self._row
            body = {"time": time.time(), "done": row.done, "total": row.total, "text": row.text}
            # No reason to end the work, which says so where it writes itself; the next beat tries again
            with suppress(OSError, StorageError):
                self._workspace.put(f"{self._place}/progress.json", canonical_json(body))
            if self._stopped.wait(BEAT_EVERY_S):
                self._look()  # what was asked of this instance is asked of the run
                return

    def _look(self) -> None:
        with suppress(OSError, StorageError):  # most often there is no such object
            self._workspace.get(f"{self._place}/{_ASKED}")
            self._cancel()
