"""Whether a latent set is on the disk as its records say: every object by size and SHA-256, every image by content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import StorageError
from storage.latents import LatentSet, Record
from storage.part_records import MISSING, examine, recorded
from storage.parts import PartImage, content_digest, decode
from storage.records import RecordError
from storage.workspace import Workspace


@dataclass(frozen=True)
class Fault:
    """Something of a part that is not as recorded.

    Attributes:
        name: of the object in the part's group, or what else is at fault.
        place: its path or URL.
        expected, found: in words.
    """

    part: str
    name: str
    place: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.place}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class PartCheck:
    """What reading a part again came to; `images` and `size` (bytes) are those of its record."""

    part: str
    images: int
    size: int
    faults: list[Fault]


def verify(workspace: Workspace, key: str) -> Iterator[PartCheck]:
    """Read all parts of a set that count, one at a time, in the order of their names. Nothing is changed.

    Raises:
        StoreError: a remote store does not answer, which is no fault of a part.
    """
    latents = LatentSet(workspace, key)
    for part in latents.part_names():
        try:
            record = latents.record(part)
        except StorageError as error:
            place = workspace.path(f"records/{latents.record_name(part)}.json")
            found = f"what cannot be read ({error})" if isinstance(error, RecordError) else "none"
            yield PartCheck(part, 0, 0, [Fault(part, "record", place, "a part's record", found)])
            continue
        faults = list(_faults(workspace, record))
        yield PartCheck(part, len(record["images"]), record["totals"]["bytes"], faults)


def reason(faults: list[Fault]) -> str:
    """Why a part is retired, for its record, which outlives a workspace's place."""
    first, more = faults[0], f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{first.name}: expected {first.expected}, found {first.found}{more}"


def _faults(workspace: Workspace, record: Record) -> Iterator[Fault]:
    part, group = record["part"], record["group"]
    objects: dict[str, bytes] = {}
    found: dict[str, str] = {}  # where it is not as recorded
    for entry in record["objects"]:
        try:
            objects[entry["name"]], wrong = examine(workspace, group, entry)
        except OSError as error:  # a bad sector, say; the others are looked at all the same
            wrong = f"what cannot be read ({error})"
        if wrong:
            found[entry["name"]] = wrong
    if not found:
        yield from _content_faults(workspace, record, objects)
    elif len(found) == len(record["objects"]) and set(found.values()) == {MISSING}:
        whole = f"{len(found)} objects, {record['totals']['bytes']:,} bytes"
        yield Fault(part, "group", workspace.path(group), whole, "no object at all")
    else:
        for entry in record["objects"]:
            if wrong := found.get(entry["name"], ""):
                place = workspace.path(f"{group}/{entry['name']}")
                yield Fault(part, entry["name"], place, recorded(entry), wrong)


def _content_faults(workspace: Workspace, record: Record, objects: dict[str, bytes]) -> Iterator[Fault]:
    """Whole objects can still hold other latents than the record says, if a hand or a bug wrote them so."""
    part, place = record["part"], workspace.path(record["group"])
    try:
        images = decode(objects)
    except Exception as error:  # Zarr and its codecs raise whatever they meet
        yield Fault(part, "content", place, "a Zarr group that decodes", f"{type(error).__name__}: {error}")
        return
    if len(images) != len(record["images"]):
        yield Fault(part, "content", place, f"{len(record['images'])} images", f"{len(images)}")
        return
    for row, (image, (name, indices, hyper_indices)) in enumerate(zip(record["images"], images, strict=True)):
        content = content_digest(PartImage(name, 0, 0, indices, hyper_indices, 0.0, 0.0, 0.0))
        if name != image["digest"]:
            yield Fault(part, "content", place, f"image {image['digest']} in row {row}", f"image {name}")
        elif content != image["content"]:
            yield Fault(
                part, "content", place, f"content {image['content']} of image {name}", f"content {content}"
            )
