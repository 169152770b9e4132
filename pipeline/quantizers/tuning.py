"""Tuning: the step Δ, the weight λ_q of rate (or the rounding offset) and the tables that suit a codec.

What is minimised is J = R + λ·D in the image domain: R in bits a pixel with the hyper latents' share, D = 255² · MSE of
the decoder's picture, clipped to [0, 1] but not rounded, λ the codec's own.

    default ──search──► Δ, λ_q/Δ² ──design──► tables ──counts──► tables ──centroids──► tables

Every second image finds: the search looks at these alone, and counts are taken over them. The others, held out, decide
what is kept of it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.quantizer_kinds import STEP_RANGE, named
from pipeline.quantizers import design, quantize
from pipeline.quantizers.compass import Point, descend
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.refine import Residuals, refine
from pipeline.quantizers.tables import Settings, Tables

HALVINGS = 1
QUICK_ROUNDS, QUICK_WEIGHT = 4, 16.0
"""Tables of a try: midpoints, refined on the latents themselves. No higher in J than a whole design, within 0.1 %, and
in less than half of its time (benchmarks/tuning.txt)."""


class Sample(NamedTuple):
    """One image, analysed once and judged many times.

    Attributes:
        latents: what a quantizer sees.
        distortion: 255² · MSE of the picture that the decoder makes of r̂, float32 [C, T].
        side_bits: bits of the hyper latents.
        pixels: height · width.
    """

    latents: Residuals
    distortion: Callable[[npt.NDArray[np.float32]], float]
    side_bits: float
    pixels: int


class Measured(NamedTuple):
    """Bits a pixel, 255² · MSE of the picture, and J = bpp + λ · distortion."""

    bpp: float
    distortion: float
    cost: float


class Try(NamedTuple):
    """A look of the search, on the images that find."""

    settings: Settings
    measured: Measured


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        tables: the choice; their settings say which Δ and λ_q.
        kept: which of `held_out` they are.
        held_out: J and its parts on the images that found nothing, the simplest first: with the "default" settings, and
            "tuned" where the search left these, both with designed tables; where tables were refined also
            "default with counts", "default with counts and centroids", and the same of "tuned".
    """

    tables: Tables
    kept: str
    held_out: dict[str, Measured]


def search(
    start: Settings, samples: Sequence[Sample], lmbda: float, *, alone: str | None = None
) -> Generator[Try, None, Settings]:
    """Yields each try; returns the settings of the lowest J. Equal images give equal ones on one platform.

    Args:
        start: settings to search from; a λ_q of 0 stays 0.
        samples: at least 2, as `choose` takes them; every second one, from the first on, is looked at.
        lmbda: λ of the codec.
        alone: "step" searches Δ alone, and leaves λ_q/Δ² or the offset as they are: what is best before a finetuning
            weighs the rate too little for the decoder after it (docs/results.md).

    Raises:
        ValueError: fewer than two samples, an offset for each σ level, or λ not above 0.
    """
    if len(samples) < 2:
        raise ValueError(
            f"tuning: expected at least 2 images, one to find by and one held out, found {len(samples)}"
        )
    if not 0 < lmbda < math.inf:
        raise ValueError(f"tuning: expected a finite λ above 0, found {lmbda}")
    axes, finding = [axis for axis in _axes(start) if alone in (None, axis)], samples[::2]
    latents = [sample.latents for sample in finding]
    descent = descend([_WIDTHS[axis] for axis in axes], HALVINGS)
    point = next(descent)
    while True:
        settings = _at(start, axes, point)
        cost = math.inf
        if settings is not None:
            measured = mean(measure(quick_tables(settings, latents), finding, lmbda))
            yield Try(settings, measured)
            cost = measured.cost
        try:
            point = descent.send(cost)
        except StopIteration as end:
            chosen = _at(start, axes, end.value)
            assert chosen is not None  # the start itself is a place
            return chosen


def choose(
    start: Settings, found: Settings, samples: Sequence[Sample], lmbda: float, *, refining: bool = True
) -> Tuned:
    """Of the settings that a search found and those it started from the tables that do best on images held out.

    Args:
        samples: in an order that says nothing of their content; every second one, from the second on, is held out.
        refining: also refine the tables by counts, and by centroids.
    """
    candidates = {"default": design(start)}
    if found != start:
        candidates["tuned"] = design(found)
    if refining:
        counted, designed = [sample.latents for sample in samples[::2]], list(candidates.items())
        for refined, centroids in (("counts", False), ("counts and centroids", True)):
            for name, prior in designed:
                candidates[f"{name} with {refined}"] = refine(prior, counted, centroids=centroids)
    held_out = {name: mean(measure(tables, samples[1::2], lmbda)) for name, tables in candidates.items()}
    # of equal ones the first, which is the simplest
    kept = min(held_out, key=lambda name: held_out[name].cost)
    return Tuned(candidates[kept], kept, held_out)


def measure(tables: Tables, samples: Sequence[Sample], lmbda: float) -> list[Measured]:
    """Rate, distortion and J of each image."""
    rows = []
    for sample in samples:
        quantized = quantize(*sample.latents, tables)
        bpp = (float(quantized.bits.sum()) + sample.side_bits) / sample.pixels
        distortion = sample.distortion(quantized.reconstruction)
        rows.append(Measured(bpp, distortion, bpp + lmbda * distortion))
    return rows


def mean(rows: Sequence[Measured]) -> Measured:
    """Average over images."""
    return Measured(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def quick_tables(settings: Settings, latents: Sequence[Residuals]) -> Tables:
    """Tables good enough to compare settings by."""
    return refine(midpoint_tables(settings), latents, rounds=QUICK_ROUNDS, weight=QUICK_WEIGHT)


_WIDTHS = {"step": 0.25, "lmbda_q": 1.0, "offset": 0.015625}
"""First steps: Δ and λ_q/Δ² in octaves, the offset in itself."""


def _axes(start: Settings) -> list[str]:
    """What of the settings is searched: what the kind has a use for."""
    if len(start.offset) > 1:
        raise ValueError(
            f"tuning: expected one rounding offset to start from, found {len(start.offset)}, one a σ level; "
            "give one number, or tune without them"
        )
    weighted = ["lmbda_q"] if start.lmbda_q > 0 else []
    return ["step", *weighted, *(["offset"] if named(start.kind).offset is not None else [])]


def _at(start: Settings, axes: Sequence[str], point: Point) -> Settings | None:
    """Settings at a displacement, rounded to four digits as people write them; None where there can be none."""
    moved = dict(zip(axes, point, strict=True))
    if not any(point):
        return start
    step = _rounded(start.step * 2 ** moved["step"])
    offset = _rounded(start.offset[0] + moved.get("offset", 0.0))
    if not (STEP_RANGE[0] <= step <= STEP_RANGE[1] and 0 <= offset <= 0.5):
        return None
    lmbda_q = _rounded(start.lmbda_q * 2 ** moved.get("lmbda_q", 0.0))
    return replace(start, step=step, lmbda_q=lmbda_q, offset=(offset,))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
