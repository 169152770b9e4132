"""Exact choice of an index: the least (r − r̂_k)² + λ·bits_k over every k of a subset, in constant time.

For fixed k the cost less r² is a line in r, r̂_k² + λ·bits_k − 2r·r̂_k, so the best k as a function of r is the lower
envelope of lines: indices in order of their levels, with thresholds between them. Each branch (σ level, context,
subset) has its own. A uniform grid over r tells where to start, a walk along the thresholds ends at the best line.

Of the escapes only the first of either sign is among the lines: no other of that sign has a shorter code or a nearer
level while |r| is at most that level. Beyond it the search looks at every code length.

A subset is the indices k ≡ u (mod stride): the two parities for a trellis, all k for a scalar quantizer (stride 1).
Branches are numbered (level · C + context) · stride + u.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.frequencies import escape_bits, frequency_bits
from pipeline.quantizers.kernels import hull
from pipeline.quantizers.tables import Tables
from pipeline.sigma import SIGMA_LEVELS

_BINS_PER_LINE = 2

Floats = npt.NDArray[np.float64]

LINE = np.dtype(
    [
        ("threshold", np.float64),  # above it the next line is better; +∞ for a branch's last
        ("level", np.float64),
        ("rate", np.float64),  # λ · bits
        ("index", np.int64),
    ]
)
BRANCH = np.dtype(
    [
        ("bound", np.float64),  # |r| up to which the lines are the whole truth
        ("bins_per_unit", np.float64),  # bins are equally wide over [−bound, bound]
        ("first_bin", np.int64),
        ("alphabet", np.int64),
        ("subset", np.int64),
        ("stride", np.int64),
        ("escape_rate", np.float64),  # λ · bits of the escape symbol
        ("bit_rate", np.float64),  # λ
        ("spacing", np.float64),  # beyond the alphabet the level of k is sgn(k)·(|k|·spacing − shift)
        ("shift", np.float64),
    ]
)


class Envelopes(NamedTuple):
    """Lower envelopes as the arrays that compiled loops read, latent units.

    Attributes:
        branches: BRANCH [L · C · stride].
        guess: by bin, a line at or before the best one.
        lines: LINE, every branch's from the lowest level to the highest.
    """

    branches: npt.NDArray[np.void]
    guess: npt.NDArray[np.int32]
    lines: npt.NDArray[np.void]


@lru_cache(maxsize=8)
def envelopes(tables: Tables, stride: int) -> Envelopes:
    """The lower envelopes of `tables` with `stride` subsets; building takes some 20 ms."""
    settings = tables.settings
    lmbda = settings.lmbda_q * settings.step**2
    branches = np.empty((SIGMA_LEVELS, settings.contexts, stride), BRANCH)
    guesses: list[npt.NDArray[np.int32]] = []
    lines: list[npt.NDArray[np.void]] = []
    bins_before = lines_before = 0
    for level, context, u in np.ndindex(branches.shape):
        K = int(tables.alphabet[level])
        rate = lmbda * frequency_bits(tables.frequency_rows(level)[context])
        points = _points(tables, level, context, _first_escape(K, u, stride))
        lines.append(_lower_envelope(points, rate, lmbda, stride))
        guess, bins_per_unit = _guesses(lines[-1]["threshold"], points[-1])
        guesses.append(guess + lines_before)
        shift = settings.step * settings.context_quantizers[context]
        far = (K, u, stride, rate[-1], lmbda, settings.spacing, shift)
        branches[level, context, u] = (points[-1], bins_per_unit, bins_before, *far)
        bins_before, lines_before = bins_before + len(guess), lines_before + len(lines[-1])
    return Envelopes(branches.ravel(), np.concatenate(guesses), np.concatenate(lines))


def _first_escape(K: int, u: int, stride: int) -> int:
    """The least m > K with m ≡ u (mod stride)."""
    return K + 1 + (u - K - 1) % stride


def _points(tables: Tables, level: int, context: int, first_escape: int) -> Floats:
    """Levels of |k| = 0 … first_escape, of which those up to K and the last are used."""
    quantizer = tables.settings.context_quantizers[context]
    lattice = tables.settings.lattice(np.arange(first_escape + 1))[quantizer].astype(np.float32)
    known = tables.reconstruction_rows(level)[quantizer]
    lattice[: len(known)] = known
    return lattice.astype(np.float64)


def _lower_envelope(points: Floats, rate: Floats, lmbda: float, stride: int) -> npt.NDArray[np.void]:
    """From levels by |k| and rates of −K … K and the escape."""
    K, last = len(rate) // 2 - 1, len(points) - 1
    index = np.arange(-last, last + 1, stride)
    level = np.sign(index) * points[abs(index)]
    line_rate = rate[np.where(abs(index) <= K, index + K, -1)]
    line_rate[[0, -1]] += lmbda * escape_bits(np.array(last - K - 1))
    # of equal lines the least |k| comes first and stays
    order = np.lexsort((index, abs(index), line_rate, level))
    kept, threshold = hull(level[order], level[order] ** 2 + line_rate[order])
    order = order[kept]
    lines = np.empty(len(order), LINE)
    lines["threshold"], lines["level"], lines["rate"] = threshold, level[order], line_rate[order]
    lines["index"] = index[order]
    return lines


def _guesses(threshold: Floats, bound: float) -> tuple[npt.NDArray[np.int32], float]:
    """Where to start, by bin over [−bound, bound], and bins per unit of r."""
    bins = _BINS_PER_LINE * len(threshold)
    # a hair early, so that rounding of the bin can never start beyond the best line
    edges = (np.arange(bins + 1) - 1e-6) * (2 * bound / bins) - bound
    edges[0] = -np.inf  # r below −bound starts here as well
    return np.searchsorted(threshold, edges).astype(np.int32), bins / (2 * bound)
