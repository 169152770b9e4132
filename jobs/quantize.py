"""quantize: codec × tables × images -> latent set.

Reads   whole images, in float32.
Key     of the set: grid and rate digests of the codec, and the tables; with effort also its steps, λ and the whole
        codec, whose decoder then decides too. Of the result also the image set.
Work    one Ray task per bucket of images; only images that no recorded part holds.
Commits immutable parts, each by its record; then the digest of the latents of just these images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.local import image_digests
from jobs.stage import Node, Outcome, Output, Task
from storage.images import ImageStore
from storage.keys import digest
from storage.latents import LatentSet, buckets
from storage.parts import PartImage
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.refinement import Refinement

IMAGES_PER_BUCKET = 16  # on average
SET_VERSION = 2  # bumped when the same ingredients give other indices
EFFORT_VERSION = 1  # the same of those that effort gives


def set_key(inputs: Mapping[str, Output], settings: Mapping[str, Any]) -> str:
    """What names a latent set: all that decides an image's indices, and no list of images."""
    note = inputs["codec"]["note"]
    ingredients = {
        "version": SET_VERSION,
        "grid": note["grid"],
        "rate": note["rate"],
        "tables": inputs["tables"]["digest"],
    }
    if settings:
        ingredients |= {**settings, "codec": inputs["codec"]["digest"]}
    return digest(ingredients)


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    if inputs is None:
        return "all images"
    digests = image_digests(workspace, inputs["images"]["blob"])
    missing = LatentSet(workspace, set_key(inputs, node.settings)).missing(digests)
    return f"{len(missing)} of {len(digests)} images"


def compute(task: Task) -> Outcome:
    """Quantize what the set lacks."""
    latents = LatentSet(task.workspace, set_key(task.inputs, task.node.settings))
    digests = image_digests(task.workspace, task.inputs["images"]["blob"])
    missing = latents.missing(digests)
    done, total = 0, len(missing)
    task.progress(done, total, "images")
    if missing:
        bits = max(1, math.ceil(math.log2(max(1, len(digests)) / IMAGES_PER_BUCKET)))
        codec, tables = task.inputs["codec"]["blob"], task.inputs["tables"]["blob"]
        items = [
            (task.workspace.root, latents.key, bucket, images, codec, tables, dict(task.node.settings))
            for bucket, images in buckets(missing, bits).items()
        ]
        for (_, _, _, images, *_), _ in task.cluster.map(quantize_bucket, items, task.share):
            done += len(images)
            task.progress(done, total, "images")
    return _outcome(latents, digests, total)


def quantize_bucket(
    root: str,
    key: str,
    bucket: str,
    digests: list[str],
    codec_blob: str,
    tables_blob: str,
    settings: Mapping[str, Any],
) -> int:
    """Runs in a worker: quantize the images of a bucket that are still missing, as one part."""
    from pipeline.codec.artifact import Codec
    from pipeline.coding import code
    from pipeline.quantizers import Tables

    workspace = Workspace.open(root)
    latents = LatentSet(workspace, key)
    codec = Codec.from_bytes(workspace.blobs.get(codec_blob))
    tables = Tables.from_bytes(workspace.blobs.get(tables_blob))
    store = ImageStore(workspace)
    images = []
    for name in latents.missing(digests):
        pixels = store.read(name)
        coded = code(codec, tables, pixels, refinement(settings))
        height, width, _ = pixels.shape
        images.append(
            PartImage(
                name,
                height,
                width,
                coded.indices,
                coded.hyper_indices,
                bits_y=coded.bits_y,
                bits_z=coded.bits_z,
                note={"squared_error": coded.squared_error},
            )
        )
    if images:
        latents.write_part(bucket, images)
    return len(images)


def refinement(settings: Mapping[str, Any]) -> Refinement | None:
    """The effort that a node's settings ask for."""
    from pipeline.refinement import Refinement

    return Refinement(settings["effort"], settings["lmbda"]) if "effort" in settings else None


def _outcome(latents: LatentSet, digests: list[str], computed: int) -> Outcome:
    known = latents.images()
    rows = [known[name][1] for name in digests]
    bits = sum(row["bits_y"] + row["bits_z"] for row in rows)
    pixels = sum(row["height"] * row["width"] for row in rows)
    samples = sum(math.prod(row["shape"]) for row in rows)
    mse = sum(row["note"]["squared_error"] for row in rows) / samples
    note = {
        "set": latents.key,
        "images": len(digests),
        "bpp": round(bits / pixels, 6),
        "latent_mse": round(mse, 8),
    }
    output = {"kind": "latents", "digest": latents.content_digest(digests), "note": note}
    return Outcome(
        {"latents": output}, {"images": len(digests), "quantized_now": computed, "bpp": note["bpp"]}
    )
