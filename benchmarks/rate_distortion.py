"""How near to D(R) quantizers come: memoryless sources, rates and trellises.

    python benchmarks/rate_distortion.py [FOLDER]

Writes rate_distortion.csv and .txt into FOLDER (this one if none is given). `docs/pictures/rates.py` draws the figure.

Tables are designed at Δ = 1 for 64 standard deviations at once, so that one design is a curve from low rate to high.
One set of new samples chooses λ_q/Δ² for each rate, another one measures. Between the two rates next to the wanted one
D is interpolated linearly, as sharing the time between them has it; the table of the .csv says how far apart they are.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import machine

from pipeline.quantizers import QUANTIZERS, Settings, Tables, quantize
from pipeline.quantizers.lloyd import design_tables
from pipeline.quantizers.trellis import TRELLISES
from pipeline.sigma import SIGMA_LEVELS
from pipeline.sources import SOURCES, Source, distortion_at_rate

RATES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
SAMPLES = 200_000
CHOOSING, MEASURING = 1, 2
"""Seeds of samples that no design has seen."""
SLOPES = {"rdoq": (0.09, 0.12), "tcq": (0.3, 0.4)}
"""λ_q/Δ². At high rate −dD/dR is 2 ln 2 · Δ²/12 of a scalar quantizer, and some three times that of a trellis."""


class Case(NamedTuple):
    """A row of the table."""

    name: str
    kind: str
    trellis: str | None = None
    context: str = "quantizer"
    centroids: bool = True


class Curve(NamedTuple):
    """One design, measured at every σ."""

    slope: float
    bits: np.ndarray
    """A sample, [L]."""
    distortion: np.ndarray
    """Over σ², [L]."""
    step: np.ndarray
    """Δ/σ, [L]."""


CASES = [
    Case("scalar (ECSQ)", "rdoq"),
    *(Case(name, "tcq", name) for name in TRELLISES),
    *(Case(f"{name}, tables by state", "tcq", name, "state") for name in ("vvc4", "vvc8")),
    Case("vvc8, plain levels", "tcq", "vvc8", centroids=False),
]


def sigmas(slope: float) -> np.ndarray:
    """Standard deviations whose rates, at a slope over Δ² and Δ = 1, span those of the table."""
    return math.sqrt(slope / (2 * math.log(2))) * np.geomspace(0.7, 2.0**4.5, SIGMA_LEVELS)


def measured(tables: Tables, source: Source, wanted: np.ndarray, slope: float, seed: int) -> Curve:
    unit = np.array([source.quantile(p) for p in np.random.default_rng(seed).random(SAMPLES)])
    residual_CT = (wanted[:, None] * (unit / np.sqrt(np.square(unit).mean()))).astype(np.float32)
    sigma_index_CT = np.repeat(np.arange(SIGMA_LEVELS, dtype=np.uint8)[:, None], SAMPLES, axis=1)
    found = quantize(residual_CT, sigma_index_CT, tables)
    error = np.square(found.reconstruction - residual_CT).mean(-1, dtype=np.float64)
    return Curve(slope, found.bits / SAMPLES, error / wanted**2, 1 / wanted)


def curves(source_index: int, case: Case, slope: float) -> tuple[Curve, Curve]:
    """A design's curves on the samples that choose and on those that measure."""
    source, wanted = SOURCES[source_index], sigmas(slope)
    settings = Settings(case.kind, case.trellis, 1.0, slope, case.context)
    tables = design_tables(QUANTIZERS[case.kind], settings, 0, case.centroids, source, wanted)
    chosen, measuring = (measured(tables, source, wanted, slope, seed) for seed in (CHOOSING, MEASURING))
    return chosen, measuring


class Reading(NamedTuple):
    """A curve at one rate."""

    distortion: float
    slope: float
    step: float
    apart: float
    """Bits between the two measured rates that were interpolated."""


