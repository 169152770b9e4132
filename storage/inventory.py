"""What latent sets a workspace holds, how large they are, and which results made and read them: from records alone.

Nothing here reads latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.latents import LatentError, LatentSet, Record
from storage.workspace import Workspace

_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Sizes:
    """How large latents are.

    Attributes:
        raw: their integers as int8 or int16, in bytes; None where a part is of a version that did not count them.
        stored: the objects of their parts, in bytes.
        bits: what an entropy coder would take, estimated by the quantizer's tables (indices and hyper indices).
    """

    raw: int | None
    stored: int
    bits: float

    @property
    def estimate(self) -> float:
        """`bits`, in bytes."""
        return self.bits / 8

    @property
    def ratio(self) -> float:
        """Stored bytes over estimated ones; NaN where nothing is stored."""
        return self.stored / self.estimate if self.bits else math.nan

    def __add__(self, other: Sizes) -> Sizes:
        raw = None if self.raw is None or other.raw is None else self.raw + other.raw
        return Sizes(raw, self.stored + other.stored, self.bits + other.bits)


@dataclass(frozen=True)
class Entry:
    """One latent set.

    Attributes:
        key: 64 hex digits.
        parts: records of the parts that count, by name.
        retired: records of the parts' withdrawal, by the part's name.
        sizes: of each part that counts, by name.
        made_by: results that name the set, in the order in which they ended.
        read_by: results that read the same latents, likewise.
        kinds: of the quantizers that made it, such as "tcq".
    """

    key: str
    parts: Mapping[str, Record]
    retired: Mapping[str, Record]
    sizes: Mapping[str, Sizes]
    made_by: list[Record]
    read_by: list[Record]
    kinds: list[str]

    @property
    def images(self) -> dict[str, str]:
        """The part of each image, by the image's digest; of an image in two parts, the first part by name."""
        found: dict[str, str] = {}
        for part, record in self.parts.items():
            for image in record["images"]:
                found.setdefault(image["digest"], part)
        return dict(sorted(found.items()))

    @property
    def total(self) -> Sizes:
        """Of all parts that count."""
        return sum(self.sizes.values(), Sizes(0, 0, 0.0))

    def axes(self, name: str) -> list[str]:
        """The values of an axis, such as "lmbda", in the results that made it."""
        return list(dict.fromkeys(str(r["axes"][name]) for r in self.made_by if name in r["axes"]))


def set_keys(workspace: Workspace) -> list[str]:
    """Sorted keys of all sets that have a record, or data on the disk."""
    names = {name.split("/")[1] for name in workspace.records.list("latents")}
    return sorted(name for name in names | set(workspace.folders("latents")) if _KEY.fullmatch(name))


def find_set(workspace: Workspace, prefix: str) -> str:
    """The key of the one set that begins with `prefix`.

    Raises:
        LatentError: none does, or several do; it lists the keys there are.
    """
    keys = set_keys(workspace)
    found = [key for key in keys if key.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(key[:8] for key in found or keys) or "no set at all"
    count = f"{len(found)}: {listed}; give more digits" if found else f"none among {listed}"
    raise LatentError(f"expected one latent set whose key begins with {prefix!r}, found {count}")


def entry(workspace: Workspace, key: str, results: Iterable[Record]) -> Entry:
    """What is known of a set.

    Args:
        results: all result records of the workspace.

    Raises:
        RecordError: a record of the set cannot be read.
    """
    results = list(results)
    latents = LatentSet(workspace, key)
    parts = latents.parts()
    made_by, read_by = uses(key, results)
    sizes = {part: part_sizes(record) for part, record in parts.items()}
    kinds = list(dict.fromkeys(_kind(record["reads"].get("tables"), results) for record in made_by))
    return Entry(key, parts, latents.retired(), sizes, made_by, read_by, [kind for kind in kinds if kind])


def uses(key: str, results: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """The results that name a set as theirs, and those that read the same latents; each in the order of their ends."""
    ordered = sorted(results, key=lambda record: str(record["ended"]))
    made_by = [record for record in ordered if any(o["note"]["set"] == key for o in _latents(record))]
    digests = {output["digest"] for record in made_by for output in _latents(record)}
    return made_by, [record for record in ordered if record["reads"].get("latents") in digests]


def part_sizes(record: Record) -> Sizes:
    """How large a part is."""
    totals = record["totals"]
    return Sizes(totals.get("raw_bytes"), totals["bytes"], totals["bits_y"] + totals["bits_z"])


def groups(workspace: Workspace, key: str) -> dict[str, str]:
    """The group of each recorded part, withdrawn or not, by the part's name.

    Raises:
        RecordError: a part's record cannot be read, so that what it names is not known.
    """
    records = workspace.records.load(f"latents/{key}/parts")
    return {name.rpartition("/")[2]: record["group"] for name, record in records.items()}


def leftovers(workspace: Workspace, key: str) -> list[str]:
    """Groups of a set that no record names: of killed tasks, or of tasks that still write.

    Raises:
        RecordError: as `groups`.
    """
    there = workspace.folders(f"latents/{key}")  # before the records: what is recorded meanwhile is none
    named = {*groups(workspace, key).values(), *LatentSet(workspace, key).table_groups()}
    return [group for name in there if (group := f"latents/{key}/{name}") not in named]


def _latents(record: Record) -> list[Mapping[str, Any]]:
    return [output for output in record["outputs"].values() if output["kind"] == "latents"]


def _kind(tables: str | None, results: Iterable[Record]) -> str | None:
    """The kind of quantizer whose tables have this digest, by the settings of the result that made them."""
    for record in results:
        if any(o["kind"] == "tables" and o["digest"] == tables for o in record["outputs"].values()):
            settings = record["ingredients"]["settings"]
            kind: str | None = settings.get("quantizer", settings).get("kind")  # `tune` keeps it one deeper
            return kind
    return None
