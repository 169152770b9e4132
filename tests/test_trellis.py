"""The trellis search equals brute force over all paths and all indices, and packs as densely as it should."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from plain_viterbi import REACHED, excess_cost

from pipeline.frequencies import TOTAL, escape_bits, frequency_bits, integer_frequencies
from pipeline.quantizer_kinds import STATE_CONTEXTS
from pipeline.quantizers import contexts, design, quantize, rdoq, tcq
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.tables import MAX_INDEX, Settings, Tables
from pipeline.quantizers.trellis import LANES, TRELLISES
from pipeline.sigma import SIGMA_LEVELS

ALL_K = np.arange(-MAX_INDEX, MAX_INDEX + 1)


def random_tables(chosen: Settings, rng: np.random.Generator) -> Tables:
    """Skewed frequencies, levels in no order, K of 1 to 4."""
    frequencies, reconstruction = [], []
    for K in rng.integers(1, 5, SIGMA_LEVELS):
        skewed = rng.dirichlet(np.full(2 * K + 2, 0.3), chosen.contexts) + 1e-9
        frequencies.append(integer_frequencies(skewed))
        points = chosen.lattice(np.arange(K + 1)) + rng.normal(0, chosen.step, (chosen.quantizers, K + 1))
        points[:, 0] = 0
        reconstruction.append(points.astype(np.float32))
    return Tables.from_rows(chosen, frequencies, reconstruction)


def costs_of_all(tables: Tables, level: int, context: int, r: float) -> npt.NDArray[np.float64]:
    """(r − r̂_k)² + λ_q·bits_k for every k there is, from the definitions."""
    chosen, K = tables.settings, int(tables.alphabet[level])
    bits = frequency_bits(tables.frequency_rows(level)[context])
    coded, excess = abs(ALL_K) <= K, np.maximum(abs(ALL_K) - K - 1, 0)
    rate = np.where(coded, bits[np.where(coded, ALL_K + K, -1)], bits[-1] + escape_bits(excess))
    magnitude = chosen.lattice(abs(ALL_K))[context].astype(np.float32)
    magnitude[coded] = tables.reconstruction_rows(level)[context][abs(ALL_K[coded])]
    costs: npt.NDArray[np.float64] = (
        r - np.sign(ALL_K) * magnitude.astype(np.float64)
    ) ** 2 + chosen.lmbda_q * chosen.step**2 * rate
    return costs


def brute_force(tables: Tables, sigma_index: list[int], costs: Any) -> float:
    """The least total over every path: all 2**T sequences of parities, each with its best index everywhere."""
    trellis = TRELLISES[str(tables.settings.trellis)]
    least = np.inf
    for parities in itertools.product((0, 1), repeat=len(sigma_index)):
        state, total = 0, 0.0
        for position, u in enumerate(parities):
            total += costs[position][trellis.quantizer[state]][u == ALL_K & 1].min()
            state = trellis.next_state[state, u]
        least = min(least, total)
    return float(least)


def path_cost(tables: Tables, indices: npt.NDArray[np.int32], costs: Any) -> float:
    context = contexts(indices[None], tables)[0]
    return float(sum(cost[c][k + MAX_INDEX] for cost, c, k in zip(costs, context, indices, strict=True)))


@st.composite
def problems(draw: st.DrawFn, kind: str) -> tuple[Tables, list[int], npt.NDArray[np.float32]]:
    trellis = draw(st.sampled_from(["vvc4", "vvc8", "ungerboeck16"])) if kind == "tcq" else None
    step_over_root = draw(st.floats(0.5, 5))  # Δ/√λ_q
    chosen = Settings(kind, trellis, draw(st.sampled_from([0.3, 0.7, 2.0])), 1 / step_over_root**2)
    tables = random_tables(chosen, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    levels = draw(st.lists(st.integers(0, SIGMA_LEVELS - 1), min_size=1, max_size=5))
    near, far = st.floats(-8, 8), st.floats(-500, 500)
    units = [draw(st.one_of(near, near, far)) for _ in levels]
    return tables, levels, np.array(units, np.float32) * np.float32(chosen.step)


def slack(tables: Tables, residual: npt.NDArray[np.float32]) -> float:
    """Levels beyond the alphabet are rounded to float32, the search's choice among them is not."""
    return 1e-9 + float(np.spacing(abs(residual).max())) * 4 * tables.settings.step


