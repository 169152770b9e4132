"""Latent sets: the quantized latents of whole images, in immutable parts. Parts count once their record exists.

A part is one Zarr group (`storage.parts` has its arrays). Three lines of plain Zarr read image `i` of a part:

    group = zarr.open_group(f"{workspace.root}/{record['group']}", mode="r")
    start, end = group["offsets"][i : i + 2]
    indices = group["indices"][start:end].reshape(group["shapes"][i])

Plain Zarr gives the fill value, the dtype's minimum, for what is missing. `LatentSet.read_part` never does: it compares
every object with the size and SHA-256 in the record first. What is there and what is missing is known from records.
"""

from __future__ import annotations

import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import zarr

from storage.errors import StorageError, StorageFull
from storage.keys import digest, sha256
from storage.parts import PartImage, content_digest, decode, encode
from storage.workspace import Workspace

RECORD_VERSION = 1
MISSING = "no such object"  # what is found where nothing is

Record = Mapping[str, Any]


class LatentError(StorageError):
    """Latents are not recorded, or their stored bytes are damaged."""


class LatentSet:
    """The latents of one codec and quantizer, in a workspace, by the set's key."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        """The set `key`, 64 hex digits; it need not have a part yet."""
        self._workspace = workspace
        self.key = key
        self._folder = f"latents/{key}"
        self._known: dict[str, Record] = {}  # records never change, so each is read once

    def write_part(self, bucket: str, images: Sequence[PartImage], note: Record | None = None) -> Record:
        """Write one part: its objects first, then its record.

        Args:
            bucket: the part's name begins with it, so that parts lie in the order of the images' digests.
            images: some tens; the order is kept.
            note: JSON values for the record, such as the device that computed it.

        Returns:
            The record that counts: another's, if another attempt at the same images recorded first; what this one
            wrote is then dropped.

        Raises:
            StorageFull: no part was recorded, and what was written is dropped.
            ValueError: no images, one twice, or values that cannot be stored.
        """
        _check_distinct(images)
        part = self._free_name(bucket, images)
        attempt = uuid.uuid4().hex
        group = f"{self._folder}/{part}-{attempt}"
        objects = encode(images)
        self._put(group, objects)
        record = {
            "version": RECORD_VERSION,
            "attempt": attempt,
            "part": part,
            "bucket": bucket,
            "group": group,
            "images": [_image_entry(image) for image in images],
            "objects": [
                {"name": name, "size": len(data), "sha256": sha256(data)} for name, data in objects.items()
            ],
            "totals": _totals(images, objects),
            "created_ns": time.time_ns(),
            "host": platform.node(),
            "versions": {
                "zarr": zarr.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "note": dict(note or {}),
        }
        if self._workspace.records.create(self._name("parts", part), record):
            return record
        self._workspace.delete(group)
        return self._record(self._name("parts", part))

    def parts(self) -> dict[str, Record]:
        """Records of all parts that are not retired, sorted by name. Raises RecordError."""
        names = self.part_names()
        return dict(zip(names, self._workspace.each(self.record, names), strict=True))

    def part_names(self) -> list[str]:
        """Sorted names of all parts that are not retired, from the names of records alone."""
        retired = set(self._list("retired"))
        return [part for part in self._list("parts") if part not in retired]

    def retired(self) -> dict[str, Record]:
        """Of each part that was withdrawn the record of that: `reason`, `created_ns`. Raises RecordError."""
        return {part: self._record(self._name("retired", part)) for part in self._list("retired")}

    def record(self, part: str) -> Record:
        """A part's record, be the part retired or not.

        Raises:
            LatentError: there is none.
            RecordError: it cannot be read.
        """
        return self._record(self._name("parts", part))

    def images(self) -> dict[str, tuple[str, Record]]:
        """Every image's part and its entry in that part's record; of an image in two parts, the first part by name."""
        found: dict[str, tuple[str, Record]] = {}
        for part, record in self.parts().items():
            for entry in record["images"]:
                found.setdefault(entry["digest"], (part, entry))
        return found

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those of the images that no part has, in their order; those given up are among them."""
        found = self.images()
        return [name for name in digests if name not in found]

    def give_up(self, name: str, reason: str) -> None:
        """Record that an image cannot be quantized, and why; one that a part holds later counts all the same."""
        self._note("failed", name, reason)

    def given_up(self) -> dict[str, Record]:
        """The records of images given up, by digest, less those that a part holds."""
        names = self._list("failed")
        known = self.images() if names else {}
        return {name: self._record(self._name("failed", name)) for name in names if name not in known}

    def content_digest(self, digests: Iterable[str]) -> str:
        """Digest of what the set says of these images, whatever the parts they lie in: 64 hex digits.

        Raises:
            LatentError: an image is missing.
        """
        found = self.images()
        wanted = sorted(set(digests))
        absent = [name for name in wanted if name not in found]
        if absent:
            raise LatentError(
                f"{self._folder}: expected the latents of {len(wanted)} images, {len(absent)} are missing, such as "
                f"{absent[0]}. Run quantize again; its report says which images failed and why."
            )
        return digest([[name, found[name][1]["content"]] for name in wanted])

    def read_part(self, part: str) -> list[PartImage]:
        """All images of a part; their integers have the dtype at rest, int8 or int16.

        Raises:
            LatentError: the part is not recorded (or retired), or one of its objects is missing or damaged. Nothing
                of a damaged part is returned.
        """
        record = self.parts().get(part)
        if record is None:
            raise LatentError(
                f"{self._folder}: expected a recorded part {part!r}, found none. Run quantize again."
            )
        entries = record["objects"]
        read = self._workspace.each(lambda entry: self._verified(part, record["group"], entry), entries)
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
                note=entry["note"],
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
        return next(image for image in self.read_part(found[0]) if image.digest == name)

    def read_many(self, digests: Sequence[str]) -> Iterator[PartImage]:
        """Images in the given order; a part is read when the first of its images comes, and kept for the others.

        In the order of digests, in which parts lie, one part at a time is in memory.

        Raises:
            LatentError: as `read_part`.
        """
        places = self.images()
        wanted = Counter(places[name][0] for name in digests if name in places)
        held: dict[str, dict[str, PartImage]] = {}
        for name in digests:
            if name not in places:
                raise LatentError(
                    f"{self._folder}: expected image {name} in a part, found none. Run quantize again."
                )
            part = places[name][0]
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
                self._workspace.each(
                    lambda name: self._workspace.put(f"{group}/{name}", objects[name]), objects
                )
            )
        except StorageFull:
            self._workspace.delete(group)  # nobody knows of it, and it may have filled the disk
            raise

    def _verified(self, part: str, group: str, entry: Record) -> bytes:
        data, found = examine(self._workspace, group, entry)
        if found:
            place = self._workspace.path(f"{group}/{entry['name']}")
            raise LatentError(
                f"part {part} is damaged at {place}: expected {recorded(entry)}, found {found}. Restore it from a "
                f"backup, or withdraw the part (`retrellis latents retire {self.key[:8]} {part} --reason …`) and run "
                "again: only its images are computed."
            )
        return data

    def _free_name(self, bucket: str, images: Sequence[PartImage]) -> str:
        """The same for the same images, unless parts of that name were retired: then the next number."""
        base = f"{bucket}-{digest(sorted(image.digest for image in images))[:16]}"
        retired = set(self._list("retired"))
        number = 0
        while f"{base}.{number}" in retired:
            number += 1
        return f"{base}.{number}"

    def _note(self, kind: str, name: str, reason: str) -> None:
        body = {"attempt": uuid.uuid4().hex, "reason": reason, "created_ns": time.time_ns()}
        self._workspace.records.create(self._name(kind, name), body)

    def _name(self, kind: str, name: str) -> str:
        return f"{self._folder}/{kind}/{name}"

    def _list(self, kind: str) -> list[str]:
        return [name.rpartition("/")[2] for name in self._workspace.records.list(f"{self._folder}/{kind}")]

    def _record(self, name: str) -> Record:
        if name not in self._known:
            record = self._workspace.records.get(name)
            if record is None:
                raise LatentError(
                    f"expected the record {name!r}, which was there a moment ago: it has been deleted."
                )
            self._known[name] = record
        return self._known[name]


