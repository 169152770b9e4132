"""What gaps in rate_distortion.csv owe to the alphabets that a design begins with, and to chance.

    python benchmarks/design_limits.py

An alphabet covers 4σ. A labelling other than plain has twice the indices, but not in Q1: there the next level, by an
escape, lies at 8σ. The design is repeated with alphabets of 8σ, which no limit of K keeps plain. One λ_q/Δ², 0.4.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
from machine import machine
from rate_distortion import RATES, Case, at_rate, curves, db, measured, sigmas

from pipeline.quantizers import QUANTIZERS, Settings, lloyd
from pipeline.sources import SOURCES

SLOPE = 0.4
NAMES = [source.name for source in SOURCES]
CASES = [
    ("Laplacian", "vvc4"),
    ("Laplacian", "ungerboeck8"),
    ("Gaussian", "vvc4"),
    ("Gaussian", "ungerboeck8"),
]
SEEDS = range(2, 8)
"""Samples to measure on; the table's are those of the first."""


def show(title: str, gaps: npt.ArrayLike, digits: int = 3) -> None:
    print(f"  {title:30}" + "".join(f"{gap:8.{digits}f}" for gap in np.asarray(gaps)), flush=True)


def bounds_db(name: str) -> npt.NDArray[np.float64]:
    """D(R) of a source as signal over noise, by rate."""
    with (Path(__file__).parent / "rate_distortion.csv").open() as file:
        found = {
            float(row["bits"]): row["bound_snr_db"] for row in csv.DictReader(file) if row["source"] == name
        }
    return np.array([float(found[bits]) for bits in RATES])


def show_alphabets() -> None:
    usual, labelled = lloyd.alphabet_sizes, lloyd._MOST_LABELLED
    for name, trellis in CASES:
        for cover in (4, 8):
            lloyd.alphabet_sizes = lambda settings, wanted, by=cover / 4: usual(settings, wanted * by)
            lloyd._MOST_LABELLED = labelled if cover == 4 else 60
            _, curve = curves(NAMES.index(name), Case(trellis, "tcq", trellis), SLOPE)
            snr_db = np.array([-db(at_rate(curve, bits).distortion) for bits in RATES])
            show(f"{name}, {trellis}, {cover}σ", bounds_db(name) - snr_db)
    lloyd.alphabet_sizes, lloyd._MOST_LABELLED = usual, labelled


def show_chance() -> None:
    for source in SOURCES[:2]:
        wanted, settings = sigmas(SLOPE), Settings("tcq", "vvc8", 1.0, SLOPE)
        tables = lloyd.design_tables(QUANTIZERS["tcq"], settings, 0, True, source, wanted)
        found = [
            [db(at_rate(measured(tables, source, wanted, SLOPE, seed), bits).distortion) for bits in RATES]
            for seed in SEEDS
        ]
        show(f"{source.name}, vvc8", np.std(found, axis=0, ddof=1), 4)


def main() -> None:
    print(machine("numpy", "numba"))
    print(f"\nGap to D(R), dB, by what the alphabets cover\n  {'bits a sample':30}", end="")
    print("".join(f"{bits:8g}" for bits in RATES))
    show_alphabets()
    print(f"\nStandard deviation of a gap over {len(SEEDS)} sets of samples, one design, dB")
    show_chance()


if __name__ == "__main__":
    main()
