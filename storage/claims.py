"""Claims: who is at work on what, so that two runs do not do it twice. They save work; what is right, records decide.

A claim is an object `<folder>/<shelf>/<bits>-<prefix>.<n>` that its holder writes again every few seconds. One that has
shown no sign of life for `LIFETIME_S`, by the store's own clock, is dead: who wants its bucket creates number n + 1,
and of several who try, one does. A claim of this very machine is dead as soon as its process is. A holder lets go by
deleting.

A bucket is a binary prefix of digests. Two claims meet where one prefix begins with the other, so runs that cut their
images into other buckets respect each other, too.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from storage.buckets import meet, shelf, shelves
from storage.errors import StorageError
from storage.keys import canonical_json
from storage.objects import Objects

LIFETIME_S = 60.0  # without a sign of life
BEAT_EVERY_S = 10.0


class Claims:
    """The claims in a folder of a store."""

    def __init__(
        self,
        objects: Objects,
        folder: str,
        lifetime_s: float = LIFETIME_S,
        beat_every_s: float = BEAT_EVERY_S,
    ) -> None:
        self._objects, self._folder = objects, folder
        self._lifetime_s, self._beat_every_s = lifetime_s, beat_every_s

    @contextmanager
    def hold(self, prefix: str) -> Iterator[bool]:
        """Hold a bucket while the block runs; gives False where somebody alive holds it, or one that it meets.

        Args:
            prefix: the leading binary digits of the digests that are claimed; empty for all.
        """
        name = self._take(prefix)
        if name is None:
            yield False
            return
        done = threading.Event()
        beat = threading.Thread(target=self._beat, args=(name, done), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            done.set()
            beat.join()
            self._let_go(name)

    def _take(self, prefix: str) -> str | None:
        """The name of a new claim, unless a living one meets it."""
        met = self._meeting(prefix)
        if any(map(self._is_alive, met)):
            return None
        same = [claim for claim in met if claim.prefix == prefix]
        number = 1 + max((claim.number for claim in same), default=-1)
        name = f"{self._folder}/{shelf(prefix)}/{len(prefix)}-{prefix}.{number}"
        if not self._objects.create(name, _owner()):
            return None
        # Of two who came at one moment with different buckets each sees the other here, and comes again later
        if any(claim.name != name and self._is_alive(claim) for claim in self._meeting(prefix)):
            self._let_go(name)
            return None
        for claim in same:  # the dead
            self._let_go(claim.name)
        return name

    def _meeting(self, prefix: str) -> list[_Claim]:
        found = []
        folders = shelves(self._folder, prefix)
        listed = [entry for folder in folders for entry in self._objects.list_modified(folder).items()]
        for name, modified_s in listed:
            bucket, _, number = name.rpartition("/")[2].rpartition(".")
            theirs = bucket.partition("-")[2]
            if number.isdecimal() and meet(theirs, prefix):
                found.append(_Claim(name, theirs, int(number), modified_s))
        return found

    def _is_alive(self, claim: _Claim) -> bool:
        try:
            owner = json.loads(self._objects.get(claim.name))
        except FileNotFoundError:
            return False
        except ValueError:
            owner = None
        if isinstance(owner, dict) and owner.get("machine") == _machine() and not _runs(owner.get("pid")):
            return False
        return self._now_s() - claim.modified_s < self._lifetime_s

    def _now_s(self) -> float:
        """By the store's clock: the time it gives to an object that is written now."""
        probe = f"{self._folder}/clock-{uuid.uuid4().hex}"
        self._objects.put(probe, b"")
        try:
            return self._objects.modified_s(probe)
        finally:
            self._let_go(probe)

    def _beat(self, name: str, done: threading.Event) -> None:
        while not done.wait(self._beat_every_s):
            with suppress(OSError, StorageError):  # the next one tries again
                self._objects.put(name, _owner())

    def _let_go(self, name: str) -> None:
        with suppress(OSError, StorageError):  # it dies by itself
            self._objects.remove(name)


class _Claim(NamedTuple):
    name: str
    prefix: str
    number: int
    modified_s: float


def _owner() -> bytes:
    return canonical_json({"host": platform.node(), "machine": _machine(), "pid": os.getpid()}) + b"\n"


@cache
def _machine() -> str:
    """Where a process number means the same process: this boot of this machine, this container on it."""
    parts = [platform.node()]
    with suppress(OSError):  # Linux has both
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _runs(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return True  # who knows
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
