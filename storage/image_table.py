"""What the records of a latent set say of its images, in 108 bytes each: a driver holds a million of them.

Rows are sorted by digest, those of one image by the name of its part: of an image in two parts, the first part counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.digests import RAW, Digests, in_hex

_ROW = np.dtype(
    [
        ("digest", RAW),
        ("content", RAW),
        ("bits_y", "f8"),
        ("bits_z", "f8"),
        ("squared_error", "f8"),
        ("pixels", "i8"),
        ("samples", "i8"),
        ("part", "i4"),
    ]
)

_AT_ONCE = 4096
Record = Mapping[str, Any]
Positions = npt.NDArray[np.intp]


class Row(NamedTuple):
    """One image: its part, the digest of its latents, and what its part's record says of it."""

    part: str
    content: str
    bits_y: float
    bits_z: float
    squared_error: float
    pixels: int
    samples: int  # of its indices


class ImageTable(Mapping[str, Row]):
    """Images by digest.

    Attributes:
        parts: names of the parts whose images these are.
    """

    def __init__(self, parts: Sequence[str] = (), rows: npt.NDArray[np.void] | None = None) -> None:
        """Use `extended` and `from_bytes`."""
        self.parts = list(parts)
        self._rows = np.empty(0, _ROW) if rows is None else rows
        names = self._rows["digest"]
        self._firsts: Positions = np.flatnonzero(np.append(True, names[1:] != names[:-1])[: len(names)])

    def extended(self, records: Iterable[Record]) -> ImageTable:
        """With the images of more parts, by their records."""
        parts, rows, new = list(self.parts), self._rows.copy(), []
        for record in records:
            new += [_row(entry, len(parts)) for entry in record["images"]]
            parts.append(record["part"])
            if len(new) >= _AT_ONCE:
                rows = _longer(rows, new)
        return ImageTable(parts, _sorted(parts, _longer(rows, new)))

    def only(self, parts: Iterable[str]) -> ImageTable:
        """Without the images of other parts."""
        wanted = set(parts)
        kept = [number for number, part in enumerate(self.parts) if part in wanted]
        if len(kept) == len(self.parts):
            return self
        numbers = np.full(len(self.parts), -1, np.int32)
        numbers[kept] = np.arange(len(kept))
        rows = self._rows[numbers[self._rows["part"]] >= 0]
        rows["part"] = numbers[rows["part"]]
        return ImageTable([self.parts[number] for number in kept], rows)

    def find(self, digests: Iterable[str]) -> Positions:
        """The row of each image; -1 where no part has it."""
        wanted = Digests.of(digests).raw
        if not len(self._rows):
            return np.full(len(wanted), -1)
        found = np.searchsorted(self._rows["digest"], wanted)
        found[found == len(self._rows)] = 0
        return np.where(self._rows["digest"][found] == wanted, found, -1)

    def parts_of(self, digests: Iterable[str]) -> list[str | None]:
        """The part of each image; None where there is none."""
        rows = self.find(digests)
        numbers = self._rows["part"][rows] if len(self._rows) else rows
        return [self.parts[number] if row >= 0 else None for row, number in zip(rows, numbers, strict=True)]

    def total(self, column: str, rows: Positions) -> float:
        """The sum of a column of numbers over some rows."""
        return float(self._rows[column][rows].sum())

    def contents(self, rows: Positions) -> Iterator[tuple[str, str]]:
        """Of some rows, each image's digest and the digest of its latents."""
        for row in rows:
            yield in_hex(self._rows["digest"][row]), in_hex(self._rows["content"][row])

    def to_bytes(self) -> memoryview:
        """The rows as they lie in memory, of 108 bytes each; with `parts` they make the table again."""
        return self._rows.view(np.uint8).data

    @classmethod
    def from_bytes(cls, parts: Sequence[str], data: bytes | memoryview) -> ImageTable:
        """Back from `parts` and `to_bytes`."""
        return cls(parts, np.frombuffer(data, _ROW))

    def __len__(self) -> int:
        return len(self._firsts)

    def __iter__(self) -> Iterator[str]:
        """The digests, sorted."""
        return iter(Digests(self._rows["digest"][self._firsts]))

    def __getitem__(self, name: str) -> Row:
        (position,) = self.find([name])
        if position < 0:
            raise KeyError(name)
        _, content, bits_y, bits_z, error, pixels, samples, part = self._rows[position].tolist()
        return Row(self.parts[part], in_hex(content), bits_y, bits_z, error, pixels, samples)


def _row(entry: Record, part: int) -> tuple[Any, ...]:
    numbers = (entry["bits_y"], entry["bits_z"], entry["squared_error"])
    channels, height, width = entry["shape"]
    digests = (bytes.fromhex(entry["digest"]), bytes.fromhex(entry["content"]))
    return (*digests, *numbers, entry["height"] * entry["width"], channels * height * width, part)


def _longer(rows: npt.NDArray[np.void], new: list[tuple[Any, ...]]) -> npt.NDArray[np.void]:
    """With more rows at the end, in place where there is room: a large set is not held twice. `new` is emptied."""
    known = len(rows)
    rows.resize(known + len(new), refcheck=False)
    rows[known:] = np.array(new, _ROW)
    new.clear()
    return rows


def _sorted(parts: Sequence[str], rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """By digest, then by the name of the part; column by column, for the same reason."""
    rank = np.empty(len(parts), np.int32)
    rank[np.argsort(np.array(parts, "S"))] = np.arange(len(parts))
    order = np.lexsort((rank[rows["part"]], rows["digest"]))
    for name in _ROW.names or ():
        rows[name] = rows[name][order]
    return rows
