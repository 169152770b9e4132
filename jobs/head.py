"""The head of a Ray cluster, as far as one sees from its port.

Without it whoever waits for a task waits for ever. Ray itself gives up after 60 s, and ends the process on the spot.
"""

from __future__ import annotations

import socket
import threading
import time

ASK_EVERY_S = 5.0
SILENT_S = 20.0  # and it counts as lost


class HeadLost(RuntimeError):
    """The cluster's head does not answer any more."""


class Head:
    """Safe to use from several threads."""

    def __init__(self, address: str) -> None:
        """`address`: host and port."""
        self.address = address
        self._lock = threading.Lock()
        self._asked = time.monotonic()
        self._failing_since: float | None = None

    def look(self) -> None:
        """Ask whether it is there, if that was some time ago.

        Raises:
            HeadLost: it has not answered for too long.
        """
        with self._lock:
            if time.monotonic() - self._asked >= ASK_EVERY_S:
                self._ask()
            silent_s = self._asked - (self._failing_since or self._asked)
        if silent_s > SILENT_S:
            raise HeadLost(
                f"the head of the Ray cluster at {self.address} has not answered for {silent_s:.0f} s: its machine, "
                "its network or Ray on it is gone. Start the cluster again and give the same command, with the new "
                "--address if that has changed"
            )

    def wait(self) -> None:
        """Until it answers, before calls of Ray that would hang without it. Raises HeadLost."""
        while True:
            with self._lock:
                self._ask()
                if self._failing_since is None:
                    return
            self.look()
            time.sleep(1)

    def _ask(self) -> None:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), ASK_EVERY_S).close()
            self._failing_since = None
        except OSError:
            self._failing_since = self._failing_since or time.monotonic()
        self._asked = time.monotonic()
