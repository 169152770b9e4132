"""What stands above every benchmark's numbers, and how two things are timed against each other."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def machine(*packages: str) -> str:
    """Processor, number of cores this process may use, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    cores = len(os.sched_getaffinity(0))
    return ", ".join(
        [f"{model}, {platform.machine()}, {cores} core(s)", f"Python {platform.python_version()}", *versions]
    )


def alternately(works: Mapping[str, Callable[[], object]], runs: int) -> dict[str, np.ndarray]:
    """Seconds of each run of each work, taken in turn, so that whatever else the machine does meets all alike."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}
