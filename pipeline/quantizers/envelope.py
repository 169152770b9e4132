"""Exact choice of an index: the least (r − r̂_k)² + λ·bits_k over every k of a subset, in constant time.

For fixed k the cost less r² is a line in r, r̂_k² + λ·bits_k − 2r·r̂_k, so the best k as a function of r is the lower
envelope of lines: indices in order of their levels, with thresholds between them. Each branch (σ level, context,
subset) has its own. A uniform grid over r tells where to start, a walk along the thresholds ends at the best line.

Of the escapes those up to about 1.5 K are among the lines: no further one has a shorter code or a nearer level while
|r| is at most the level of the last. Beyond it the search looks at every code length.

A subset is the indices k ≡ u (mod stride): the two parities for a trellis, all k for a scalar quantizer (stride 1).
Branches are numbered (level · C + context) · stride + u.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.frequencies import escape_bits, frequency_bits
from pipeline.quantizers.search_kernels import CHUNK, LINE_FIELDS, UNKNOWN, hull
from pipeline.quantizers.tables import SEARCHES_KEPT, Tables
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
BIN = np.dtype(
    [
        ("level", np.float64),
        ("rate", np.float64),
        ("upper_level", np.float64),
        ("upper_rate", np.float64),
        ("index", np.int16),
        ("upper_index", np.int16),
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


_SLACK = 1e-6
"""Of a bin's width: how far beyond its edges a bin knows the lines, against rounding when bins are computed."""


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


class Grid(NamedTuple):
    """The same envelopes by bins of r that a trellis' branches share: two lines each, one of which is the best.

    Where that is not so (three lines in one bin, escapes) the bin is wild, and `Envelopes` must be asked.
    G bins of all levels, one after another; B branches of a level.

    Attributes:
        bins_per_unit: of r; r falls into bin ⌊r · bins_per_unit + middle⌋ of its level.
        middle: float64 [L], half of a level's bins.
        first_row: uint32 [L], where a level's bins begin.
        lines: float64 [G · LINE_FIELDS · B], by CHUNK branches: their lower lines' levels and rates, the upper lines'.
        wild: uint8 [G].
        indices: int16 [G, 2, B], k of the lower and of the upper line; UNKNOWN in wild bins.
    """

    bins_per_unit: float
    middle: Floats
    first_row: npt.NDArray[np.uint32]
    lines: Floats
    wild: npt.NDArray[np.uint8]
    indices: npt.NDArray[np.int16]


@lru_cache(maxsize=SEARCHES_KEPT)
def grid(tables: Tables) -> Grid:
    """The bins of a trellis quantizer's tables, as wide as the two subsets' levels lie apart."""
    envelope, settings = envelopes(tables, 2), tables.settings
    width, count = settings.spacing, 2 * settings.contexts
    bound = envelope.branches["bound"].reshape(SIGMA_LEVELS, count).min(-1)
    inner = (2 * bound / width).astype(
        np.int64
    )  # bins within the bounds; one on either side is for what lies beyond
    last_line = np.flatnonzero(envelope.lines["threshold"] == np.inf)
    first_line = np.concatenate([[0], last_line[:-1] + 1])
    bins = [
        _bins(envelope.lines[first_line[n] : last_line[n] + 1], int(inner[n // count]), width)
        for n in range(len(last_line))
    ]
    by_level = [bins[i : i + count] for i in range(0, len(bins), count)]
    fields = [np.stack([row for row, _ in level], 1) for level in by_level]
    wild = [np.any([wild for _, wild in level], axis=0) for level in by_level]
    rows = np.concatenate(fields)  # [G, B]
    lines = np.stack([rows[name] for name in ("level", "rate", "upper_level", "upper_rate")], 1)
    return Grid(
        1 / width,
        inner / 2 + 1,
        np.concatenate([[0], np.cumsum(inner + 2)[:-1]]).astype(np.uint32),
        lines.reshape(-1, LINE_FIELDS, count // CHUNK, CHUNK).swapaxes(1, 2).ravel(),
        np.concatenate(wild).astype(np.uint8),
        np.where(
            np.concatenate(wild)[:, None, None],
            np.int16(UNKNOWN),
            np.stack([rows["index"], rows["upper_index"]], 1),
        ),
    )


def _bins(
    lines: npt.NDArray[np.void], inner: int, width: float
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.bool_]]:
    """One branch's two lines by bin, and which bins are wild."""
    edges = (np.arange(inner + 1) - inner / 2) * width
    lower = np.searchsorted(lines["threshold"], edges[:-1] - _SLACK * width)
    upper = np.searchsorted(lines["threshold"], edges[1:] + _SLACK * width)
    lower, upper = (np.concatenate([[0], i, [len(lines) - 1]]) for i in (lower, upper))
    wild = upper - lower > 1
    wild[[0, -1]] = True
    found = np.empty(inner + 2, BIN)
    for name in ("level", "rate", "index"):
        found[name], found[f"upper_{name}"] = lines[name][lower], lines[name][upper]
    return found, wild


@lru_cache(maxsize=SEARCHES_KEPT)
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
        points = _points(tables, level, context, _last_line(K, u, stride))
        lines.append(_lower_envelope(points, rate, lmbda, stride))
        guess, bins_per_unit = _guesses(lines[-1]["threshold"], points[-1])
        guesses.append(guess + lines_before)
        shift = settings.step * settings.context_quantizers[context]
        far = (K, u, stride, rate[-1], lmbda, settings.spacing, shift)
        branches[level, context, u] = (points[-1], bins_per_unit, bins_before, *far)
        bins_before, lines_before = bins_before + len(guess), lines_before + len(lines[-1])
    return Envelopes(branches.ravel(), np.concatenate(guesses), np.concatenate(lines))


def _last_line(K: int, u: int, stride: int) -> int:
    """The least m ≥ K + max(K/2, 8) with m ≡ u (mod stride): Gaussian tables then cover 6σ, real latents' tails."""
    m = K + max(K // 2, 8)
    return m + (u - m) % stride


def _points(tables: Tables, level: int, context: int, last: int) -> Floats:
    """Levels of |k| = 0 … last."""
    quantizer = tables.settings.context_quantizers[context]
    lattice = tables.settings.lattice(np.arange(last + 1))[quantizer].astype(np.float32)
    known = tables.reconstruction_rows(level)[quantizer]
    lattice[: len(known)] = known
    return lattice.astype(np.float64)


def _lower_envelope(points: Floats, rate: Floats, lmbda: float, stride: int) -> npt.NDArray[np.void]:
    """From levels by |k| and rates of −K … K and the escape."""
    K, last = len(rate) // 2 - 1, len(points) - 1
    index = np.arange(-last, last + 1, stride)
    level = np.sign(index) * points[abs(index)]
    coded = abs(index) <= K
    excess = np.where(coded, 0, abs(index) - K - 1)
    line_rate = np.where(coded, rate[np.where(coded, index + K, 0)], rate[-1] + lmbda * escape_bits(excess))
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
