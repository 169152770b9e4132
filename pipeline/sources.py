"""Memoryless sources of unit variance, and the least distortion that any code can have at a rate: D(R).

Squared error. Berger, Rate Distortion Theory (1971), section 4.3; Blahut, IEEE Trans. Inform. Theory 18 (1972).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """A symmetric density of unit variance.

    Attributes:
        upper: P(x > value).
        quantile: the value that x falls below with a probability in (0, 1).
        entropy: differential entropy in bits.
        reach: |x| beyond which nothing matters: the end of the density, or a probability below 1e-8.
    """

    name: str
    upper: Callable[[float], float]
    quantile: Callable[[float], float]
    entropy: float
    reach: float

    def mass(self, low: Floats, high: Floats) -> Floats:
        """P(low < x ≤ high), exact in both tails."""
        mirrored = low + high < 0
        nearer, farther = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
        upper = np.vectorize(self.upper, otypes=[np.float64])
        probability: Floats = upper(nearer) - upper(farther)
        return probability

    def shannon_bound(self, bits: float) -> float:
        """2^(2h − 2R)/(2πe), below which no D lies; equal for the Gaussian, approached by all at high rate."""
        return 2 ** (2 * (self.entropy - bits)) / (2 * math.pi * math.e)


def _laplacian_upper(value: float) -> float:
    tail = math.exp(-math.sqrt(2) * abs(value)) / 2
    return tail if value > 0 else 1 - tail


def _laplacian_quantile(p: float) -> float:
    return math.copysign(math.log(2 * min(p, 1 - p)) / math.sqrt(2), p - 0.5)


GAUSSIAN = Source(
    "Gaussian",
    lambda value: math.erfc(value / math.sqrt(2)) / 2,
    NormalDist().inv_cdf,
    math.log2(2 * math.pi * math.e) / 2,
    7.0,
)
LAPLACIAN = Source("Laplacian", _laplacian_upper, _laplacian_quantile, math.log2(2 * math.e**2) / 2, 14.0)
UNIFORM = Source(
    "uniform",
    lambda value: min(max(0.5 - value / math.sqrt(12), 0.0), 1.0),
    lambda p: (p - 0.5) * math.sqrt(12),
    math.log2(12) / 2,
    math.sqrt(3),
)
SOURCES = (GAUSSIAN, LAPLACIAN, UNIFORM)

_TOLERANCE = 1e-4
"""Bits between Blahut's bounds at which the iteration ends: 0.0006 dB."""


def point_at_slope(source: Source, slope: float, cells: int = 600) -> tuple[float, float]:
    """Rate in bits and D where −dD/dR is `slope` per bit: Blahut–Arimoto on a grid over ±`source.reach`.

    A cell of the grid should be narrower than half of √D.
    """
    edge = np.linspace(-source.reach, source.reach, cells + 1)
    p = source.mass(edge[:-1], edge[1:])
    p /= p.sum()
    error = ((edge[:-1] + edge[1:])[:, None] / 2 - edge) ** 2
    likelihood = np.exp(error * (-math.log(2) / slope))
    q = np.full(cells + 1, 1 / (cells + 1))
    for _ in range(20_000):
        scale = p / (likelihood @ q)
        growth = scale @ likelihood
        if math.log2(growth.max()) - q @ np.log2(growth) < _TOLERANCE:
            break
        q *= growth
    distortion = float((scale[:, None] * likelihood * error).sum(0) @ q)
    return float(p @ np.log2(scale / p)) - distortion / slope, distortion


def distortion_at_rate(source: Source, bits: float, cells: int = 600) -> float:
    """D(R) at unit variance; within 0.01 dB for 0.25 to 4 bits."""
    if source is GAUSSIAN:
        return 2 ** (-2 * bits)
    slope, missing = 2 * math.log(2) * source.shannon_bound(bits), 0.0
    for _ in range(3):  # the slope falls nearly as 2^(−2R)
        slope *= 2 ** (-2 * missing)
        rate, distortion = point_at_slope(source, slope, cells)
        missing = bits - rate
    return distortion * math.exp(-slope * missing / distortion)  # along the tangent of log D
