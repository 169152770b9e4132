"""Projects in the background while a run goes on: it never stops the run, and never makes it wait."""

from __future__ import annotations

import threading
from collections.abc import Callable

from storage.lineage.errors import LineageUnavailable
from storage.lineage.syncing import RecordBodies, sync

RETRY_SECONDS = 30.0  # after a failure, unless somebody asks before


class Projector:
    """One daemon thread that syncs when asked; any number of requests during a sync make one more.

    An exception in it is kept, and told by `close`. What failed is tried again now and then.
    """

    def __init__(
        self,
        load_records: Callable[[], RecordBodies],
        read_blob: Callable[[str], bytes],
        tracking_uri: str,
        workspace_root: str,
    ) -> None:
        """Start the thread. `load_records` is called in it, before each sync; the rest is as for `sync`."""
        self._load_records = load_records
        self._read_blob = read_blob
        self._where = tracking_uri, workspace_root
        self._changed = threading.Condition()
        self._wanted = False
        self._closing = False
        self._trouble: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="retrellis-lineage", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Ask for a sync soon; returns at once."""
        with self._changed:
            self._wanted = True
            self._changed.notify()

    def close(self, timeout: float) -> str | None:
        """Finish what was asked for, but wait no longer than `timeout` seconds.

        Returns:
            None if MLflow shows everything asked for, else a sentence for the user that says why not.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return (
                f"MLflow is behind: it was not done within {timeout:g} s. Run `retrellis sync` to catch up."
            )
        if isinstance(self._trouble, LineageUnavailable):
            return f"MLflow is behind: {self._trouble}"
        if self._trouble is not None:
            kind = type(self._trouble).__name__
            return f"MLflow is behind: {kind}: {self._trouble}. `retrellis sync` shows the whole error."
        return None

    def _work(self) -> None:
        while self._wait():
            try:
                sync(self._load_records(), self._read_blob, *self._where)
                self._trouble = None
            except Exception as error:  # kept for `close`: lineage must not end the run it describes
                self._trouble = error

    def _wait(self) -> bool:
        """Wait until there is something to do; False when there is nothing more to come."""
        with self._changed:
            patience = RETRY_SECONDS if self._trouble else None
            self._changed.wait_for(lambda: self._wanted or self._closing, patience)
            if self._closing and not self._wanted:
                return False
            self._wanted = False
            return True
