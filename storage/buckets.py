"""Buckets of images: binary prefixes of their digests."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from storage.digests import Digests

_SHELF_BITS = 12


def buckets(digests: Iterable[str], bits: int) -> dict[str, Digests]:
    """Share images out by the leading bits of their digests.

    Args:
        bits: 0 (one bucket) to 32.

    Returns:
        Sorted distinct digests by bucket, named by those bits; empty buckets are left out. All of one bucket come
        before all of the next.
    """
    if not 0 <= bits <= 32:
        raise ValueError(f"expected 0 to 32 bits for the buckets, found {bits}")
    names = Digests.of(digests).distinct()
    numbers, starts = np.unique(names.leading() >> np.uint64(32 - bits), return_index=True)
    ends = np.append(starts, len(names))[1:]
    return {
        f"{number:0{bits}b}" if bits else "": names[start:end]
        for number, start, end in zip(numbers, starts, ends, strict=True)
    }


def binary(name: str, bits: int = 32) -> str:
    """The first `bits` binary digits of a digest, 32 at most."""
    return f"{int(name[:8], 16):032b}"[:bits]


def shelf(prefix: str) -> str:
    """The folder in which records of a bucket lie: one of 4096, or that of the few buckets too wide for any of these.

    Who looks for images lists one or two folders, however many there are.
    """
    return f"{int(prefix[:_SHELF_BITS], 2):03x}" if len(prefix) >= _SHELF_BITS else "wide"


def shelves(folder: str, prefix: str) -> list[str]:
    """The folders below `folder` in which all lies that can meet a bucket: its shelf and that of the wide, or all."""
    own, wide = shelf(prefix), shelf("")
    return [folder] if own == wide else [f"{folder}/{wide}", f"{folder}/{own}"]


def meet(one: str, other: str) -> bool:
    """Whether a digest can begin with both of two binary prefixes: one begins with the other."""
    return one.startswith(other) or other.startswith(one)
