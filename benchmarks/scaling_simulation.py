"""100 million images on 1000 nodes of 16 cores, simulated: what the store is asked, and who is the bottleneck.

    python benchmarks/scaling_simulation.py [--small]

First, one real task of `quantize` (claims, records, a part) on a set that is half full while every core is at work: all
its records and claims lie in a store in memory, which counts requests as S3 would bill them, listings by pages of 1000
names. To these comes one GET for each image, a range of a shard; what a worker reads once (codec, tables, its index of
images) is left out. Then the whole run, event by event: a driver hands tasks out, each takes as long as its images need
at this machine's speed (benchmarks/quantize_scaling.txt), and asks what that one asked. `--small`: a thousandth of it.
"""

from __future__ import annotations

import hashlib
import heapq
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import obstore
from machine import machine
from obstore.store import MemoryStore

from jobs.quantize import IMAGES_PER_BUCKET, MOST_BITS
from storage import objects
from storage.buckets import binary, shelf
from storage.claims import BEAT_EVERY_S, Claims
from storage.keys import canonical_json
from storage.latents import LatentSet
from storage.parts import PartImage
from storage.workspace import Workspace

IMAGES, CORES = 100_000_000, 16_000
HEIGHT, WIDTH = 512, 768
PIXELS_A_S = 12.0 * 154_000  # of one core, benchmarks/quantize_scaling.txt
DRIVER_TASKS_A_S = (
    4000.0  # that it submits and takes back: Ray on this machine, submission alone 8,000 to 15,000
)
PAGE = 1000  # names a listing
KEY = "0" * 64


class Counted:
    """obstore, with requests counted by kind."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        function: Callable[..., Any] = getattr(obstore, name)

        def counted(*args: Any, **options: Any) -> Any:
            kind = {"put": "PUT", "get": "GET", "get_range": "GET", "head": "GET", "delete": "DELETE"}.get(
                name
            )
            if kind:
                self.requests[kind] += 1
            if name == "list":
                found = [list(chunk) for chunk in function(*args, **options)]
                self.requests["LIST"] += max(1, -(-sum(map(len, found)) // PAGE))
                return found
            return function(*args, **options)

        return counted


@contextmanager
def store_in_memory() -> Iterator[tuple[Workspace, Counted]]:
    store, counted = MemoryStore(), Counted()
    with (
        patch.object(objects, "open_bucket", lambda root, patient: store),
        patch.object(objects, "obstore", counted),
    ):
        yield Workspace.open("s3://simulated/workspace"), counted


def one_task(parts: int, cores: int, images: int) -> Counter[str]:
    """What a task of so many images asks where half of `parts` are recorded and all cores hold claims."""
    bits = int(np.log2(parts))
    with store_in_memory() as (workspace, counted):
        latents = LatentSet(workspace, KEY)
        record = canonical_json({"images": [], "part": "p", "objects": []})
        for number in range(0, parts, 2):
            name = latents.record_name(f"{number:0{bits}b}-{number:016x}.0")
            workspace.put(f"records/{name}.json", record)
        held = canonical_json({"host": "h", "machine": "m", "pid": 1})
        for number in range(1, 2 * cores, 2):
            prefix = f"{number:0{bits}b}"
            workspace.put(f"claims/{KEY}/{shelf(prefix)}/{bits}-{prefix}.0", held)
        mine = "1" * bits
        names = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(images)]
        names = [f"{int(mine.ljust(32, '1'), 2):08x}{name[8:]}" for name in names]
        counted.requests.clear()
        with Claims(workspace, f"claims/{KEY}").hold(mine) as is_mine:
            assert is_mine
            missing = latents.missing(names, mine)
            assert all(binary(name, bits) == mine for name in missing)
            latents.write_part(mine, [image(name) for name in missing])
    return counted.requests + Counter(GET=images)


def image(name: str) -> PartImage:
    """Of 0.4 megapixels, as many of its indices other than 0 as at half a bit a pixel."""
    generator = np.random.default_rng(int(name[:8], 16))
    indices = np.rint(generator.laplace(0, 0.45, (96, HEIGHT // 16, WIDTH // 16))).astype(np.int8)
    return PartImage(name, HEIGHT, WIDTH, indices, indices[:64, :8, :12], 1.0, 1.0, 1.0)


def whole_run(parts: int, cores: int, images: float, requests: Counter[str]) -> Iterator[str]:
    """The run as events: how long, how many at once, and what the store is asked in its busiest second."""
    generator = np.random.default_rng(0)
    sizes = generator.poisson(images, parts)
    seconds = sizes * HEIGHT * WIDTH / PIXELS_A_S * generator.lognormal(0, 0.1, parts)
    ends: list[float] = []
    starts, clock, busiest = np.empty(parts), 0.0, 0
    for number in range(parts):
        clock += 1 / DRIVER_TASKS_A_S
        if len(ends) == cores:
            clock = max(clock, heapq.heappop(ends))
        while ends and ends[0] <= clock:
            heapq.heappop(ends)
        starts[number] = clock
        heapq.heappush(ends, clock + seconds[number])
        busiest = max(busiest, len(ends))
    end = max(ends)
    asked = np.histogram(starts, int(end) + 1)[0].max()
    busy = seconds.sum() / cores / end
    yield f"  {sizes.max()} images in the largest part; a task takes {seconds.mean():.0f} s"
    yield f"  {end / 60:.1f} minutes, {busiest:,} of {cores:,} cores at once, {busy:.3f} of them busy on average"
    yield f"  tasks that begin in one second: {asked:,} at most, {parts / end:,.0f} on average"
    for kind, count in sorted(requests.items()):
        beats = busiest / BEAT_EVERY_S if kind == "PUT" else 0
        total, rate = count * parts + beats * end, count * parts / end + beats
        yield f"  {kind:6} {count:3} a task, {total:14,.0f} in all, {rate:8,.0f} a second"


def main(small: bool) -> None:
    print(machine("numpy", "obstore"), flush=True)
    scale = 1000 if small else 1
    total, cores = IMAGES // scale, CORES // scale
    bits = min(int(np.ceil(np.log2(total / IMAGES_PER_BUCKET))), MOST_BITS)
    parts = 2**bits
    clock = time.monotonic()
    requests = one_task(parts, min(cores, parts // 2), total // parts)
    print(
        f"{total:,} images of {HEIGHT * WIDTH / 1e6:.2f} megapixels in {parts:,} parts of {total / parts:.0f}"
    )
    for line in whole_run(parts, cores, total / parts, requests):
        print(line)
    print(f"simulated in {time.monotonic() - clock:.0f} s")


if __name__ == "__main__":
    main("--small" in sys.argv)
