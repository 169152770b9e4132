"""The image store: canonical RGB8 pixels, each image once, losslessly, in WebDataset shards that are never rewritten.

A shard is a plain tar of `<digest>.png`, named by its own SHA-256. Its record `images/<name>` says which images lie
where in it, and which source files gave them (or why a file gave none), so that a known file is not decoded again.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL.PngImagePlugin import PngImageFile

from storage.errors import StorageError
from storage.keys import canonical_json, digest, sha256
from storage.workspace import Workspace

RECORD_VERSION = 1
_FOLDER = "images"

Pixels = npt.NDArray[np.uint8]
SourceKey = tuple[str, int, int, str]


class ImageError(StorageError):
    """An image is unknown, or its stored bytes are damaged."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was looked at, and what it gave: the digest of its pixels, or the reason why it has none.

    Attributes:
        path: as the user's folder has it.
        size: in bytes.
        mtime_ns: time of its last change, ns since 1970.
        settings: JSON values that decide the pixels, such as {"scale": 0.5}.
    """

    path: str
    size: int
    mtime_ns: int
    settings: Mapping[str, Any]
    digest: str | None = None
    reason: str | None = None

    @property
    def key(self) -> SourceKey:
        """(path, size, mtime_ns, digest of settings): by this the index knows the file again."""
        return (self.path, self.size, self.mtime_ns, digest(self.settings))


@dataclass(frozen=True, slots=True)
class Image:
    """An image's size in pixels and the place of its PNG: `size` bytes from `offset` on in the object `shard`."""

    height: int
    width: int
    shard: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """What the records say: sources by `Source.key`, images by pixel digest."""

    sources: Mapping[SourceKey, Source]
    images: Mapping[str, Image]


class ImageStore:
    """The images of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        """Images inside `workspace`; the index is read when it is first needed."""
        self._workspace = workspace
        self._index: ImageIndex | None = None

    def index(self) -> ImageIndex:
        """The index, read from the records once; `write_shard` of this object and a `read` of an unknown one renew it.

        If records differ on a source, the newest counts; if an image lies in two shards, the first record by name.

        Raises:
            RecordError: a record cannot be read.
        """
        index = self._index  # another thread may forget it meanwhile
        if index is None:
            index = self._index = _index(self._workspace.records.load(_FOLDER).values())
        return index

    def write_shard(self, pixels: Mapping[str, Pixels], sources: Sequence[Source]) -> dict[str, Any]:
        """Write those of the images that the index does not have as one shard, then the record of all the sources.

        Equal images in equal order give an equal shard, byte for byte. If it is killed before the record, it leaves
        a shard that no record names and that the next attempt writes again.

        Args:
            pixels: canonical pixels, uint8 (H, W, 3), by `pixel_digest`.
            sources: files looked at; each with a reason, or with the digest of an image given here or stored before.

        Returns:
            The record. Its `object` is None if there was no new image.

        Raises:
            StorageFull: neither shard nor record counts; what was recorded before is kept.
            ValueError: a source has neither reason nor known digest.
        """
        stored = self.index().images
        for source in sources:
            if source.reason is None and source.digest not in pixels and source.digest not in stored:
                raise ValueError(
                    f"expected a reason or the digest of a known image for {source.path}, found neither"
                )
        new = {name: image for name, image in pixels.items() if name not in stored}
        record: dict[str, Any] = {
            "version": RECORD_VERSION,
            "attempt": uuid.uuid4().hex,
            "created_ns": time.time_ns(),
            **self._write_tar(new),
            "sources": [asdict(source) for source in sources],
        }
        content = digest([record["sha256"], record["sources"]])
        # Never adopted from an earlier attempt: after a rehash the same words can be news again
        self._workspace.records.create(f"{_FOLDER}/{content}-{record['attempt']}", record)
        self._index = None
        return record

    def read(self, name: str) -> Pixels:
        """An image's pixels, uint8 (H, W, 3), by their digest and verified against it. Only its own bytes are read.

        Raises:
            ImageError: no record names it, or its shard is missing or damaged.
        """
        place = self.index().images.get(name)
        if place is None:
            self._index = None  # others may have stored it since
            place = self.index().images.get(name)
        if place is None:
            raise ImageError(
                f"image {name} is unknown: expected a record that names it. Ingest its folder again."
            )
        try:
            pixels = _decode_png(self._workspace.get_range(place.shard, place.offset, place.size))
            found = pixel_digest(pixels)
        except (OSError, SyntaxError, ValueError) as error:  # missing, too short, no PNG, a torn PNG
            found = f"{type(error).__name__}: {error}"
        if found != name:
            raise ImageError(
                f"image {name} cannot be read from shard {self._workspace.path(place.shard)}, {place.size} bytes from "
                f"{place.offset} on: expected pixels of that digest, found {found}. Restore the shard from a backup, "
                "or move away the record that names it and ingest the folder again."
            )
        return pixels

    def read_many(self, names: Iterable[str]) -> Iterator[Pixels]:
        """As `read`, image by image in the given order; a remote store is asked for some at once."""
        self.index()  # once, before several want it
        yield from self._workspace.each(self.read, names)

    def _write_tar(self, images: Mapping[str, Pixels]) -> dict[str, Any]:
        if not images:
            return {"object": None, "bytes": 0, "sha256": None, "images": []}
        data = _tar(images)
        content = sha256(data)
        name = f"{_FOLDER}/{content}.tar"
        self._workspace.put(name, data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        entries = [
            {
                "digest": image,
                "height": pixels.shape[0],
                "width": pixels.shape[1],
                "offset": member.offset_data,
                "size": member.size,
            }
            for (image, pixels), member in zip(images.items(), members, strict=True)
        ]
        return {"object": name, "bytes": len(data), "sha256": content, "images": entries}


def pixel_digest(pixels: Pixels) -> str:
    """SHA-256 over shape and values of canonical pixels, uint8 (H, W, 3): 64 hex digits, the image's name everywhere.

    Raises:
        ValueError: another dtype or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(
            f"expected pixels uint8 (H, W, 3), found {pixels.dtype} {pixels.shape}: convert them first"
        )
    hasher = hashlib.sha256(canonical_json(list(pixels.shape)))
    hasher.update(np.ascontiguousarray(pixels).data)
    return hasher.hexdigest()


def image_set_digest(digests: Iterable[str]) -> str:
    """The digest of a set of images, whatever their order and however often one is named: 64 hex digits."""
    return digest(sorted(set(digests)))


def _index(records: Iterable[Mapping[str, Any]]) -> ImageIndex:
    images: dict[str, Image] = {}
    sources: dict[SourceKey, Source] = {}
    for record in records:
        for entry in record["images"]:
            place = Image(entry["height"], entry["width"], record["object"], entry["offset"], entry["size"])
            images.setdefault(entry["digest"], place)
    for record in sorted(records, key=lambda record: (record["created_ns"], record["attempt"])):
        for entry in record["sources"]:
            source = Source(**entry)
            sources[source.key] = source
    return ImageIndex(sources, images)


def _tar(images: Mapping[str, Pixels]) -> bytes:
    from webdataset import TarWriter  # noqa: PLC0415 (it imports torch, which nobody who reads has to wait for)

    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0) as writer:
        for name, pixels in images.items():
            writer.write({"__key__": name, "png": _encode_png(pixels)})
    return stream.getvalue()


def _encode_png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _decode_png(data: bytes) -> Pixels:
    # Not PIL.Image.open, whose limit on pixels is for strangers' files: ingest had its own limit for these
    with PngImageFile(io.BytesIO(data)) as image:
        return np.asarray(image)
