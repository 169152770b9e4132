"""A training on two workers of one thread each, beside one task: the same curve, and images a second.

    python benchmarks/data_parallel.py FOLDER [ROUNDS] > benchmarks/data_parallel.txt

Curves: a small network for STEPS steps on a folder's images, in float32, by one worker and by two, the same global
batch. Speed: N = 64, M = 96, 8 crops of 256 px a step, uncompiled, by one task of two threads and by two workers of
one thread, in turn; the seconds of processors are those of both, and what else the machine does enters them little.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from jobs.cluster import Cluster
from jobs.shares import Share
from pipeline.pixels import Pixels, canonical_pixels
from pipeline.training.base import BaseSettings, BaseTraining
from pipeline.training.group import Group

STEPS, IMAGES, WARMUP, TIMED = 100, 32, 2, 10
SHARES = {
    "one task, 1 thread": Share(num_cpus=1),
    "one task, 2 threads": Share(num_cpus=2),
    "2 workers, 1 thread each": Share(num_cpus=1, workers=2),
}


def curve(folder: str) -> Iterator[float]:
    """The loss of each step of a small training."""
    settings = BaseSettings(
        16, 24, 0.013, STEPS, 8, 128, 1e-3, 20, 1.0, "float32", 0, "adam", "transform", 0.3
    )
    training = BaseTraining(settings, read(folder), group=Group.of_process())
    for _ in range(STEPS):
        yield training.advance()["loss"]


def speed(folder: str) -> Iterator[dict[str, float]]:
    """Images a second, and seconds of processors an image."""
    group = Group.of_process()
    settings = BaseSettings(64, 96, 0.013, 1000, 8, 256, 1e-4, 10, 1.0, "auto", 0)
    training = BaseTraining(settings, read(folder), group=group)
    for _ in range(WARMUP):
        training.advance()
    start, spent = time.perf_counter(), time.process_time()
    for _ in range(TIMED):
        training.advance()
    seconds = time.perf_counter() - start
    cpu_s = torch.tensor([time.process_time() - spent])
    group.average([cpu_s])
    count = TIMED * settings.batch
    yield {"images_per_s": count / seconds, "cpu_s": float(cpu_s) * group.size / count}


def read(folder: str) -> list[Pixels]:
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jpg", ".png"))
    return [canonical_pixels(path.read_bytes()) for path in files[:IMAGES]]


def show_curves(cluster: Cluster, folder: str) -> None:
    names = ["one task, 1 thread", "2 workers, 1 thread each"]
    one, two = (np.array(list(cluster.stream(curve, (folder,), SHARES[name]))) for name in names)
    print("loss at a step, N = 16, M = 24, 8 crops of 128 px\n\n  step   1 worker   2 workers   difference")
    for step in sorted({1, *range(10, STEPS + 1, 10)}):
        a, b = one[step - 1], two[step - 1]
        print(f"  {step:4} {a:10.6f} {b:11.6f} {abs(a - b) / a:12.1e}")
    print(f"\n  largest difference of all {STEPS} steps: {np.max(np.abs(one - two) / one):.1e} of the loss\n")


def show_speeds(cluster: Cluster, folder: str, rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SHARES}
    for _ in range(rounds):
        for name, share in SHARES.items():
            found[name] += cluster.stream(speed, (folder,), share)
    print(f"N = 64, M = 96, 8 crops of 256 px a step: median of {rounds} round(s) in turn\n")
    print(f"  {'':26} images/s   processor ms an image")
    medians: dict[str, Any] = {
        name: {key: float(np.median([r[key] for r in results])) for key in results[0]}
        for name, results in found.items()
    }
    for name, numbers in medians.items():
        print(f"  {name:26} {numbers['images_per_s']:8.1f} {1000 * numbers['cpu_s']:15.1f}")
    task, workers = medians["one task, 2 threads"], medians["2 workers, 1 thread each"]
    rate, cost = (workers[key] / task[key] for key in ("images_per_s", "cpu_s"))
    print(
        f"\n  2 workers over a task of 2 threads: images a second × {rate:.2f}, processor time × {cost:.2f}"
    )


def main(folder: str, rounds: str = "3") -> None:
    cluster = Cluster("local")
    try:
        print(machine("torch", "ray") + "\n")
        show_curves(cluster, folder)
        show_speeds(cluster, folder, int(rounds))
    finally:
        cluster.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
