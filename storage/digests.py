"""Digests of many images, in 32 bytes each: as strings in a list, a million of them would be 120 MB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

SIZE = hashlib.sha256().digest_size
RAW = f"S{SIZE}"


class Digests(Sequence[str]):
    """Digests in some order. Each is 64 hex digits to those who read them; a slice is a view.

    Attributes:
        raw: the bytes of each, dtype S32.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, raw: npt.NDArray[np.bytes_]) -> None:
        """Use `of` for strings."""
        self.raw = raw

    @classmethod
    def of(cls, names: Iterable[str]) -> Digests:
        """From 64 hex digits each."""
        if isinstance(names, Digests):
            return names
        return cls(np.fromiter((bytes.fromhex(name) for name in names), RAW))

    def where(self, wanted: npt.NDArray[np.bool_]) -> Digests:
        """Those for which it is true, in their order."""
        return self if wanted.all() else Digests(self.raw[wanted])

    def distinct(self) -> Digests:
        """Sorted, each once."""
        return self if (self.raw[1:] > self.raw[:-1]).all() else Digests(np.unique(self.raw))

    def leading(self) -> npt.NDArray[np.uint64]:
        """The first 32 bits of each, as a number."""
        return np.ascontiguousarray(self.raw).view(">u4")[:: SIZE // 4].astype(np.uint64)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Digests: ...
    def __getitem__(self, at: int | slice) -> str | Digests:
        return Digests(self.raw[at]) if isinstance(at, slice) else in_hex(self.raw[at])

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[str]:
        return (in_hex(name) for name in self.raw)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Digests.of({list(self)!r})"


def in_hex(digest: bytes) -> str:
    """64 hex digits; NumPy has dropped zeros at the end."""
    return digest.ljust(SIZE, b"\0").hex()