@examples(max_examples=40, deadline=None)
@given(problems("tcq"))
def test_search_equals_brute_force(problem: tuple[Tables, list[int], npt.NDArray[np.float32]]) -> None:
    tables, levels, residual = problem
    costs = [
        [costs_of_all(tables, s, c, float(r)) for c in (0, 1)] for s, r in zip(levels, residual, strict=True)
    ]
    indices = tcq.search(residual[None], np.array([levels], np.uint8), tables)[0]
    found, least = path_cost(tables, indices, costs), brute_force(tables, levels, costs)
    assert found == pytest.approx(least, rel=1e-9, abs=slack(tables, residual))


@examples(max_examples=60, deadline=None)
@given(problems("rdoq"))
def test_scalar_search_equals_brute_force(problem: tuple[Tables, list[int], npt.NDArray[np.float32]]) -> None:
    tables, levels, residual = problem
    indices = rdoq.search(residual[None], np.array([levels], np.uint8), tables)[0]
    for level, r, k in zip(levels, residual, indices, strict=True):
        costs = costs_of_all(tables, level, 0, float(r))
        assert costs[k + MAX_INDEX] == pytest.approx(costs.min(), rel=1e-9, abs=slack(tables, residual))


def test_search_equals_every_literal_path() -> None:
    """No cleverness at all: every triple of indices in −8 … 8."""
    rng = np.random.default_rng(7)
    for _ in range(3):
        tables = random_tables(Settings("tcq", "vvc8", 1.0, 0.5), rng)
        residual = rng.normal(0, 3, 3).astype(np.float32)
        costs = [[costs_of_all(tables, 20, c, float(r)) for c in (0, 1)] for r in residual]
        paths = (np.array(path, np.int32) for path in itertools.product(range(-8, 9), repeat=3))
        least = min(path_cost(tables, path, costs) for path in paths)
        found = tcq.search(residual[None], np.full((1, 3), 20, np.uint8), tables)[0]
        assert path_cost(tables, found, costs) == pytest.approx(least, rel=1e-12)


CASES = [(name, "quantizer") for name in TRELLISES] + [(name, "state") for name in STATE_CONTEXTS]
SHAPES = [(1, 300), (3, 257), (31, 9), (33, 33), (64, 8), (65, 31)]
"""Lanes empty, full, and of unequal length; positions within, at and beyond the tiles that the search works in."""


@pytest.mark.parametrize(("name", "context"), CASES)
def test_search_equals_plain_viterbi(name: str, context: str) -> None:
    """Residuals near and far; a third of them multiples of Δ/2, half-way between levels."""
    rng = np.random.default_rng(TRELLISES[name].states)
    step = 0.5  # a power of two: float32 has every level
    for lmbda_q in (0.05, 1.0):
        tables = random_tables(Settings("tcq", name, step, lmbda_q, context), rng)
        for shape in SHAPES:
            scale_CT = rng.choice([0.5, 3.0, 10.0, 40.0], p=[0.4, 0.3, 0.25, 0.05], size=shape)
            units_CT = rng.normal(size=shape) * scale_CT
            units_CT = np.where(rng.random(shape) < 1 / 3, np.rint(2 * units_CT) / 2, units_CT)
            residual_CT = (step * np.clip(units_CT, -2 * REACHED, 2 * REACHED)).astype(np.float32)
            sigma_index_CT = rng.integers(0, SIGMA_LEVELS, shape).astype(np.uint8)
            indices_CT = tcq.search(residual_CT, sigma_index_CT, tables)
            assert excess_cost(indices_CT, residual_CT, sigma_index_CT, tables) < 1e-11, (shape, lmbda_q)


