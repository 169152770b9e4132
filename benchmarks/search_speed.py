"""How fast the trellis search is: beside nncodec's, beside its own forward pass, by states, on two threads; its memory.

    python benchmarks/search_speed.py CHECKPOINT FOLDER [RUNS [IMAGES]]      # in the environment of benchmarks/peers.py

Everything on one core but the comparison of threads with processes; medians of runs taken in turn. The realistic
data are residuals and σ indices of a folder's images through a codec, image after image.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import alternately, machine
from peers import nncodec_tcq

from jobs.import_codec import read_codec
from pipeline.coding import analyse
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import Tables, design, quantize, settings
from pipeline.quantizers.kernels import plain
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.search_kernels import search_forward, search_lanes
from pipeline.quantizers.tables import Settings
from pipeline.quantizers.tcq import search, search_arguments
from pipeline.quantizers.trellis import TRELLISES
from pipeline.sigma import sigma_levels

REPETITIONS = 6  # of a thread's or process's share, so that starting it does not count
UNIT_STEP = 0  # nncodec's parameter for a step of 1
Data = tuple[np.ndarray, np.ndarray]  # residuals float32 [C, T], σ indices uint8 [C, T]


def photographs(checkpoint: str, folder: str, images: int) -> Data:
    """Residuals and σ indices of some images, one after another along T."""
    codec = read_codec(Path(checkpoint).read_bytes())
    files = sorted(Path(folder).iterdir())
    analysed = [
        analyse(codec, canonical_pixels(path.read_bytes()))
        for path in files[:: max(1, len(files) // images)][:images]
    ]
    residuals = [(a.latent - a.means).reshape(len(a.latent), -1) for a in analysed]
    levels = [a.sigma_index.reshape(len(a.latent), -1) for a in analysed]
    return plain(np.concatenate(residuals, 1)), plain(np.concatenate(levels, 1))


def prepared(kernel: Callable[..., Any], data: Data, tables: Tables) -> Callable[[], object]:
    """A compiled function alone, on what `tcq.search` would give it."""
    arguments, indices = search_arguments(tables, data[0].shape), np.empty(data[0].shape, np.int32)
    last = () if kernel is search_forward else (indices,)
    return lambda: kernel(*data, *arguments, *last)


def in_turn(works: list[Callable[[], object]]) -> Callable[[], object]:
    """One work of several."""
    return lambda: [work() for work in works]


def million_a_second(samples: int, seconds: np.ndarray) -> float:
    return float(samples / np.median(seconds) / 1e6)


def beside_nncodec(runs: int, samples: int) -> None:
    """Distortion only: 8 states, one σ, no rate; the same samples, a step of 1."""
    level = int(np.searchsorted(sigma_levels(), 5.0))
    generator = np.random.default_rng(0)
    residual = (generator.normal(size=(128, samples // 128)) * sigma_levels()[level]).astype(np.float32)
    data = residual, np.full(residual.shape, level, np.uint8)
    tables = midpoint_tables(Settings("tcq", "vvc8", step=1.0, lmbda_q=0.0))
    theirs, step = nncodec_tcq(residual.ravel(), UNIT_STEP)
    errors = [
        np.square(reconstruction.astype(np.float64) - residual.ravel()).mean()
        for reconstruction in (quantize(*data, tables).reconstruction.ravel(), theirs * step)
    ]
    seconds = alternately(
        {
            "ours": lambda: search(*data, tables),
            "nncodec": lambda: nncodec_tcq(residual.ravel(), UNIT_STEP),
        },
        runs,
    )
    ours, other = (million_a_second(residual.size, seconds[name]) for name in ("ours", "nncodec"))
    print(f"Distortion only, 8 states, {residual.size:,} Gaussian samples, traceback included, one core")
    print(f"  ours           {ours:7.1f} M samples/s   MSE/Δ² {errors[0]:.6f}")
    print(
        f"  nncodec 2.1.3  {other:7.1f} M samples/s   MSE/Δ² {errors[1]:.6f} ({errors[0] / errors[1] - 1:+.4%})"
    )
    print(f"  ratio          {np.median(seconds['nncodec'] / seconds['ours']):7.2f}\n")


def beside_forward_pass(runs: int, data: Data, tables: Tables, images: int) -> None:
    """With tables: the exact search, its compiled part, its forward pass alone; memory."""
    parts = [
        (plain(r), plain(s))
        for r, s in zip(np.split(data[0], images, 1), np.split(data[1], images, 1), strict=True)
    ]
    print(f"With tables, exact search, 8 states, {data[0].size:,} latents, one core")
    for name, calls in (("an image a call", parts), ("all images in one call", [data])):
        seconds = alternately(
            {
                "search, its room and result allocated": in_turn(
                    [partial(search, *p, tables) for p in calls]
                ),
                "compiled search, traceback included": in_turn(
                    [prepared(search_lanes, p, tables) for p in calls]
                ),
                "forward pass alone": in_turn([prepared(search_forward, p, tables) for p in calls]),
            },
            runs,
        )
        print(f"  {name}")
        for work, times in seconds.items():
            print(f"    {work:38} {million_a_second(data[0].size, times):7.1f} M samples/s")
        whole, forward = seconds["compiled search, traceback included"], seconds["forward pass alone"]
        print(f"    search / forward pass                  {np.median(forward / whole):7.2f}")
    tracemalloc.start()
    indices = search(*data, tables)
    peak = tracemalloc.get_traced_memory()[1] - indices.nbytes
    tracemalloc.stop()
    kept = sum(array.nbytes for array in search_arguments(tables, data[0].shape)[-1])
    print(
        f"  memory beside input and output           {kept / data[0].size:7.2f} bytes a sample "
        f"({peak / data[0].size:.2f} with everything Python saw)\n"
    )


def by_states(runs: int, data: Data) -> None:
    """Every trellis, midpoint tables: a fixed part (what each branch costs), and one that grows with the states."""
    kernels = {
        name: prepared(search_lanes, data, midpoint_tables(settings("tcq", trellis=name)))
        for name in TRELLISES
    }
    seconds = alternately(kernels, runs)
    states = np.array([TRELLISES[name].states for name in seconds])
    each = np.array([1e9 * np.median(times) / data[0].size for times in seconds.values()])
    many = states >= 16
    # the line of least relative error through 16 … 256 states
    lines = np.stack([np.ones(many.sum()), states[many]], 1) / each[many, None]
    (base, slope), *_ = np.linalg.lstsq(lines, np.ones(many.sum()), rcond=None)
    print(
        f"By states, with tables, {data[0].size:,} latents, one core; line: {base:.1f} + {slope:.3f} · states ns"
    )
    print(
        f"  {'trellis':14} {'M samples/s':>11} {'ns a sample':>12} {'ns a state':>11} {'against the line':>17}"
    )
    for name, count, time in zip(seconds, states, each, strict=True):
        deviation = f"{time / (base + slope * count) - 1:+17.1%}" if count >= 16 else ""
        print(f"  {name:14} {1e3 / time:11.2f} {time:12.2f} {time / count:11.3f} {deviation}")
    by_state = settings("tcq", context="state")
    work = prepared(search_lanes, data, midpoint_tables(by_state))
    time = 1e9 * np.median(alternately({"": work}, runs)[""]) / data[0].size
    print(
        f"  {by_state.trellis}, tables by state, 16 branches a level in place of 4: {time:.2f} ns a sample\n"
    )


_work: Callable[[], object]


def _load(data: Data, blob: bytes) -> None:
    """Prepare a process: compiled, warm."""
    global _work  # noqa: PLW0603
    _work = prepared(search_lanes, data, Tables.from_bytes(blob))
    _work()


def _repeat() -> None:
    for _ in range(REPETITIONS):
        _work()


def threads_and_processes(runs: int, data: Data, tables: Tables) -> None:
    """Two threads of one process, each on its own arrays, against two processes with a copy of everything."""
    own = [prepared(search_lanes, (data[0].copy(), data[1].copy()), tables) for _ in range(2)]

    def repeat(work: Callable[[], object]) -> None:
        for _ in range(REPETITIONS):
            work()

    def both(executor: Executor, calls: list[tuple[Any, ...]]) -> None:
        for future in [executor.submit(*call) for call in calls]:
            future.result()

    context = multiprocessing.get_context("spawn")
    blob = tables.to_bytes()
    with (
        ThreadPoolExecutor(2) as threads,
        ProcessPoolExecutor(2, context, _load, (data, blob)) as processes,
    ):
        seconds = alternately(
            {
                "two threads": lambda: both(threads, [(repeat, work) for work in own]),
                "two processes": lambda: both(processes, [(_repeat,), (_repeat,)]),
                "one thread": lambda: repeat(own[0]),
            },
            runs,
        )
    print("Two cores")
    for name, times in seconds.items():
        shares = REPETITIONS * (1 if name == "one thread" else 2)
        print(f"  {name:14} {million_a_second(shares * data[0].size, times):7.1f} M samples/s")
    print(f"  threads / processes {np.median(seconds['two processes'] / seconds['two threads']):7.3f}")


def main(checkpoint: str, folder: str, runs: int = 7, images: int = 12) -> None:
    cores = os.sched_getaffinity(0)
    print(machine("numpy", "numba"))
    print(
        f"{Path(checkpoint).name}, {images} images of {Path(folder).name}; medians of {runs} runs in turn\n",
        flush=True,
    )
    data = photographs(checkpoint, folder, images)
    os.sched_setaffinity(0, {min(cores)})
    beside_nncodec(runs, 128 * 1024 * images)
    tables = design(settings("tcq"))
    beside_forward_pass(runs, data, tables, images)
    quarter = plain(data[0][:, : data[0].shape[1] // 4]), plain(data[1][:, : data[0].shape[1] // 4])
    by_states(runs, quarter)
    os.sched_setaffinity(0, cores)
    threads_and_processes(runs, data, tables)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]))
