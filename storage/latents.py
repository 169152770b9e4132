"""Latent sets: the quantized latents of whole images, in immutable parts. Parts count once their record exists.

A part is one Zarr group (`storage.parts` has its arrays). A few lines of plain Zarr read all its images, side by side:

    part = zarr.open_group(f"{workspace.root}/{record['group']}", mode="r")
    k = np.unpackbits(part["nonzero"][...], axis=1).astype(np.int16)  # (C, P): images side by side
    magnitudes = 1 + np.unpackbits(part["larger"][...], count=k.sum()).astype(np.int16)
    magnitudes[magnitudes > 1] += part["magnitudes"][...]
    k[k > 0] = magnitudes * np.where(np.unpackbits(part["negative"][...], count=k.sum()), -1, 1)

Plain Zarr makes values up for what is missing. `LatentSet.read_part` never does: it compares every object with the size
and SHA-256 in the record first. What is there and what is missing is known from records.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from storage.buckets import meet, shelf, shelves
from storage.digests import Digests
from storage.errors import StorageError, StorageFull, StoreError
from storage.image_table import ImageTable
from storage.keys import digest, digest_of_pairs, sha256
from storage.part_records import check_distinct, describe, examine, recorded
from storage.parts import PartImage, decode, encode
from storage.workspace import Workspace

COMPACT_FROM = 10_000  # parts
TABLE = "images"  # the one object of a table's group

Record = Mapping[str, Any]


class LatentError(StorageError):
    """Latents are not recorded, or their stored bytes are damaged."""


class LatentSet:
    """The latents of one codec and quantizer, in a workspace, by the set's key."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        """The set `key`, 64 hex digits, in a workspace; it need not have a part yet."""
        self.workspace = workspace
        self.key = key
        self._folder = f"latents/{key}"
        self._known = ImageTable()  # of parts whose records were read before: these never change

    def write_part(self, prefix: str, images: Sequence[PartImage], note: Record | None = None) -> Record:
        """Write one part: its objects first, then its record.

        Args:
            prefix: binary digits with which the images' digests begin. The part's name begins with them, too: so
                parts lie in the order of digests, and who looks for an image need not read all records.
            images: some tens; the order is kept.
            note: JSON values for the record, such as the device that computed it.

        Returns:
            The record that counts: another's, if another attempt at the same images recorded first; what this one
            wrote is then dropped.

        Raises:
            StorageFull: no part was recorded, and what was written is dropped.
            ValueError: no images, one twice, or values that cannot be stored.
        """
        check_distinct(images)
        part = self._free_name(prefix, images)
        attempt = uuid.uuid4().hex
        group = f"{self._folder}/{part}-{attempt}"
        objects = encode(images)
        self._put(group, objects)
        names = {"attempt": attempt, "part": part, "prefix": prefix, "group": group}
        record = names | describe(images, objects) | {"note": dict(note or {})}
        if self.workspace.records.create(self.record_name(part), record):
            return record
        self.workspace.delete(group)
        return self.record(part)

    def parts(self) -> dict[str, Record]:
        """Records of all parts that are not retired, sorted by name. Raises RecordError."""
        names = self.part_names()
        return dict(zip(names, self.workspace.each(self.record, names), strict=True))

    def part_names(self, prefix: str = "") -> list[str]:
        """Sorted names of all parts that are not retired, from the names of records alone.

        Args:
            prefix: of digests, in binary digits: only parts that can hold images with such digests.
        """
        places = shelves(f"{self._folder}/parts", prefix)
        listed = [name for place in places for name in self.workspace.records.list(place)]
        # those of older versions lie on no shelf
        names = sorted(
            name.rpartition("/")[2] for name in listed if name.count("/") == self._folder.count("/") + 3
        )
        retired = set(self._list("retired"))
        return [name for name in names if name not in retired and meet(_prefix(name), prefix)]

    def retired(self) -> dict[str, Record]:
        """Of each part that was withdrawn the record of that: `reason`, `created_ns`. Raises RecordError."""
        return {part: self._record(self._name("retired", part)) for part in self._list("retired")}

    def record(self, part: str) -> Record:
        """A part's record, be the part retired or not.

        Raises:
            LatentError: there is none.
            RecordError: it cannot be read.
        """
        return self._record(self.record_name(part))

    def record_name(self, part: str) -> str:
        """The name of a part's record."""
        return f"{self._folder}/parts/{shelf(_prefix(part))}/{part}"

    def images(self, prefix: str = "") -> ImageTable:
        """Every image by its digest; of an image in two parts, the first part by name.

        Args:
            prefix: as that of `part_names`.

        Raises:
            RecordError: a part's record cannot be read.
        """
        names = self.part_names(prefix)
        known = self._known.only(names)
        new = sorted(set(names) - set(known.parts))
        if len(new) >= COMPACT_FROM:
            table = self._compacted()
            if not prefix and set(table.parts) - set(names) - set(self._list("retired")):
                self._forget_tables()  # a hand has moved records away; others may take their names
                table = ImageTable()
            known = table.only(names)
            new = sorted(set(names) - set(known.parts))
        if new:
            known = known.extended(self.workspace.each(self.record, new))
        if not prefix:
            self._known = known
        return known

    def missing(self, digests: Iterable[str], prefix: str = "") -> Digests:
        """Those of the images that no part has, in their order; those given up are among them.

        Args:
            prefix: binary digits with which all their digests begin: saves reading the records of other parts.
        """
        names = Digests.of(digests)
        return names.where(self.images(prefix).find(names) < 0)

    def compact(self) -> ImageTable:
        """`images`, and keep them as one object too, if there are many parts that no such object covers yet.

        It saves reading, and decides nothing: where it is missing or damaged, the records are read.
        """
        table = self.images()
        few = len(table.parts) < COMPACT_FROM
        if few or len(set(table.parts) - set(self._compacted().parts)) < COMPACT_FROM:
            return table
        data, attempt = table.to_bytes(), uuid.uuid4().hex
        older = self._list("tables")
        body = {"attempt": attempt, "sha256": sha256(data), "parts": table.parts}
        name = f"{len(table.parts):012d}-{attempt}"
        self.workspace.put(f"{self._table(name)}/{TABLE}", data)
        self.workspace.records.create(self._name("tables", name), body)
        self._forget_tables(older)  # readers go on with the newer one, or with records
        return table

    def table_groups(self) -> list[str]:
        """Where `compact` has kept tables, be they there or superseded."""
        return [self._table(name) for name in self._list("tables")]

    def _table(self, name: str) -> str:
        return f"{self._folder}/table-{name}"  # a group of its own: without its record it is a leftover

    def _forget_tables(self, names: Iterable[str] | None = None) -> None:
        for name in self._list("tables") if names is None else names:
            self.workspace.delete(self._table(name))

    def _compacted(self) -> ImageTable:
        """What `compact` kept last; an empty table where there is none, or it is damaged."""
        for name in reversed(self._list("tables")):
            try:
                record = self._record(self._name("tables", name))
                data = self.workspace.get(f"{self._table(name)}/{TABLE}")
            except StoreError:
                raise
            except (OSError, StorageError):
                continue
            if sha256(data) == record["sha256"]:
                return ImageTable.from_bytes(record["parts"], data)
        return ImageTable()

    def give_up(self, name: str, reason: str) -> None:
        """Record that an image cannot be quantized, and why; one that a part holds later counts all the same."""
        self._note("failed", name, reason)

    def given_up(self) -> dict[str, Record]:
        """The records of images given up, by digest, less those that a part holds."""
        names = self._list("failed")
        missing = self.missing(names) if names else []
        return {name: self._record(self._name("failed", name)) for name in missing}

    def content_digest(self, digests: Iterable[str]) -> str:
        """Digest of what the set says of these images, whatever the parts they lie in: 64 hex digits.

        Raises:
            LatentError: an image is missing.
        """
        table = self.images()
        wanted = Digests.of(digests)
        rows = table.find(wanted)
        if absent := wanted.where(rows < 0).distinct():
            raise LatentError(
                f"{self._folder}: expected the latents of {len(wanted.distinct())} images, {len(absent)} are missing, "
                f"such as {absent[0]}. Run quantize again; its report says which images failed and why."
            )
        return digest_of_pairs(table.contents(np.unique(rows)))  # rows lie in the order of digests

    def read_part(self, part: str) -> list[PartImage]:
        """All images of a part; their integers have the dtype at rest, int8 or int16.

        Raises:
            LatentError: the part is not recorded (or retired), or one of its objects is missing or damaged. Nothing
                of a damaged part is returned.
        """
        record = self.workspace.records.get(self.record_name(part))
        if record is None or part in self._list("retired"):
            raise LatentError(
                f"{self._folder}: expected a recorded part {part!r}, found none. Run quantize again."
            )
        entries = record["objects"]
        read = self.workspace.each(lambda entry: self._verified(part, record["group"], entry), entries)
        objects = {entry["name"]: data for entry, data in zip(entries, read, strict=True)}
        return [
            PartImage(
                digest=name,
                height=entry["height"],
                width=entry["width"],
                indices=indices,
                hyper_indices=hyper_indices,
                bits_y=entry["bits_y"],
                bits_z=entry["bits_z"],
                squared_error=entry["squared_error"],
            )
            for entry, (name, indices, hyper_indices) in zip(record["images"], decode(objects), strict=True)
        ]

    def read(self, name: str) -> PartImage:
        """One image by its digest. Its whole part is read: for many images, `read_part` is the way.

        Raises:
            LatentError: as `read_part`.
        """
        found = self.images().get(name)
        if found is None:
            raise LatentError(
                f"{self._folder}: expected image {name} in a part, found none. Run quantize again."
            )
        return next(image for image in self.read_part(found.part) if image.digest == name)

    def read_many(self, digests: Sequence[str]) -> Iterator[PartImage]:
        """Images in the given order; a part is read when the first of its images comes, and kept for the others.

        In the order of digests, in which parts lie, one part at a time is in memory.

        Raises:
            LatentError: as `read_part`.
        """
        parts = self.images().parts_of(digests)
        wanted = Counter(parts)
        held: dict[str, dict[str, PartImage]] = {}
        for name, part in zip(digests, parts, strict=True):
            if part is None:
                raise LatentError(
                    f"{self._folder}: expected image {name} in a part, found none. Run quantize again."
                )
            if part not in held:
                held[part] = {image.digest: image for image in self.read_part(part)}
            yield held[part][name]
            wanted[part] -= 1
            if not wanted[part]:
                del held[part]

    def retire(self, part: str, reason: str) -> None:
        """Withdraw a part: its images count as missing, and may be written again. Its data stays.

        A part whose record is torn can be withdrawn too: its name is enough.

        Raises:
            LatentError: there is no such part, or it has been retired before.
        """
        known = self.part_names()
        if part not in known:
            there = f"{len(known)} other(s), such as {known[0]}" if known else "none at all"
            raise LatentError(
                f"{self._folder}: expected a recorded part {part!r} to retire, found {there}. "
                f"`retrellis latents show {self.key[:8]}` lists them."
            )
        self._note("retired", part, reason)

    def _put(self, group: str, objects: Mapping[str, bytes]) -> None:
        try:
            list(
                self.workspace.each(
                    lambda name: self.workspace.put(f"{group}/{name}", objects[name]), objects
                )
            )
        except StorageFull:
            self.workspace.delete(group)  # nobody knows of it, and it may have filled the disk
            raise

    def _verified(self, part: str, group: str, entry: Record) -> bytes:
        data, found = examine(self.workspace, group, entry)
        if found:
            place = self.workspace.path(f"{group}/{entry['name']}")
            raise LatentError(
                f"part {part} is damaged at {place}: expected {recorded(entry)}, found {found}. Restore it from a "
                f"backup, or withdraw the part (`retrellis latents retire {self.key[:8]} {part} --reason …`) and run "
                "again: only its images are computed."
            )
        return data

    def _free_name(self, prefix: str, images: Sequence[PartImage]) -> str:
        """The same for the same images, unless parts of that name were retired: then the next number."""
        base = f"{prefix}-{digest(sorted(image.digest for image in images))[:16]}"
        retired = set(self._list("retired"))
        number = 0
        while f"{base}.{number}" in retired:
            number += 1
        return f"{base}.{number}"

    def _note(self, kind: str, name: str, reason: str) -> None:
        body = {"attempt": uuid.uuid4().hex, "reason": reason, "created_ns": time.time_ns()}
        self.workspace.records.create(self._name(kind, name), body)

    def _name(self, kind: str, name: str) -> str:
        return f"{self._folder}/{kind}/{name}"

    def _list(self, kind: str) -> list[str]:
        return [name.rpartition("/")[2] for name in self.workspace.records.list(f"{self._folder}/{kind}")]

    def _record(self, name: str) -> Record:
        record = self.workspace.records.get(name)
        if record is None:
            raise LatentError(
                f"expected the record {name!r}, which was there a moment ago: it has been deleted."
            )
        return record


def _prefix(part: str) -> str:
    """The binary digits with which digests of a part's images begin, by its name."""
    return part.partition("-")[0]
