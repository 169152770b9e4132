"""Tables for Gaussian residuals: where a quantizer starts before it has seen latents.

Lloyd's algorithm through the quantizer's own search: quantize samples, count the indices, take the centroids, again.
Midpoint tables alone are far off at low rate, where a trellis with rate constraint hardly ever leaves a state.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.frequencies import TOTAL, integer_frequencies
from pipeline.quantizers.contract import Quantizer
from pipeline.quantizers.lookup import channel_bits, contexts, reconstruct
from pipeline.quantizers.tables import Settings, Tables, alphabet_sizes
from pipeline.sigma import SIGMA_LEVELS, sigma_levels

_STARTS = (1.0, 2.5)
"""Widths of the Gaussians whose midpoint tables are started from, in σ: a wide one keeps rare symbols affordable."""
_SCHEDULE = ((12, 5_000), (20, 10_000), (3, 40_000))
"""Rounds, and samples a σ level in each. A step that is coarse for its λ_q needs the many rounds."""
_PRIOR_WEIGHT = 4.0
"""Samples a symbol that the midpoint probabilities count for, so that unseen ones keep a sensible frequency."""


class Statistics(NamedTuple):
    """Counts of what a search chose, laid out as the tables are.

    Attributes:
        counts: float64 [Σ C(2K_l + 2)], how often each symbol was used.
        uses: float64 [Σ Q(K_l + 1)], how often each |k|.
        sums: float64 [Σ Q(K_l + 1)], Σ sgn(k)·r over those, latent units.
    """

    counts: npt.NDArray[np.float64]
    uses: npt.NDArray[np.float64]
    sums: npt.NDArray[np.float64]


def gaussian_cells(settings: Settings, K: int, sigma: float) -> npt.NDArray[np.float64]:
    """Probabilities of the cells between midpoints of neighbouring plain levels, for N(0, σ²).

    Returns:
        float64 [C, 2K + 2]: k = −K … K, then what lies beyond. The state of a trellis is taken to tell nothing of r.
    """
    levels = settings.lattice(np.arange(K + 2))
    edges = (levels[:, 1:] + levels[:, :-1]) / 2 / (sigma * math.sqrt(2))
    upper = np.vectorize(math.erfc)(edges) / 2  # P(r > edge), exact in the tail
    cells = np.concatenate([0.5 - upper[:, :1], upper[:, :-1] - upper[:, 1:]], axis=1)
    cells[:, 0] *= 2
    by_quantizer = np.concatenate([cells[:, :0:-1], cells, 2 * upper[:, -1:]], axis=1)
    return by_quantizer[settings.context_quantizers]


def midpoint_tables(settings: Settings, width: float = 1.0) -> Tables:
    """Plain levels, and the frequencies of Gaussians `width`·σ wide: the start of the design."""
    frequencies, reconstruction = [], []
    for K, sigma in zip(alphabet_sizes(settings).tolist(), sigma_levels().tolist(), strict=True):
        frequencies.append(integer_frequencies(gaussian_cells(settings, K, width * sigma)))
        reconstruction.append(settings.lattice(np.arange(K + 1)).astype(np.float32))
    return Tables.from_rows(settings, frequencies, reconstruction)


def gather(
    tables: Tables,
    residual: npt.NDArray[np.float32],
    sigma_index: npt.NDArray[np.uint8],
    contexts: npt.NDArray[np.uint8],
    indices: npt.NDArray[np.int32],
) -> Statistics:
    """Count what was chosen; all arrays of one shape. Statistics of several images add up entry by entry."""
    K = tables.alphabet[sigma_index].astype(np.int64)
    coded = abs(indices) <= K
    symbol = (
        tables.frequency_start[sigma_index] + contexts * (2 * K + 2) + np.where(coded, indices + K, 2 * K + 1)
    )
    quantizers = tables.settings.context_quantizers[contexts]
    point = (tables.reconstruction_start[sigma_index] + quantizers * (K + 1) + abs(indices))[coded]
    signed = (np.sign(indices) * residual.astype(np.float64))[coded]
    return Statistics(
        np.bincount(symbol.ravel(), minlength=tables.frequencies.size).astype(np.float64),
        np.bincount(point, minlength=tables.reconstruction.size).astype(np.float64),
        np.bincount(point, weights=signed, minlength=tables.reconstruction.size).astype(np.float64),
    )


def retabulate(
    prior: Tables, statistics: Statistics, *, centroids: bool, weight: float = _PRIOR_WEIGHT
) -> Tables:
    """Tables of counted frequencies, `prior`'s as if each row had seen `weight` samples a symbol more.

    Args:
        centroids: move the reconstruction points to the centroids, with the same weight; else they are `prior`'s.
    """
    frequencies, reconstruction = [], []
    for level in range(SIGMA_LEVELS):
        known = prior.frequency_rows(level) - 1.0  # less the 1 that every symbol gets in any case
        counts = _rows(statistics.counts, prior.frequency_start, level, known.shape)
        symbols = known.shape[1]
        frequencies.append(integer_frequencies(counts + weight * symbols / (TOTAL - symbols) * known))
        points = prior.reconstruction_rows(level).astype(np.float64)
        if not centroids:
            reconstruction.append(points.astype(np.float32))
            continue
        uses = _rows(statistics.uses, prior.reconstruction_start, level, points.shape)
        sums = _rows(statistics.sums, prior.reconstruction_start, level, points.shape)
        points = (sums + weight * points) / (uses + weight)
        points[:, 0] = 0.0
        reconstruction.append(points.astype(np.float32))
    return Tables.from_rows(prior.settings, frequencies, reconstruction)


def _rows(
    values: npt.NDArray[np.float64], start: npt.NDArray[np.int64], level: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    return values[start[level] : start[level + 1]].reshape(shape)


_Costed = tuple[npt.NDArray[np.float64], Tables]
"""J = D/Δ² + (λ_q/Δ²)·bits a sample of each σ level, float64 [L], and the tables that had it."""


def design_tables(quantizer: Quantizer, settings: Settings, seed: int, centroids: bool) -> Tables:
    """Lloyd's algorithm from several starts; each σ level keeps the tables that had the lowest J."""
    prior = midpoint_tables(settings)
    candidates = [midpoint_tables(settings, width) for width in _STARTS]
    for rounds, count in _SCHEDULE:
        unit = _unit_samples(count, seed)
        runs = [_lloyd(quantizer, start, prior, unit, rounds, centroids) for start in candidates]
        candidates = [_lowest([costed for run in runs for costed in run])]
    return candidates[0]