@pytest.mark.parametrize("name", ["vvc8", "ungerboeck32"])
def test_ties_cost_the_same_whichever_is_taken(name: str) -> None:
    """Every code equally long, every residual on a level or half-way between two: nearly all is a tie."""
    chosen = Settings("tcq", name, 0.5, 0.1)
    K, rng = 3, np.random.default_rng(2)
    rows = [np.full((2, 2 * K + 2), TOTAL // (2 * K + 2), np.uint32)] * SIGMA_LEVELS
    lattice = chosen.lattice(np.arange(K + 1)).astype(np.float32)
    tables = Tables.from_rows(chosen, rows, [lattice] * SIGMA_LEVELS)
    residual_CT = (rng.integers(-12, 13, (33, 40)) / 4).astype(np.float32)
    sigma_index_CT = rng.integers(0, SIGMA_LEVELS, residual_CT.shape).astype(np.uint8)
    indices_CT = tcq.search(residual_CT, sigma_index_CT, tables)
    assert excess_cost(indices_CT, residual_CT, sigma_index_CT, tables) < 1e-11


def test_how_arrays_lie_in_memory_changes_nothing() -> None:
    rng = np.random.default_rng(6)
    tables = random_tables(Settings("tcq", "vvc8", 0.5, 0.3), rng)
    residual_CT = rng.normal(0, 2, (45, 37)).astype(np.float32)
    sigma_index_CT = rng.integers(0, SIGMA_LEVELS, residual_CT.shape).astype(np.uint8)
    found = quantize(residual_CT, sigma_index_CT, tables)
    turned = quantize(np.asfortranarray(residual_CT), np.asfortranarray(sigma_index_CT), tables)
    assert excess_cost(found.indices, residual_CT, sigma_index_CT, tables) < 1e-11
    for one, other in zip(found, turned, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", TRELLISES)
def test_every_state_has_two_ways_in_and_out(name: str) -> None:
    trellis = TRELLISES[name]
    previous, parity = trellis.predecessors()
    assert np.array_equal(
        trellis.next_state[previous, parity], np.arange(trellis.states)[:, None].repeat(2, 1)
    )
    assert (trellis.next_state[:, 0] != trellis.next_state[:, 1]).all()
    assert trellis.quantizer.sum() * 2 == trellis.states


def test_ungerboeck_of_four_states_by_hand() -> None:
    assert TRELLISES["ungerboeck4"].next_state.tolist() == [[0, 1], [2, 3], [1, 0], [3, 2]]


def test_a_lane_is_one_sequence() -> None:
    """Channels c, c + 32, c + 64 … of an image are quantized as if they were one long channel.

    Of paths that cost the same another might be taken; random levels leave none.
    """
    rng = np.random.default_rng(3)
    tables = random_tables(Settings("tcq", "vvc8", 0.7, 0.3), rng)
    residual_CT = rng.normal(0, 2, (2 * LANES + 5, 7)).astype(np.float32)
    sigma_index_CT = rng.integers(0, SIGMA_LEVELS, residual_CT.shape).astype(np.uint8)
    indices_CT = tcq.search(residual_CT, sigma_index_CT, tables)
    contexts_CT = contexts(indices_CT, tables)
    for lane in range(LANES):
        one = tcq.search(
            residual_CT[lane::LANES].reshape(1, -1), sigma_index_CT[lane::LANES].reshape(1, -1), tables
        )
        assert np.array_equal(one[0], indices_CT[lane::LANES].ravel())
        assert np.array_equal(contexts(one, tables)[0], contexts_CT[lane::LANES].ravel())


def test_contexts_by_hand() -> None:
    """VVC-8 from state 0 by parities 1, 0, 1, 1: states 0, 2, 1, 7, 5, of quantizers 0, 0, 1, 1, 1."""
    tables = midpoint_tables(Settings("tcq", "vvc8", 1.0, 0.1))
    assert contexts(np.array([[3, -2, -1, 5, 0]], np.int32), tables).tolist() == [[0, 0, 1, 1, 1]]


def test_a_huge_residual_does_not_blur_its_neighbours() -> None:
    tables = midpoint_tables(Settings("tcq", "vvc8", 0.7, 0.1))
    residual = np.random.default_rng(0).normal(0, 4, (1, 400)).astype(np.float32)
    residual[0, 200] = 3e38
    sigma_index = np.full(residual.shape, 30, np.uint8)
    found = quantize(residual, sigma_index, tables)
    after = np.square(found.reconstruction - residual, dtype=np.float64)[0, 210:]
    assert MAX_INDEX - 1 <= found.indices[0, 200] <= MAX_INDEX
    assert after.mean() < 0.7**2


@pytest.mark.parametrize(
    ("name", "gain_db"),
    [
        ("vvc4", 0.997),
        ("vvc8", 1.085),
        ("ungerboeck4", 0.994),
        ("ungerboeck16", 1.148),
        ("ungerboeck64", 1.253),
    ],
)
def test_granular_gain(name: str, gain_db: float) -> None:
    """Without rate, far from zero: the gain over a scalar quantizer of the same rate, whose step is 2Δ."""
    step = 0.25
    tables = midpoint_tables(Settings("tcq", name, step, 0.0))
    residual_CT = np.random.default_rng(0).uniform(-900, 900, (LANES, 8_000)).astype(np.float32)
    found = quantize(residual_CT, np.full(residual_CT.shape, SIGMA_LEVELS - 1, np.uint8), tables)
    error = np.square(found.reconstruction - residual_CT, dtype=np.float64).mean()
    assert 10 * np.log10((2 * step) ** 2 / 12 / error) == pytest.approx(gain_db, abs=0.02)


def test_a_trellis_quantizer_without_trellis_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'tcq' needs a `trellis`, such as 'vvc8'; found none"):
        design(Settings("tcq", None, 1.0, 0.1))
