"""Latents as plain files: one .npz an image, which NumPy alone reads, and an index."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from storage.durable import write_file
from storage.keys import canonical_json
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage, content_digest

INDEX = "index.json"


def export_set(latents: LatentSet, folder: Path) -> int:
    """Write every image of a set to `<digest>.npz`, then `index.json`: without it an export did not come to its end.

    A file holds `indices` (C, h, w) and `hyper_indices` (N, h', w'), int8 or int16 as at rest, and `shape`, height and
    width of the image in pixels. The index lists the images with their shapes, rates in bits and content digests.

    Args:
        folder: is made if need be, in a folder that is there.

    Returns:
        How many images were written.

    Raises:
        LatentError: the folder is not empty; the set has no image, or is damaged.
        StorageFull: what was written stays, without an index.
    """
    digests = sorted(latents.images())
    if not digests:
        raise LatentError(f"expected images in the set {latents.key}, found none: nothing was written")
    _require_empty(folder)
    index = []
    for image in latents.read_many(digests):
        data = io.BytesIO()
        shape = np.array([image.height, image.width], np.int32)
        np.savez_compressed(data, indices=image.indices, hyper_indices=image.hyper_indices, shape=shape)
        write_file(folder / f"{image.digest}.npz", data.getvalue(), replace=False)
        index.append(_row(image))
    body = canonical_json({"version": 1, "set": latents.key, "images": index})
    write_file(folder / INDEX, body + b"\n", replace=False)
    return len(index)


def _require_empty(folder: Path) -> None:
    if folder.is_dir():
        found = sorted(path.name for path in folder.iterdir())
        if not found:
            return
        what = f"{len(found)} entries, such as {found[0]}"
    elif folder.exists():
        what = "a file of that name"
    elif folder.absolute().parent.is_dir():
        return
    else:
        what = f"no folder {folder.absolute().parent} to make it in"
    raise LatentError(f"{folder}: expected an empty folder, or a name for a new one, found {what}")


def _row(image: PartImage) -> dict[str, Any]:
    return {
        "digest": image.digest,
        "file": f"{image.digest}.npz",
        "height": image.height,
        "width": image.width,
        "shape": list(image.indices.shape),
        "hyper_shape": list(image.hyper_indices.shape),
        "bits_y": float(image.bits_y),
        "bits_z": float(image.bits_z),
        "content": content_digest(image),
    }