def recorded(entry: Record) -> str:
    """What a part's record says of one of its objects."""
    return f"{entry['size']:,} bytes of SHA-256 {entry['sha256']}"


def examine(workspace: Workspace, group: str, entry: Record) -> tuple[bytes, str]:
    """Read an object of a part and compare it with the part's record.

    Args:
        group: of the part.
        entry: of the object in the part's record: `name`, `size` in bytes, `sha256`.

    Returns:
        Its bytes, and what was found instead of what is recorded: "" if it is as recorded.
    """
    try:
        data = workspace.get(f"{group}/{entry['name']}")
    except FileNotFoundError:
        return b"", MISSING
    if len(data) != entry["size"] or sha256(data) != entry["sha256"]:
        return data, f"{len(data):,} bytes of SHA-256 {sha256(data)}"
    return data, ""


def buckets(digests: Iterable[str], bits: int) -> dict[str, list[str]]:
    """Share images out by the leading bits of their digests.

    Args:
        bits: 0 (one bucket) to 32.

    Returns:
        Sorted distinct digests by bucket, named by its number in hex; empty buckets are left out. All of one bucket
        come before all of the next.
    """
    if not 0 <= bits <= 32:
        raise ValueError(f"expected 0 to 32 bits for the buckets, found {bits}")
    digits = max(1, -(-bits // 4))
    shared: dict[str, list[str]] = {}
    for name in sorted(set(digests)):
        number = int(name[:8], 16) >> (32 - bits)
        shared.setdefault(f"{number:0{digits}x}", []).append(name)
    return shared


def prefix(name: str, bits: int = 32) -> str:
    """The first `bits` binary digits of a digest, 32 at most."""
    return f"{int(name[:8], 16):032b}"[:bits]


def _check_distinct(images: Sequence[PartImage]) -> None:
    counts = Counter(image.digest for image in images)
    if not images or max(counts.values()) > 1:
        found = f"{counts.most_common(1)[0][0]} twice" if images else "none"
        raise ValueError(f"expected a part of one or more images, each once, found {found}")


def _image_entry(image: PartImage) -> dict[str, Any]:
    return {
        "digest": image.digest,
        "height": image.height,
        "width": image.width,
        "shape": list(image.indices.shape),
        "hyper_shape": list(image.hyper_indices.shape),
        "content": content_digest(image),
        "bits_y": float(image.bits_y),
        "bits_z": float(image.bits_z),
        "note": dict(image.note),
    }


def _totals(images: Sequence[PartImage], objects: Mapping[str, bytes]) -> dict[str, int | float]:
    return {
        "images": len(images),
        "pixels": sum(image.height * image.width for image in images),
        "bits_y": float(sum(image.bits_y for image in images)),
        "bits_z": float(sum(image.bits_z for image in images)),
        "bytes": sum(len(data) for data in objects.values()),
    }