def at_rate(curve: Curve, bits: float) -> Reading:
    order = np.argsort(curve.bits)
    rate, distortion, step = curve.bits[order], curve.distortion[order], curve.step[order]
    above = int(np.searchsorted(rate, bits))
    if not 0 < above < len(rate):
        raise ValueError(
            f"expected rates around {bits}, found {rate[0]:.3f} to {rate[-1]:.3f}; widen `sigmas`"
        )
    near = slice(above - 1, above + 1)
    read = (float(np.interp(bits, rate[near], values[near])) for values in (distortion, step))
    return Reading(next(read), curve.slope, next(read), float(rate[above] - rate[above - 1]))


def best_at_rate(found: list[tuple[Curve, Curve]], bits: float) -> Reading:
    """Measured where the other samples found the least distortion."""
    _, measuring = min(found, key=lambda pair: at_rate(pair[0], bits).distortion)
    return at_rate(measuring, bits)


def db(ratio: float) -> float:
    return 10 * math.log10(ratio)


def rows(
    bounds: dict[tuple[str, float], float], found: dict[tuple[str, Case], list[tuple[Curve, Curve]]]
) -> list[dict]:
    """The table of the .csv."""
    table = []
    for (source, case), pairs in found.items():
        states = 1 if case.trellis is None else TRELLISES[case.trellis].states
        for bits in RATES:
            read, bound = best_at_rate(pairs, bits), bounds[source, bits]
            table.append({
                "source": source, "quantizer": case.name, "states": states, "context": case.context,
                "points": "centroids" if case.centroids else "plain levels", "bits": bits,
                "lmbda_q_over_step2": read.slope, "step_over_sigma": f"{read.step:.3f}",
                "bits_between_readings": f"{read.apart:.3f}", "snr_db": f"{-db(read.distortion):.3f}",
                "bound_snr_db": f"{-db(bound):.3f}", "gap_db": f"{db(read.distortion / bound):.3f}",
            })  # fmt: skip
    return table


def text(table: list[dict]) -> str:
    """Gaps by quantizer and rate, one block a source."""
    blocks = []
    for source, of_source in itertools.groupby(table, lambda row: row["source"]):
        lines = list(of_source)
        head = "".join(f"{bits:>8g}" for bits in RATES)
        bound = "".join(f"{row['bound_snr_db']:>8}" for row in lines[: len(RATES)])
        block = [
            f"{source}: gap to D(R), dB",
            f"  {'bits a sample':28}{head}",
            f"  {'D(R): SNR, dB':28}{bound}",
        ]
        for name, of_case in itertools.groupby(lines, lambda row: row["quantizer"]):
            block.append(f"  {name:28}" + "".join(f"{float(row['gap_db']):8.2f}" for row in of_case))
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def main(folder: str = str(Path(__file__).parent)) -> None:
    clock = time.perf_counter()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes to come
    work = [
        (index, case, slope)
        for index, case in itertools.product(range(len(SOURCES)), CASES)
        for slope in SLOPES[case.kind]
    ]
    places = list(itertools.product(SOURCES, RATES))
    found: dict[tuple[str, Case], list[tuple[Curve, Curve]]] = {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        distortions = pool.map(bound, *zip(*itertools.product(range(len(SOURCES)), RATES), strict=True))
        for (index, case, slope), pair in zip(work, pool.map(curves, *zip(*work, strict=True)), strict=True):
            found.setdefault((SOURCES[index].name, case), []).append(pair)
            print(
                f"{time.perf_counter() - clock:6.0f} s  {SOURCES[index].name}, {case.name}, {slope}",
                flush=True,
            )
        bounds = {
            (source.name, bits): value for (source, bits), value in zip(places, distortions, strict=True)
        }
    table = rows(bounds, found)
    with (Path(folder) / "rate_distortion.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    minutes = (time.perf_counter() - clock) / 60
    notes = f"{machine('numpy', 'numba')}\n{SAMPLES} new samples a point; {minutes:.0f} minutes in 2 processes\n\n"
    (Path(folder) / "rate_distortion.txt").write_text(notes + text(table) + "\n")
    print(text(table))


def bound(source_index: int, bits: float) -> float:
    return distortion_at_rate(SOURCES[source_index], bits)


if __name__ == "__main__":
    main(*sys.argv[1:2])
