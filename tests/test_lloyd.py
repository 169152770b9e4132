"""Designed tables: how near to D(R) they come, what they depend on, and how counts refine tables."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
import pytest

from pipeline import quantizers
from pipeline.frequencies import TOTAL
from pipeline.quantizers import QUANTIZERS, labels, lloyd
from pipeline.quantizers.lloyd import design_tables, gather, midpoint_tables, retabulate
from pipeline.quantizers.tables import Settings, Tables
from pipeline.sigma import SIGMA_LEVELS, sigma_levels
from pipeline.sources import GAUSSIAN, LAPLACIAN, SOURCES, Source, distortion_at_rate

URQ = Settings("urq", None, 1.0, 0.0)
TCQ = Settings("tcq", "vvc8", 0.7, 0.1)
EFFICIENT = Settings("tcq", "vvc8", 1.0, 0.4)
"""λ_q/Δ² near the slope of D(R)."""
SHORT = ((8, 2_000), (4, 4_000))


@cache
def designed(chosen: Settings) -> Tables:
    return quantizers.design(chosen, centroids=True)


def measured(tables: Tables, level: int, sigma: float, source: Source = GAUSSIAN) -> tuple[float, float]:
    """Bits a sample, and the mean squared error over σ², of new samples."""
    p = np.random.default_rng(11).random((768, 192))
    unit = np.vectorize(source.quantile)(p)
    unit /= np.sqrt(np.square(unit).mean())
    residual_CT = (sigma * unit).astype(np.float32)
    found = quantizers.quantize(residual_CT, np.full(residual_CT.shape, level, np.uint8), tables)
    error = np.square(found.reconstruction - residual_CT, dtype=np.float64).mean()
    return float(found.bits.sum() / residual_CT.size), float(error / sigma**2)


def gap_db(tables: Tables, level: int, sigma: float | None = None) -> tuple[float, float]:
    """Bits a sample, and how far the error of Gaussian samples lies above D(R)."""
    bits, error = measured(tables, level, float(sigma_levels()[level]) if sigma is None else sigma)
    return bits, 10 * np.log10(error / distortion_at_rate(GAUSSIAN, bits))


@pytest.mark.parametrize(
    ("chosen", "sigma", "expected_db"),
    [
        # λ_q is 0.10 in latent units: over Δ² it would be 0.33
        (Settings("tcq", "vvc8", 0.55, 0.10 / 0.55**2), 4.18, 0.536),
        (Settings("tcq", "vvc8", 0.55, 0.10 / 0.55**2), 1.02, 0.822),
        (URQ, 4.18, 1.550),
        (URQ, 1.02, 1.868),
    ],
)
def test_gap_of_midpoint_tables(chosen: Settings, sigma: float, expected_db: float) -> None:
    tables = midpoint_tables(chosen, sigmas=np.full(SIGMA_LEVELS, sigma))
    assert gap_db(tables, 0, sigma)[1] == pytest.approx(expected_db, abs=0.04)


@pytest.mark.parametrize("context", ["quantizer", "state"])
def test_eight_states_stay_within_half_a_decibel_of_the_gaussians_bound(context: str) -> None:
    """At every rate from 0.3 to 3.5 bits. 0.448 dB is the granular gain that 8 states leave."""
    tables = designed(Settings("tcq", "vvc8", 1.0, 0.4, context))
    found = [gap_db(tables, level) for level in range(15, 33)]
    assert 0.3 < found[0][0] < 0.5
    assert found[-1][0] > 3.4
    assert max(gap for _, gap in found) < 0.5


def test_256_states_stay_within_a_quarter() -> None:
    tables = design_tables(
        QUANTIZERS["tcq"],
        Settings("tcq", "ungerboeck256", 1.0, 0.4),
        0,
        True,
        schedule=((20, 3_000), (4, 10_000)),
    )
    for level in (16, 20, 24, 28):
        assert gap_db(tables, level)[1] < 0.27


def test_labellings_are_what_low_rates_need() -> None:
    """Gaussian, 0.8 bit: from plain levels alone 0.3 dB more."""
    plain = design_tables(QUANTIZERS["tcq"], EFFICIENT, 0, False, schedule=SHORT)
    assert gap_db(plain, 17)[1] > gap_db(designed(EFFICIENT), 17)[1] + 0.2


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("kind", ["rdoq", "tcq"])
def test_design_beats_its_starts(kind: str, source: Source) -> None:
    """In J on new samples, for every source."""
    chosen = Settings(kind, "vvc8" if kind == "tcq" else None, 1.0, 0.3)
    better = design_tables(QUANTIZERS[kind], chosen, 0, True, source, schedule=SHORT)
    starts = [midpoint_tables(chosen, 1.0, name, source) for name in labels.SHIFTS]
    for level in (16, 20, 24):
        sigma = float(sigma_levels()[level])
        costs = []
        for tables in (better, *starts):
            bits, error = measured(tables, level, sigma, source)
            costs.append(sigma**2 * error + chosen.lmbda_q * bits)
        assert costs[0] < min(costs[1:])


def test_rows_may_be_other_deviations_of_other_sources() -> None:
    """As studies of sources want it. Counts of URQ are the cells' probabilities."""
    sigmas = np.repeat([0.8, 1.9], SIGMA_LEVELS // 2)
    tables = design_tables(QUANTIZERS["urq"], URQ, 0, False, LAPLACIAN, sigmas, SHORT)
    for level in (0, 31, 32, 63):
        cells = labels.cells(URQ, int(tables.alphabet[level]), "plain", LAPLACIAN, sigmas[level])[0]
        assert tables.frequency_rows(level)[0] / TOTAL == pytest.approx(cells, abs=1e-3)


def test_design_depends_on_its_seed_alone() -> None:
    once, again, other = (
        design_tables(QUANTIZERS["tcq"], TCQ, seed, False, schedule=((2, 200),)) for seed in (0, 0, 1)
    )
    assert once.digest == again.digest != other.digest


def test_points_stay_on_the_lattice_unless_centroids_are_asked_for() -> None:
    plain, moved = (
        design_tables(QUANTIZERS["tcq"], TCQ, 0, centroids, schedule=((2, 500),))
        for centroids in (False, True)
    )
    plainest = midpoint_tables(TCQ)
    assert np.array_equal(plain.reconstruction, plainest.reconstruction)
    assert not np.array_equal(plain.frequencies, plainest.frequencies)
    assert not np.array_equal(moved.reconstruction[: plain.reconstruction.size], plain.reconstruction)


def test_design_of_urq_is_the_gaussian() -> None:
    """Against the cells' exact probabilities and, for |k| = 1, the exact centroid."""
    tables, sigma, normal = designed(URQ), float(sigma_levels()[18]), NormalDist()
    cells = labels.cells(URQ, int(tables.alphabet[18]), "plain", GAUSSIAN, sigma)[0]
    assert tables.frequency_rows(18)[0] / TOTAL == pytest.approx(cells, abs=3e-4)
    low, high = 0.5 / sigma, 1.5 / sigma
    centroid = sigma * (normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low))
    assert tables.reconstruction_rows(18)[0, 1] == pytest.approx(centroid, abs=1e-3)


