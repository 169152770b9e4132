"""How far a mean over test images would move, had other images been drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
COVERAGE = 0.95


def interval(
    columns: Floats, statistic: Callable[[Floats], Floats] = lambda means: means[0]
) -> tuple[float, float] | None:
    """Bootstrap interval over images, 95 %, by the percentile method; None with fewer than two images.

    Images are drawn with replacement, and each draw takes all columns of an image: what is compared stays paired.
    The draws depend on the number of images alone, so a figure is the same in each run and intervals of one
    report share their draws. Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    With few images it is too narrow: two or three show nothing.

    Args:
        columns: (k, images) values per image.
        statistic: (k, draws) means over the drawn images -> (draws,) values; the first mean by default.
    """
    images = columns.shape[1]
    if images < 2 or not np.isfinite(columns).all():
        return None
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(statistic(columns @ _weights(images)), (tail, 1 - tail))
    return float(low), float(high)


@functools.lru_cache(maxsize=4)  # a report asks for a few numbers of images, and often
def _weights(images: int) -> Floats:
    """(images, draws) share of each image in each draw."""
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), RESAMPLES)
    weights = draws.T / images
    weights.flags.writeable = False
    return weights
