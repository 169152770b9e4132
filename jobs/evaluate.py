"""evaluate: codec × tables × images -> scores.

Reads   whole test images.
Key     digests of codec, tables and images; the metrics, and where the rate comes from.
Work    Ray tasks of a few images: quantize, decode, clip, round to 8 bits, measure.
Commits one JSON of scores, per image and averaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from jobs.local import image_digests
from jobs.stage import Node, Outcome, Output, Task
from storage.images import ImageStore
from storage.keys import canonical_json
from storage.workspace import Workspace

IMAGES_PER_TASK = 4
PSNR_OF_EQUAL_DB = 100.0  # stands for infinity, which no mean survives


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    return f"{inputs['images']['note']['count']} images" if inputs else "all images"


def compute(task: Task) -> Outcome:
    """Score one codec with one quantizer."""
    digests = image_digests(task.workspace, task.inputs["images"]["blob"])
    codec, tables = task.inputs["codec"]["blob"], task.inputs["tables"]["blob"]
    metrics = list(task.node.settings["metrics"])
    items = [
        (task.workspace.root, digests[i : i + IMAGES_PER_TASK], codec, tables, metrics)
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
        "rate": task.node.settings["rate"],
    }
    blob = task.workspace.blobs.put(canonical_json(scores), ".json")
    output = {"kind": "scores", "digest": blob, "blob": blob, "note": mean}
    return Outcome(
        {"scores": output}, {name: round(value, 6) for name, value in mean.items() if value is not None}
    )


def score_images(
    root: str, digests: list[str], codec_blob: str, tables_blob: str, metrics: list[str]
) -> list[Any]:
    """Runs in a worker."""
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables

    workspace = Workspace.open(root)
    codec = Codec.from_bytes(workspace.blobs.get(codec_blob))
    tables = Tables.from_bytes(workspace.blobs.get(tables_blob))
    store = ImageStore(workspace)
    return [{"image": name} | score(codec, tables, store.read(name), metrics) for name in digests]


def score(codec: Any, tables: Any, pixels: Any, metrics: list[str]) -> dict[str, Any]:
    """One image's bits, and the metrics of its 8-bit reconstruction; `indices` tells equal indices from others."""
    from pipeline.coding import code, decode_latent, synthesise
    from pipeline.metrics import ms_ssim, psnr_db

    height, width, _ = pixels.shape
    coded = code(codec, tables, pixels)
    decoded = synthesise(
        codec, decode_latent(codec, tables, coded.indices, coded.hyper_indices), height, width
    )
    measures: dict[str, tuple[str, Callable[[Any, Any], float | None]]] = {
        "psnr": ("psnr_db", lambda a, b: min(psnr_db(a, b), PSNR_OF_EQUAL_DB)),
        "ms_ssim": ("ms_ssim", ms_ssim),
    }
    bits = coded.bits_y + coded.bits_z
    content = hashlib.sha256(coded.indices.tobytes() + coded.hyper_indices.tobytes()).hexdigest()
    row = {
        "height": height,
        "width": width,
        "bits_y": coded.bits_y,
        "bits_z": coded.bits_z,
        "indices": content,
    }
    return (
        row
        | {"bpp": bits / (height * width)}
        | {measures[m][0]: measures[m][1](pixels, decoded) for m in metrics}
    )


def read_scores(workspace: Workspace, output: Output) -> dict[str, Any]:
    """A scores blob."""
    scores: dict[str, Any] = json.loads(workspace.blobs.get(output["blob"]))
    return scores


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean over images; None where an image has no value (MS-SSIM needs sides over 160 pixels)."""
    values = [row[name] for row in rows]
    return None if any(v is None for v in values) else sum(values) / len(values)
