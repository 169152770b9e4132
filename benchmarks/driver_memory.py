"""The driver's memory while a stage fans out over many images, and what it costs to know a large set.

    python benchmarks/driver_memory.py [IMAGES …]

The real `quantize` stage drives real Ray tasks over images that do not exist: a task writes parts of random latents of
one position in place of networks, and everything else is as it is. Default: 20,000 images, then 1,000,000 (half an hour
on 2 cores). The driver is a process of its own; its resident memory is looked at ten times a second. Also the number
of objects and requests, so that docs/scaling.md can count on.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from machine import machine

from jobs import quantize
from jobs.cluster import Cluster
from jobs.quantize import Part
from jobs.resources import QuantizeResources
from jobs.stage import Node, Task
from storage.claims import Claims
from storage.keys import canonical_json
from storage.latents import LatentSet
from storage.parts import PartImage
from storage.workspace import Workspace

MIB = 2**20


def fake_part(
    root: str, key: str, part: Part, codec_blob: str, tables_blob: str, settings: Mapping[str, Any]
) -> bool:
    """Runs in a worker: what `quantize_part` does, without pixels and networks."""
    workspace = Workspace.open(root)
    latents = LatentSet(workspace, key)
    with Claims(workspace, f"claims/{key}").hold(part.prefix) as held:
        if held and (missing := latents.missing(part.images, part.prefix)):
            latents.write_part(part.prefix, [_image(name) for name in missing])
    return held


def _image(name: str) -> PartImage:
    values = np.frombuffer(bytes.fromhex(name), np.int8)
    return PartImage(name, 16, 16, values.reshape(32, 1, 1), values[:4].reshape(4, 1, 1), 100.0, 10.0, 1.0)


def drive(root: str, images: str, count: int) -> None:
    """The driver: quantize these images, then look at the finished set once more, as the next run does."""
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=watch, daemon=True).start()
    workspace, cluster = Workspace.open(root), Cluster()
    task = the_task(workspace, cluster, images)
    start = resident()
    clock = time.monotonic()
    with patch.object(quantize, "quantize_part", fake_part):
        outcome = quantize.compute(task)
    seconds = time.monotonic() - clock
    cluster.stop()
    clock = time.monotonic()
    again = LatentSet(workspace, outcome.outputs["latents"]["note"]["set"])
    assert len(again.images()) == count
    known = time.monotonic() - clock
    done.set()
    parts = len(again.part_names())
    print(
        f"{count:>9,} images, {parts:>6,} parts: driver at most {peak[0] / MIB:.0f} MiB ({start / MIB:.0f} before the "
        f"first task), {seconds:.0f} s; a new process knows the set in {known:.1f} s",
        flush=True,
    )


def manifest(workspace: Workspace, count: int) -> str:
    """A list of images as `ingest` leaves it."""
    names = sorted(hashlib.sha256(b"%d" % number).hexdigest() for number in range(count))
    rows = [
        {"digest": name, "height": 16, "source": f"/images/{name[:8]}.png", "width": 16} for name in names
    ]
    return workspace.blobs.put(canonical_json({"images": rows, "skipped": []}), ".json")


def the_task(workspace: Workspace, cluster: Cluster, images: str) -> Task:
    inputs: dict[str, Any] = {
        "images": {"kind": "images", "digest": "i", "blob": images, "note": {}},
        "codec": {"kind": "codec", "digest": "c", "blob": "c", "note": {"grid": "g", "rate": "r"}},
        "tables": {"kind": "tables", "digest": "t", "blob": "t", "note": {}},
    }
    return Task(
        node=Node("quantize", {}, {}),
        key="k",
        inputs=inputs,
        workspace=workspace,
        cluster=cluster,
        resources=QuantizeResources(),
        attempt="a",
        progress=lambda done, total, what: None,
        say=print,
    )


def resident() -> int:
    """Resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main(counts: list[int]) -> None:
    print(machine("ray", "numpy", "obstore"), flush=True)
    for count in counts or [20_000, 1_000_000]:
        with tempfile.TemporaryDirectory() as root:
            images = manifest(Workspace.open(root), count)
            subprocess.run([sys.executable, __file__, "--drive", root, images, str(count)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main([int(count) for count in sys.argv[1:]])