def test_statistics_are_counts_and_sums() -> None:
    """Against a plain loop, for all kinds of contexts, with escapes."""
    for chosen in (URQ, TCQ, Settings("tcq", "vvc8", 0.7, 0.1, context="state")):
        tables, rng = midpoint_tables(chosen), np.random.default_rng(3)
        level = rng.integers(0, SIGMA_LEVELS, 300).astype(np.uint8)
        context = rng.integers(0, chosen.contexts, 300).astype(np.uint8)
        index = np.rint(rng.normal(0, 6, 300)).astype(np.int32)
        residual = rng.normal(0, 6, 300).astype(np.float32)
        counts, uses, sums = (
            np.zeros_like(values) for values in gather(tables, residual, level, context, index)
        )
        for r, s, c, k in zip(residual, level.tolist(), context.tolist(), index.tolist(), strict=True):
            K, quantizer = int(tables.alphabet[s]), int(chosen.context_quantizers[c])
            row = tables.frequency_start[s] + c * (2 * K + 2)
            counts[row + (K + k if abs(k) <= K else 2 * K + 1)] += 1
            if abs(k) <= K:
                point = tables.reconstruction_start[s] + quantizer * (K + 1) + abs(k)
                uses[point] += 1
                sums[point] += np.sign(k) * float(r)
        found = gather(tables, residual, level, context, index)
        assert np.array_equal(found.counts, counts)
        assert np.array_equal(found.uses, uses)
        assert found.sums == pytest.approx(sums)


def test_counts_replace_a_prior_as_they_grow() -> None:
    tables = midpoint_tables(URQ)
    residual = np.full((1, 100_000), 1.2, np.float32)
    level, context = np.full(residual.shape, 40, np.uint8), np.zeros(residual.shape, np.uint8)
    counted = retabulate(
        tables, gather(tables, residual, level, context, np.ones(residual.shape, np.int32)), centroids=True
    )
    K = int(tables.alphabet[40])
    assert counted.frequency_rows(40)[0, K + 1] > 0.99 * TOTAL
    assert counted.reconstruction_rows(40)[0, 1] == pytest.approx(1.2, abs=1e-4)
    assert np.array_equal(counted.frequency_rows(39), tables.frequency_rows(39))
    assert np.array_equal(counted.reconstruction_rows(39), tables.reconstruction_rows(39))


def test_state_tables_begin_as_those_by_quantizer() -> None:
    assert lloyd._by_state(midpoint_tables(TCQ), Settings("tcq", "vvc8", 0.7, 0.1, "state")).digest == (
        midpoint_tables(Settings("tcq", "vvc8", 0.7, 0.1, "state")).digest
    )
