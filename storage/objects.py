"""Named bytes under one root, a local folder or an `s3://` URL, by obstore.

obstore hangs for ever in a process forked after its first use: start processes by spawn (Ray's are not forked).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore

from storage.durable import make_directory, write_file
from storage.errors import StoreError
from storage.remote import explained, is_conflict, open_bucket

if TYPE_CHECKING:
    from obstore import ObjectMeta

REQUESTS_AT_ONCE = 16  # each takes milliseconds, most of them spent waiting
_CONFLICT_WAITS_S = (0.05, 0.2, 0.8, 3.2)

Item = TypeVar("Item")
Result = TypeVar("Result")

_NAME = re.compile(r"(?!.*(^|/)\.{1,2}(/|$))[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True)
class Usage:
    """What a folder holds: `size` in bytes; `newest_s`, seconds since 1970, of its last change (0.0 if empty)."""

    size: int
    newest_s: float


class Objects:
    """Objects by name ("a/b.json"). A write is whole or not at all; in a local folder it is flushed.

    All methods raise OSError where a local disk fails, and StoreError where a remote store does.

    Attributes:
        root: absolute path of a folder, or URL.
        store: the obstore store, for those who want to read by themselves.
    """

    def __init__(self, root: str, patient: bool = True) -> None:
        """Point at `root`; a local folder is made if need be.

        Args:
            patient: whether a remote store that does not answer is asked again for minutes, or for seconds.
        """
        self.store: ObjectStore
        if "://" in root:
            self.root, self._folder = root.rstrip("/"), None
            self.store = open_bucket(root, patient)
        else:
            self._folder = Path(root).expanduser().resolve()
            self.root = str(self._folder)
            make_directory(self._folder)
            self.store = LocalStore(self._folder)

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write an object, replacing one of that name.

        Raises:
            StorageFull: the disk is full; nothing has changed.
        """
        self._check(name)
        if self._folder is None:
            with self._asking(name):
                obstore.put(self.store, name, data)
        else:  # obstore does not flush to the disk
            write_file(self._folder / name, data, replace=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of that name; return whether this call did. Of a race, one wins.

        Raises:
            StorageFull: the disk is full; nothing has changed.
        """
        self._check(name)
        if self._folder is not None:
            return write_file(self._folder / name, data, replace=False)
        with self._asking(name):
            for wait_s in _CONFLICT_WAITS_S:
                try:
                    obstore.put(self.store, name, data, mode="create")
                    return True
                except AlreadyExistsError as error:
                    if not is_conflict(error):
                        return False
                time.sleep(wait_s)
        raise StoreError(
            f"{self.path(name)}: expected to create it or to find it there, found others at it all the time"
        )

    def get(self, name: str) -> bytes:
        """All bytes of an object. Raises FileNotFoundError."""
        with self._asking(name):
            return bytes(obstore.get(self.store, name).bytes())

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset` on: fewer, or none, where the object ends. Raises FileNotFoundError."""
        with self._asking(name):
            try:
                return bytes(obstore.get_range(self.store, name, start=offset, length=size))
            except BaseError:
                if obstore.head(self.store, name)["size"] > offset:
                    raise
                return b""

    def list(self, prefix: str) -> list[str]:
        """Sorted names of all objects in the folder `prefix` and below it; no such folder: none."""
        return sorted(entry["path"] for entry in self._entries(prefix))

    def list_modified(self, prefix: str) -> dict[str, float]:
        """As `list`, with the time of each object's last write: seconds since 1970, by the store's clock."""
        found = {entry["path"]: entry["last_modified"].timestamp() for entry in self._entries(prefix)}
        return dict(sorted(found.items()))

    def modified_s(self, name: str) -> float:
        """When an object was written last, as `list_modified` has it. Raises FileNotFoundError."""
        with self._asking(name):
            return obstore.head(self.store, name)["last_modified"].timestamp()

    def remove(self, name: str) -> None:
        """Delete one object; none of that name is no error."""
        self._check(name)
        if self._folder is None:
            with self._asking(name):
                obstore.delete(self.store, name)
        else:
            (self._folder / name).unlink(missing_ok=True)

    def folders(self, prefix: str) -> tuple[str, ...]:
        """Sorted names, relative to it, of the folders right in `prefix`; an empty one exists on a disk alone."""
        if self._folder is None:
            with self._asking(prefix):
                found = obstore.list_with_delimiter(self.store, prefix)["common_prefixes"]
            return tuple(sorted(name.rstrip("/").rpartition("/")[2] for name in found))
        place = self._folder / prefix
        names = (entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else ()
        return tuple(sorted(names))

    def usage(self, prefix: str) -> Usage:
        """Size and last change of all in the folder `prefix`, with the hidden leftovers of killed writers."""
        if self._folder is None:
            entries = self._entries(prefix)
            times = [entry["last_modified"].timestamp() for entry in entries]
            return Usage(sum(entry["size"] for entry in entries), max(times, default=0.0))
        size, newest = 0, 0.0
        for folder, _, files in os.walk(self._folder / prefix):
            for path in (Path(folder), *(Path(folder, file) for file in files)):
                with suppress(FileNotFoundError):  # a writer has just given it its name
                    status = path.lstat()
                    size += 0 if path == Path(folder) else status.st_size
                    newest = max(newest, status.st_mtime)
        return Usage(size, newest)

    def delete(self, prefix: str) -> None:
        """Delete the folder `prefix` with all below it; no such folder is no error.

        What others delete or write in it at the same time may stay.
        """
        self._check(prefix)
        if self._folder is None:
            with self._asking(prefix):
                obstore.delete(self.store, self.list(prefix))
        else:  # with the empty folders and the hidden leftovers of killed writers
            folder = self._folder / prefix
            if folder.exists():
                shutil.rmtree(folder, onerror=_unless_others_are_at_it)

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What `function`, which asks the store, gives for each item, in order; of a remote store, some at once."""
        if self._folder is not None:
            yield from map(function, items)
            return
        items = tuple(items)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            for start in range(0, len(items), REQUESTS_AT_ONCE):  # no more results than these are held
                yield from pool.map(function, items[start : start + REQUESTS_AT_ONCE])

    def path(self, name: str) -> str:
        """Where an object lies, for people and for tools that open it themselves: a file's path or a URL."""
        return f"{self.root}/{name}"

    def _entries(self, prefix: str) -> Sequence[ObjectMeta]:
        with self._asking(prefix):
            return [entry for chunk in obstore.list(self.store, prefix) for entry in chunk]

    def _asking(self, name: str) -> AbstractContextManager[None]:
        return explained(self.root, name)

    @staticmethod
    def _check(name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"expected an object name of letters, digits, '.', '_', '-' and single '/', found {name!r}"
            )


def _unless_others_are_at_it(function: object, path: str, error: tuple[type, BaseException, object]) -> None:
    """Raise what `rmtree` met, unless another process deleted the object first or wrote one behind its back."""
    reason = error[1]
    if not (isinstance(reason, OSError) and reason.errno in (errno.ENOENT, errno.ENOTEMPTY)):
        raise reason
