"""What tuning finds for a codec, and what it is worth on images that it never saw.

    python benchmarks/tuning.py CHECKPOINT FOLDER [LMBDA]

From a folder of training-side images 24 tune, as by default (12 find, 12 decide), and 16 others judge; crops from the
middle. J = bpp + λ · 255² · MSE of the pictures, averaged over images. One thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import machine

from jobs.import_codec import read_codec
from jobs.tune import evenly
from pipeline.judging import sample
from pipeline.pixels import canonical_pixels, centre_crop
from pipeline.quantizers import Settings, Tables, design, settings
from pipeline.quantizers.refine import PRIOR_WEIGHT, Residuals, refine
from pipeline.quantizers.tuning import Measured, Sample, Tuned, choose, mean, measure, quick_tables, search

TUNING, JUDGING, CROP = 24, 16, 512
CASES = {
    "urq": settings("urq"),
    "deadzone": settings("deadzone"),
    "rdoq": settings("rdoq"),
    "tcq vvc8, c = quantizer": settings("tcq"),
    "tcq vvc8, c = state": settings("tcq", context="state"),
    "tcq ungerboeck32": settings("tcq", "ungerboeck32"),
}
OTHERS = {
    **{f"deadzone, offset {offset:g}": settings("deadzone", offset=(offset,)) for offset in (0.44, 0.4)},
    **{f"rdoq, λ_q/Δ² {weight:g}": settings("rdoq", lmbda_q=weight) for weight in (0.05, 0.1)},
    **{f"tcq, Δ {step:g}": settings("tcq", step=step) for step in (0.6, 0.8)},
    **{f"tcq, λ_q/Δ² {weight:g}": settings("tcq", lmbda_q=weight) for weight in (0.05, 0.2)},
}
"""Beside the defaults: what else they might be."""
STUDIED = ("urq", "tcq vvc8, c = quantizer", "tcq vvc8, c = state")
WEIGHTS = (4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)


class Judges:
    """Images that took no part in tuning."""

    def __init__(self, samples: Sequence[Sample], lmbda: float) -> None:
        self.samples, self.lmbda = samples, lmbda
        self.first = self.of(design(CASES["urq"]))

    def of(self, tables: Tables) -> Measured:
        return mean(measure(tables, self.samples, self.lmbda))

    def line(self, name: str, tables: Tables, note: str = "") -> str:
        """Rate, distortion and J, and J over that of untuned URQ."""
        found = self.of(tables)
        over = 100 * (found.cost / self.first.cost - 1)
        numbers = f"{found.bpp:7.4f} {found.distortion:9.3f} {found.cost:8.4f} {over:+9.2f} %"
        return f"  {name:22} {numbers}  {note}".rstrip()


def tuned(start: Settings, samples: Sequence[Sample], lmbda: float) -> tuple[Tuned, Settings, str]:
    """The outcome, the settings that the search ended in, and what it took after analysis."""
    clock, tries, looks = time.perf_counter(), 0, search(start, samples, lmbda)
    while True:
        try:
            next(looks)
            tries += 1
        except StopIteration as end:
            outcome = choose(start, end.value, samples, lmbda)
            return outcome, end.value, f"{tries} tries, {time.perf_counter() - clock:.0f} s"


def values(chosen: Settings) -> str:
    """What is tuned of a quantizer."""
    weight = f", λ_q/Δ² {chosen.lmbda_q:g}" if chosen.lmbda_q else ""
    return f"Δ {chosen.step:g}{weight}" + (
        f", offset {chosen.offset[0]:g}" if chosen.kind == "deadzone" else ""
    )


def show_outcomes(own: Sequence[Sample], judges: Judges) -> dict[str, Settings]:
    """Each quantizer tuned, step by step; the settings found."""
    print(f"  {'':22} {'bpp':>7} {'255²·MSE':>9} {'J':>8} {'over urq':>11}")
    found, counted = {}, [one.latents for one in own[::2]]
    for name, start in CASES.items():
        outcome, found[name], effort = tuned(start, own, judges.lmbda)
        size = len(outcome.tables.to_bytes()) / 1000
        print(f"{name}: {effort}; kept: {outcome.kept}, {size:.0f} kB")
        for title, chosen in (("default", start), ("tuned", found[name])):
            prior = design(chosen)
            print(judges.line(title, prior, values(chosen)))
            print(judges.line("  counts", refine(prior, counted)))
            print(judges.line("  counts and centroids", refine(prior, counted, centroids=True)), flush=True)
    return found


def show_others(judges: Judges) -> None:
    """Why the defaults are what they are."""
    print("\nOther values than the defaults, with designed tables")
    for name, other in OTHERS.items():
        print(judges.line(name, design(other)), flush=True)


def show_weights(chosen: dict[str, Settings], counted: Sequence[Residuals], judges: Judges) -> None:
    """How much tables should trust some counts."""
    print(f"\nJ of tables by counts, if the prior weighs so many samples a symbol (used: {PRIOR_WEIGHT:g})")
    print(f"  {'':24} {'prior':>8} " + " ".join(f"{weight:8g}" for weight in WEIGHTS))
    for name in STUDIED:
        prior = design(chosen[name])
        tables = [prior, *(refine(prior, counted, weight=weight) for weight in WEIGHTS)]
        print(f"  {name:24} " + " ".join(f"{judges.of(one).cost:8.4f}" for one in tables), flush=True)


def show_tries(chosen: dict[str, Settings], latents: Sequence[Residuals], judges: Judges) -> None:
    """What the quick tables of a try are worth, and what they save."""
    print("\nTables of a try beside designed ones, at the values found")
    for name in STUDIED:
        clock = time.perf_counter()
        quick = quick_tables(chosen[name], latents)
        quick_s, clock = time.perf_counter() - clock, time.perf_counter()
        whole = design(chosen[name])
        whole_s = time.perf_counter() - clock
        over = 100 * (judges.of(quick).cost / judges.of(whole).cost - 1)
        print(f"  {name:24} J {over:+.3f} %, {quick_s:.2f} s against {whole_s:.2f} s")


def main(checkpoint: str, folder: str, lmbda: float = 0.013) -> None:
    torch.set_num_threads(1)
    codec = read_codec(Path(checkpoint).read_bytes())
    files = evenly(sorted(str(path) for path in Path(folder).iterdir()), TUNING + JUDGING)
    clock = time.perf_counter()
    samples = [
        sample(codec, centre_crop(canonical_pixels(Path(file).read_bytes()), CROP, codec.stride))
        for file in files
    ]
    analysis_s = (time.perf_counter() - clock) * TUNING / len(files)
    own = [one for i, one in enumerate(samples) if i % 5 < 3]
    judges = Judges([one for i, one in enumerate(samples) if i % 5 >= 3], lmbda)
    print(machine("torch", "numpy", "numba") + ", 1 thread")
    print(f"{Path(checkpoint).name}, λ = {lmbda}")
    print(
        f"{len(own)} images of {Path(folder).name} tune, {len(judges.samples)} others judge; a middle of {CROP} pixels"
    )
    print(f"reading and analysing the {len(own)}: {analysis_s:.1f} s\n")
    chosen = show_outcomes(own, judges)
    show_others(judges)
    show_weights(chosen, [one.latents for one in own[::2]], judges)
    show_tries(chosen, [one.latents for one in own], judges)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(float, sys.argv[3:4]))
