"""Tables designed on Gaussian samples, at once and without a codec; and statistics that refine tables.

Lloyd's algorithm through the quantizer's own search: quantize samples, count the indices, take the centroids, again.
Midpoint tables alone are far off at low rate, where a trellis with rate constraint hardly ever leaves a state.

It ends in the optimum nearest to its start, so what it starts from decides: with centroids these are the labellings of
`labels`, without them the levels stay where they are, and only how wide a source is expected differs. Each σ level
keeps what did best for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.frequencies import TOTAL, integer_frequencies
from pipeline.quantizers import labels
from pipeline.quantizers.contract import Quantizer
from pipeline.quantizers.kernels import count, plain
from pipeline.quantizers.lookup import code_bits, contexts, reconstruct, row_starts
from pipeline.quantizers.tables import Settings, Tables, alphabet_sizes
from pipeline.sigma import SIGMA_LEVELS, sigma_levels
from pipeline.sources import GAUSSIAN, Source

Floats = npt.NDArray[np.float64]

SCHEDULE = ((12, 5_000), (20, 10_000), (3, 40_000))
"""Rounds, and samples a σ level in each. A step that is coarse for its λ_q needs the many rounds."""
_STARTS = (("plain", 1.0), ("plain", 2.5), ("centred", 1.0), ("offset", 1.0))
"""Labellings, and widths of the sources whose midpoint tables are started from, in σ: a wide one keeps rare symbols
affordable."""
_PRIOR_WEIGHT = 4.0
"""Samples a symbol that the start's probabilities count for, so that unseen ones keep a sensible frequency."""
_STATE_WEIGHT = 64.0
"""The same where each state has tables of its own, which begin as those by quantizer: little differs, much is noise."""
_MOST_LABELLED = 20
"""K beyond which a level stays plain: other labellings gain nothing there, and take twice the indices."""


class Statistics(NamedTuple):
    """Counts of what a search chose, laid out as the tables are.

    Attributes:
        counts: float64 [Σ C(2K_l + 2)], how often each symbol was used.
        uses: float64 [Σ Q(K_l + 1)], how often each |k|.
        sums: float64 [Σ Q(K_l + 1)], Σ sgn(k)·r over those, latent units.
    """

    counts: Floats
    uses: Floats
    sums: Floats


def midpoint_tables(
    settings: Settings,
    width: float = 1.0,
    labelling: str = "plain",
    source: Source = GAUSSIAN,
    sigmas: Floats | None = None,
) -> Tables:
    """Levels on the lattice, and the probabilities of the cells between their midpoints: a start of the design.

    Args:
        width: how wide a source is expected, in its σ.
        labelling: name in `labels.SHIFTS`.
        sigmas: standard deviations of the levels, float64 [L], latent units; those of a codec if None.
    """
    frequencies, reconstruction = [], []
    wanted = sigma_levels() if sigmas is None else sigmas
    for K, sigma in zip(alphabet_sizes(settings, wanted).tolist(), wanted.tolist(), strict=True):
        name, size = (labelling, 2 * K) if labelling != "plain" and K <= _MOST_LABELLED else ("plain", K)
        probabilities = labels.cells(settings, size, name, source, width * sigma)
        frequencies.append(integer_frequencies(probabilities))
        reconstruction.append(labels.points(settings, size, name))
    return Tables.from_rows(settings, frequencies, reconstruction)


def gather(
    tables: Tables,
    residual: npt.NDArray[np.float32],
    sigma_index: npt.NDArray[np.uint8],
    contexts: npt.NDArray[np.uint8],
    indices: npt.NDArray[np.int32],
) -> Statistics:
    """Count what was chosen; all arrays of one shape. Statistics of several images add up entry by entry."""
    points = tables.reconstruction.size
    found = Statistics(np.zeros(tables.frequencies.size), np.zeros(points), np.zeros(points))
    chosen = (
        plain(residual.ravel()),
        plain(sigma_index.ravel()),
        plain(contexts.ravel()),
        plain(indices.ravel()),
    )
    count(*chosen, tables.alphabet, *row_starts(tables), *found)
    return found


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
        if centroids:
            uses = _rows(statistics.uses, prior.reconstruction_start, level, points.shape)
            sums = _rows(statistics.sums, prior.reconstruction_start, level, points.shape)
            points = (sums + weight * points) / (uses + weight)
            points[:, 0] = 0.0
        reconstruction.append(points.astype(np.float32))
    return Tables.from_rows(prior.settings, frequencies, reconstruction)


