"""A part's record: its images, its objects with their sizes and digests, and where and by what it was made."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr

from storage.keys import sha256
from storage.parts import PartImage, content_digest, integer_bytes
from storage.workspace import Workspace

VERSION = 2
MISSING = "no such object"  # what is found where nothing is

Record = Mapping[str, Any]


def describe(images: Sequence[PartImage], objects: Mapping[str, bytes]) -> dict[str, Any]:
    """The record of a part made here and now, less its names."""
    return {
        "version": VERSION,
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
    }


def check_distinct(images: Sequence[PartImage]) -> None:
    """Raise ValueError unless a part has images, each once."""
    counts = Counter(image.digest for image in images)
    if not images or max(counts.values()) > 1:
        found = f"{counts.most_common(1)[0][0]} twice" if images else "none"
        raise ValueError(f"expected a part of one or more images, each once, found {found}")


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
        "squared_error": float(image.squared_error),
    }


def _totals(images: Sequence[PartImage], objects: Mapping[str, bytes]) -> dict[str, int | float]:
    return {
        "images": len(images),
        "pixels": sum(image.height * image.width for image in images),
        "bits_y": float(sum(image.bits_y for image in images)),
        "bits_z": float(sum(image.bits_z for image in images)),
        "raw_bytes": sum(
            integer_bytes(arrays)
            for arrays in ([i.indices for i in images], [i.hyper_indices for i in images])
        ),
        "bytes": sum(len(data) for data in objects.values()),
    }