def _lloyd(
    quantizer: Quantizer,
    tables: Tables,
    prior: Tables,
    unit: npt.NDArray[np.float64],
    rounds: int,
    centroids: bool,
) -> list[_Costed]:
    """All tables on the way, with their costs on N(0, σ²) samples σ·`unit`; level l is channel l."""
    settings, history = tables.settings, []
    residual_CT = (sigma_levels()[:, None] * unit).astype(np.float32)
    sigma_index_CT = np.repeat(np.arange(SIGMA_LEVELS, dtype=np.uint8)[:, None], unit.size, axis=1)
    for _ in range(rounds):
        indices_CT = quantizer.search(residual_CT, sigma_index_CT, tables)
        contexts_CT = contexts(indices_CT, tables)
        bits = channel_bits(tables, sigma_index_CT, contexts_CT, indices_CT) / unit.size
        error_CT = reconstruct(tables, sigma_index_CT, contexts_CT, indices_CT) - residual_CT
        distortion = np.square(error_CT, dtype=np.float64).mean(-1) / settings.step**2
        history.append((distortion + settings.lmbda_q * bits, tables))
        statistics = gather(tables, residual_CT, sigma_index_CT, contexts_CT, indices_CT)
        following = retabulate(prior, statistics, centroids=centroids)
        if following.digest == tables.digest:  # urq, whose search asks no tables, is done at once
            break
        tables = following
    return history


def _lowest(history: list[_Costed]) -> Tables:
    """For each σ level the rows of the tables with the lowest J."""
    winner = np.argmin([cost for cost, _ in history], axis=0)
    chosen = [history[i][1] for i in winner]
    return Tables.from_rows(
        chosen[0].settings,
        [tables.frequency_rows(level) for level, tables in enumerate(chosen)],
        [tables.reconstruction_rows(level) for level, tables in enumerate(chosen)],
    )


def _unit_samples(count: int, seed: int) -> npt.NDArray[np.float64]:
    """The quantiles (i + ½)/count of N(0, 1) in random order: counts vary less than with free samples."""
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    return np.random.default_rng(seed).permutation(quantiles)
