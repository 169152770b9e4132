"""A node's own copies of arrays, flat on its disk and mapped into memory: what training reads at random, many times."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from storage.durable import naming_full_disk, sync_directory

_DATA = "data.bin"
_INDEX = "index.npz"


def scratch() -> Path:
    """This node's folder for what can be made again: RETRELLIS_SCRATCH, else one in the system's temporary folder."""
    named = os.environ.get("RETRELLIS_SCRATCH")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"retrellis-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


class LocalCache:
    """Directories on this node's disk, each named by the digest of what it is made from and built once.

    All in it can be made again: it may be deleted whenever nothing runs.
    """

    def __init__(self, root: Path) -> None:
        """A cache in the folder `root`, which belongs to one node: locks do not reach further."""
        self.root = root

    @classmethod
    def default(cls) -> LocalCache:
        """In `scratch()`."""
        return cls(scratch())

    def open_or_build(self, key: str, build: Callable[[Path], None]) -> Path:
        """The directory `key`, built if it is not there.

        Of several processes (or threads) one builds and the others wait. What a killed builder left is removed.

        Args:
            key: a digest of all that decides the content.
            build: is given an empty directory to fill with files and folders.

        Raises:
            StorageFull: nothing is left behind. What `build` raises passes through, with the same effect.
        """
        finished = self.root / key
        if finished.is_dir():
            return finished
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.root / f"{key}.lock"):
            if not finished.is_dir():
                self._build(finished, build)
        return finished

    def _build(self, finished: Path, build: Callable[[Path], None]) -> None:
        unfinished = finished.with_name(f"{finished.name}.building")
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed builder's; we hold its lock
        with naming_full_disk(unfinished, 0):
            unfinished.mkdir()
            try:
                build(unfinished)
                for path in [*unfinished.rglob("*"), unfinished]:
                    sync_directory(path) if path.is_dir() else _sync_file(path)
                unfinished.rename(finished)
                sync_directory(finished.parent)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise


class RaggedWriter:
    """Writes arrays of one dtype, one after another, as `RaggedArrays` reads them. Used in a `with` block."""

    def __init__(self, directory: Path, dtype: npt.DTypeLike) -> None:
        """Write into an existing directory."""
        self._directory = directory
        self._dtype = np.dtype(dtype)
        self._shapes: list[tuple[int, ...]] = []
        self._file = (directory / _DATA).open("wb")

    def append(self, array: npt.NDArray[Any]) -> None:
        """Add one array, converted to the dtype. All have the same number of dimensions.

        Raises:
            ValueError: another number of dimensions than the first.
            StorageFull: the disk is full.
        """
        if self._shapes and len(self._shapes[0]) != array.ndim:
            raise ValueError(
                f"expected {len(self._shapes[0])} dimensions as in the first array, found {array.shape}"
            )
        data = np.ascontiguousarray(array, self._dtype)
        with naming_full_disk(self._directory / _DATA, data.nbytes):
            self._file.write(data.data)
        self._shapes.append(array.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the index, unless the block failed: without it, `RaggedArrays` refuses the directory."""
        with naming_full_disk(self._directory / _DATA, 0):
            self._file.close()
        if kind is not None:
            return
        dimensions = len(self._shapes[0]) if self._shapes else 0
        shapes = np.array(self._shapes, np.int64).reshape(len(self._shapes), dimensions)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(shapes.prod(axis=1))])
        with naming_full_disk(self._directory / _INDEX, shapes.nbytes + offsets.nbytes):
            np.savez(
                self._directory / _INDEX, shapes=shapes, offsets=offsets, dtype=np.array(self._dtype.str)
            )


class RaggedArrays:
    """Arrays of one dtype and any sizes in one flat file, mapped into memory. `[i]` is a read-only view, not a copy.

    It pickles as its directory. Attributes: `shapes`, int64 (count, dimensions).
    """

    def __init__(self, directory: Path) -> None:
        """Open what a `RaggedWriter` has written.

        Raises:
            FileNotFoundError: the writer did not come to its end.
        """
        self._directory = directory
        with np.load(directory / _INDEX, allow_pickle=False) as index:
            self.shapes: npt.NDArray[np.int64] = index["shapes"]
            self._offsets: npt.NDArray[np.int64] = index["offsets"]
            dtype = np.dtype(str(index["dtype"]))
        size = int(self._offsets[-1])
        self._flat: npt.NDArray[Any] = np.empty(0, dtype)  # an empty file cannot be mapped
        if size:
            self._flat = np.memmap(directory / _DATA, dtype, mode="r", shape=(size,))

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """Array number `row`; negative numbers count from the end. Raises IndexError."""
        row = range(len(self))[row]
        return self._flat[self._offsets[row] : self._offsets[row + 1]].reshape(self.shapes[row])

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        """All arrays in order, one at a time in memory."""
        return (self[row] for row in range(len(self)))

    def __reduce__(self) -> tuple[type[RaggedArrays], tuple[Path]]:
        return (RaggedArrays, (self._directory,))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel gives back when its holder dies, so that none is ever stale."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
