"""What Ray and the store cost `quantize`: the whole stage against the bare kernel, on one core and on two, in one run.

    python benchmarks/quantize_scaling.py IMAGES [COUNT]

The kernel is a loop over `pipeline.coding.code`, the codec of quality 3 with its VVC-8 tables, one thread, in one
process or in two that run side by side; it reads each image from the store. The stage is `jobs.quantize.compute`: it
plans, claims, reads images, quantizes, writes parts with their records, and sums up; its workers are warm. COUNT (384)
images, in parts of some 24. Three times each, in turn.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from jobs import quantize
from jobs.cluster import Cluster, set_threads
from jobs.local import image_digests
from jobs.resources import QuantizeResources
from jobs.shares import Share
from jobs.stage import Node, Task
from pipeline.bitstream.codec_file import split
from pipeline.codec.artifact import Codec
from pipeline.coding import code
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import Tables
from pipeline.shipped import codec_file
from storage.images import ImageStore, Pixels, Source, pixel_digest
from storage.keys import canonical_json
from storage.workspace import Workspace

RUNS = 3
SUFFIXES = (".png", ".jpg")


def images(folder: str, count: int) -> list[Pixels]:
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in SUFFIXES)[:count]
    return [canonical_pixels(file.read_bytes(), 1.0, 2**27) for file in files]


def stage(
    workspace: Workspace, blobs: tuple[str, str], manifest: str, cluster: Cluster, workers: int
) -> float:
    """Seconds of the whole stage with so many tasks at once, of one core each."""
    workspace.delete("latents")
    workspace.delete("records/latents")
    inputs: dict[str, Any] = {
        "images": {"kind": "images", "digest": "i", "blob": manifest, "note": {}},
        "codec": {"kind": "codec", "digest": "c", "blob": blobs[0], "note": {"grid": "g", "rate": "r"}},
        "tables": {"kind": "tables", "digest": "t", "blob": blobs[1], "note": {}},
    }
    resources = QuantizeResources(in_flight=64 if workers > 1 else 1)
    list(cluster.map(warm, [(workspace.root, blobs, manifest)] * 2, Share(1)))
    quiet = {"progress": lambda done, total, what: None, "say": print}
    task = Task(Node("quantize", {}, {}), "k", inputs, workspace, cluster, resources, "a", **quiet)
    start = time.perf_counter()
    quantize.compute(task)
    return time.perf_counter() - start


def warm(root: str, blobs: tuple[str, str], manifest: str) -> None:
    """Runs in a worker: all that its first task would have to load. Ray ends workers that are idle for a second."""
    quantize._codec(root, blobs[0])
    quantize._tables(root, blobs[1])
    quantize._images(root).index()
    kernel(image_digests(Workspace(root), manifest)[:1], root, blobs)
    time.sleep(1)  # so that the second task goes to the other worker


def side_by_side(
    halves: list[list[str]], root: str, blobs: tuple[str, str], pool: ProcessPoolExecutor
) -> float:
    """Seconds of the slower of two kernels."""
    return max(pool.map(kernel, halves, [root] * 2, [blobs] * 2))


def kernel(names: list[str], root: str, blobs: tuple[str, str]) -> float:
    """Seconds of the bare kernel over these images, in a process of one thread."""
    set_threads(1)
    workspace = Workspace(root)
    codec, tables = (
        Codec.from_bytes(workspace.blobs.get(blobs[0])),
        Tables.from_bytes(workspace.blobs.get(blobs[1])),
    )
    store = ImageStore(workspace)
    code(codec, tables, store.read(names[0]), None)
    start = time.perf_counter()
    for name in names:
        code(codec, tables, store.read(name), None)
    return time.perf_counter() - start


def main(folder: str, count: int = 384) -> None:
    print(machine("torch", "ray", "zarr"), flush=True)
    with tempfile.TemporaryDirectory() as root:
        workspace = Workspace.open(root)
        pixels = images(folder, count)
        codec, tables = split(codec_file(3))
        blobs = (workspace.blobs.put(codec.to_bytes(), ""), workspace.blobs.put(tables.to_bytes(), ""))
        manifest = ingested(workspace, pixels)
        names = image_digests(workspace, manifest)
        context, cluster = multiprocessing.get_context("spawn"), Cluster()
        found: dict[str, list[float]] = {}
        with ProcessPoolExecutor(2, context) as pool:
            works = {
                "kernel, one process": lambda: pool.submit(kernel, names, root, blobs).result(),
                "stage, one worker": lambda: stage(workspace, blobs, manifest, cluster, 1),
                "kernel, two processes": lambda: side_by_side([names[::2], names[1::2]], root, blobs, pool),
                "stage, two workers": lambda: stage(workspace, blobs, manifest, cluster, 2),
            }
            for run in range(RUNS + 1):  # the first one warms
                for name, work in works.items():
                    seconds = work()
                    if run:
                        found.setdefault(name, []).append(len(names) / seconds)
        cluster.stop()
    rates = {name: float(np.median(values)) for name, values in found.items()}
    print(
        f"{len(pixels)} images of {sum(p.shape[0] * p.shape[1] for p in pixels) / len(pixels) / 1e6:.3f} megapixels"
    )
    for name, values in found.items():
        print(f"{name:28}{rates[name]:7.2f} images/s   ({', '.join(f'{value:.2f}' for value in values)})")
    print(
        f"stage over kernel: {ratio(rates, 'one worker', 'one process'):.3f} on one core, "
        f"{ratio(rates, 'two workers', 'two processes'):.3f} on two"
    )


def ratio(rates: dict[str, float], of_stage: str, of_kernel: str) -> float:
    return rates[f"stage, {of_stage}"] / rates[f"kernel, {of_kernel}"]


def ingested(workspace: Workspace, pixels: list[Pixels]) -> str:
    """The list of these images, stored, as `ingest` leaves it."""
    named = {pixel_digest(image): image for image in pixels}
    sources = [Source(f"{name}.png", 0, 0, {}, name) for name in named]
    ImageStore(workspace).write_shard(named, sources)
    rows = [
        {"digest": name, "height": i.shape[0], "width": i.shape[1], "source": ""}
        for name, i in sorted(named.items())
    ]
    return workspace.blobs.put(canonical_json({"images": rows, "skipped": []}), ".json")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