def _rows(values: Floats, start: npt.NDArray[np.int64], level: int, shape: tuple[int, ...]) -> Floats:
    return values[start[level] : start[level + 1]].reshape(shape)


def design_tables(
    quantizer: Quantizer,
    settings: Settings,
    seed: int,
    centroids: bool,
    source: Source = GAUSSIAN,
    sigmas: Floats | None = None,
    schedule: Sequence[tuple[int, int]] = SCHEDULE,
) -> Tables:
    """Lloyd's algorithm from several starts; each σ level keeps the tables that had the lowest J.

    Args:
        sigmas: standard deviations of the levels, float64 [L], latent units; those of a codec if None.
        schedule: rounds and samples a σ level of each stage; what did best in one starts the next.
    """
    wanted = sigma_levels() if sigmas is None else sigmas
    weight = _PRIOR_WEIGHT
    movable = centroids and settings.lmbda_q > 0  # a search blind to the rate has its own labelling
    if settings.context == "state":  # as many tables as states find worse optima unless they begin as two
        by_quantizer = replace(settings, context="quantizer")
        tables = design_tables(quantizer, by_quantizer, seed, centroids, source, wanted, schedule)
        starts, weight, schedule = [_by_state(tables, settings)], _STATE_WEIGHT, schedule[-1:]
    else:
        starts = [
            midpoint_tables(settings, width, name, source, wanted)
            for name, width in _STARTS
            if name == "plain" or movable
        ]
    for rounds, samples in schedule:
        residual_CT = _samples(source, wanted, samples, seed)
        runs = [_lloyd(quantizer, start, residual_CT, rounds, centroids, weight) for start in starts]
        starts = [_lowest([costed for run in runs for costed in run])]
    return starts[0]


def _by_state(tables: Tables, settings: Settings) -> Tables:
    """Each state with its quantizer's tables."""
    quantizers, levels = settings.context_quantizers, range(SIGMA_LEVELS)
    rows = [tables.frequency_rows(level)[quantizers] for level in levels]
    return Tables.from_rows(settings, rows, [tables.reconstruction_rows(level) for level in levels])


_Costed = tuple[Floats, Tables]
"""J = D/Δ² + (λ_q/Δ²)·bits a sample of each σ level, float64 [L], and the tables that had it."""


def _lloyd(
    quantizer: Quantizer,
    prior: Tables,
    residual_CT: npt.NDArray[np.float32],
    rounds: int,
    centroids: bool,
    weight: float,
) -> list[_Costed]:
    """All tables on the way from `prior`, with their costs on the samples; level l is channel l."""
    settings, history, tables = prior.settings, [], prior
    sigma_index_CT = np.repeat(np.arange(SIGMA_LEVELS, dtype=np.uint8)[:, None], residual_CT.shape[1], axis=1)
    for _ in range(rounds):
        indices_CT = quantizer.search(residual_CT, sigma_index_CT, tables)
        chosen = sigma_index_CT, contexts(indices_CT, tables), indices_CT
        error_CT = (reconstruct(tables, *chosen) - residual_CT) / np.float32(settings.step)
        distortion = np.square(error_CT).mean(-1, dtype=np.float64)
        bits = code_bits(tables, *chosen).mean(-1, dtype=np.float64)
        history.append((distortion + settings.lmbda_q * bits, tables))
        statistics = gather(tables, residual_CT, *chosen)
        following = retabulate(prior, statistics, centroids=centroids, weight=weight)
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


def _samples(source: Source, sigmas: Floats, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Residuals float32 [L, count]: σ times the source's quantiles in random order, the same for each level.

    Counts vary less than with free samples.
    """
    quantiles = np.array([source.quantile((i + 0.5) / count) for i in range(count)])
    return (sigmas[:, None] * np.random.default_rng(seed).permutation(quantiles)).astype(np.float32)
