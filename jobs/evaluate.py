"""evaluate: codec × tables × images -> scores.

Reads   whole test images.
Key     digests of codec, tables and images; the metrics, and where the rate comes from.
Work    Ray tasks of a few images: quantize, write a file, read it, clip, round to 8 bits, measure.
Commits one JSON of scores, per image and averaged.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs.loaded import loaded_codec, loaded_images, loaded_tables
from jobs.local import image_digests
from jobs.quantize import refinement
from jobs.stage import Node, Outcome, Output, Task
from storage.keys import canonical_json
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.bitstream import DecodedIndices, ImageCoder
    from pipeline.coding import CodedImage
    from pipeline.refinement import Refinement

IMAGES_PER_TASK = 4
PSNR_OF_EQUAL_DB = 100.0  # stands for infinity, which no mean survives


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    return f"{inputs['images']['note']['count']} images" if inputs else "all images"


def compute(task: Task) -> Outcome:
    """Score one codec with one quantizer."""
    digests = image_digests(task.workspace, task.inputs["images"]["blob"])
    codec, tables = task.inputs["codec"]["blob"], task.inputs["tables"]["blob"]
    settings = dict(task.node.settings)
    items = [
        (task.workspace.root, digests[i : i + IMAGES_PER_TASK], codec, tables, settings)
        for i in range(0, len(digests), IMAGES_PER_TASK)
    ]
    task.progress(0, len(digests), "images")
    rows: list[dict[str, Any]] = []
    for _, scored in task.cluster.map(score_images, items, task.share):
        rows += scored
        task.progress(len(rows), len(digests), "images")
    rows.sort(key=lambda row: row["image"])
    mean = {name: _mean(rows, name) for name in ("bpp", "psnr_db", "ms_ssim") if name in rows[0]}
    scores = {
        "images": rows,
        "mean": mean,
        "codec": codec,
        "tables": tables,
        "rate": settings["rate"],
        "encoder": {name: settings[name] for name in ("effort", "lmbda") if name in settings},
    }
    blob = task.workspace.blobs.put(canonical_json(scores), ".json")
    output = {"kind": "scores", "digest": blob, "blob": blob, "note": mean}
    return Outcome(
        {"scores": output}, {name: round(value, 6) for name, value in mean.items() if value is not None}
    )


def score_images(
    root: str, digests: list[str], codec_blob: str, tables_blob: str, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Runs in a worker."""
    from pipeline.bitstream import ImageCoder

    codec, tables = loaded_codec(root, codec_blob), loaded_tables(root, tables_blob)
    coder = ImageCoder(codec, tables, max_pixels=sys.maxsize)  # whatever was ingested is evaluated
    store = loaded_images(root)
    metrics, to_file, effort = settings["metrics"], settings["rate"] == "bitstream", refinement(settings)
    return [{"image": name} | score(coder, store.read(name), metrics, to_file, effort) for name in digests]


def score(
    coder: ImageCoder, pixels: Any, metrics: list[str], to_file: bool, effort: Refinement | None = None
) -> dict[str, Any]:
    """One image's bits, and the metrics of its 8-bit reconstruction; `indices` tells equal indices from others.

    Args:
        to_file: write the file, take its size for the rate, and decode it; else the ideal code lengths are the rate.
    """
    from pipeline.coding import code, decode_latent, synthesise
    from pipeline.metrics import ms_ssim, psnr_db

    height, width, _ = pixels.shape
    coded = code(coder.codec, coder.tables, pixels, effort)
    row: dict[str, Any] = {"height": height, "width": width, "bits_y": coded.bits_y, "bits_z": coded.bits_z}
    row["channel_bits"] = coded.channel_bits.round(1).tolist()
    bits = coded.bits_y + coded.bits_z
    if to_file:
        data = coder.encode_indices(coded, height, width)
        found = coder.decode_indices(data)
        check_decoded(coded, found)
        row["bytes"], bits, latent = len(data), 8 * len(data), found.latent
    else:
        latent = decode_latent(coder.codec, coder.tables, coded.indices, coded.hyper_indices)
    decoded = synthesise(coder.codec, latent, height, width)
    measures: dict[str, tuple[str, Callable[[Any, Any], float | None]]] = {
        "psnr": ("psnr_db", lambda a, b: min(psnr_db(a, b), PSNR_OF_EQUAL_DB)),
        "ms_ssim": ("ms_ssim", ms_ssim),
    }
    content = hashlib.sha256(coded.indices.tobytes() + coded.hyper_indices.tobytes()).hexdigest()
    return (
        row
        | {"indices": content, "bpp": bits / (height * width)}
        | {measures[m][0]: measures[m][1](pixels, decoded) for m in metrics}
    )


def check_decoded(coded: CodedImage, found: DecodedIndices) -> None:
    """Raise RuntimeError unless a file holds what was written to it: no score may come from another picture."""
    pairs: dict[str, Any] = {
        "indices": coded.indices,
        "hyper_indices": coded.hyper_indices,
        "latent": coded.latent,
    }
    for name, written in pairs.items():
        if (differing := int((written != getattr(found, name)).sum())) > 0:
            raise RuntimeError(
                f"expected the decoded file's {name} to be the encoder's, found {differing} of {written.size} others; "
                "the coder is at fault: please report it, and use `rate: tables` until then"
            )


def read_scores(workspace: Workspace, output: Output) -> dict[str, Any]:
    """A scores blob."""
    scores: dict[str, Any] = json.loads(workspace.blobs.get(output["blob"]))
    return scores


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean over images; None where an image has no value (MS-SSIM needs sides over 160 pixels)."""
    values = [row[name] for row in rows]
    return None if any(v is None for v in values) else sum(values) / len(values)
