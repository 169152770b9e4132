"""Viterbi's algorithm as textbooks have it, to check the search by: one lane at a time, every k, no thresholds.

"Every k" is |k| ≤ REACH. Of a branch a further one has no nearer level and no shorter code while |r| is at most REACHED
levels of its quantizer and the alphabets are smaller.

Shapes: n samples of a lane; C contexts; W = 2 · REACH + 1 indices; S states.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.frequencies import escape_bits, frequency_bits
from pipeline.quantizers.tables import Tables
from pipeline.quantizers.trellis import LANES
from pipeline.sigma import SIGMA_LEVELS

REACH, REACHED = 40, 36
K_W = np.arange(-REACH, REACH + 1)

Floats = npt.NDArray[np.float64]


def excess_cost(
    indices_CT: npt.NDArray[np.int32],
    residual_CT: npt.NDArray[np.float32],
    sigma_index_CT: npt.NDArray[np.uint8],
    tables: Tables,
) -> float:
    """How far a lane's cost lies from the least there is, relative to it: the worst lane's."""
    worst = 0.0
    for lane in range(min(LANES, len(indices_CT))):
        indices, residual, sigma_index = (
            a[lane::LANES].ravel() for a in (indices_CT, residual_CT, sigma_index_CT)
        )
        costs_nCW = _costs(residual, sigma_index, tables)
        least = _least_cost(costs_nCW, tables)
        worst = max(worst, abs(_path_cost(indices, costs_nCW, tables) - least) / max(least, 1e-9))
    return worst


def _least_cost(costs_nCW: Floats, tables: Tables) -> float:
    settings, odd = tables.settings, K_W & 1 == 1
    costs_nC2 = np.stack([costs_nCW[..., ~odd].min(-1), costs_nCW[..., odd].min(-1)], axis=-1)
    costs_S = np.full(settings.machine.states, np.inf)
    costs_S[0] = 0
    for costs_C2 in costs_nC2:
        before_S, costs_S = costs_S, np.full_like(costs_S, np.inf)
        ways_S2 = before_S[:, None] + costs_C2[settings.state_contexts]
        np.minimum.at(costs_S, settings.machine.next_state.astype(np.intp), ways_S2)
    return float(costs_S.min())


def _path_cost(indices: npt.NDArray[np.int32], costs_nCW: Floats, tables: Tables) -> float:
    settings, state, total = tables.settings, 0, 0.0
    for k, costs_CW in zip(indices.tolist(), costs_nCW, strict=True):
        total += costs_CW[settings.state_contexts[state], k + REACH]
        state = int(settings.machine.next_state[state, k & 1])
    return float(total)


def _costs(residual: npt.NDArray[np.float32], sigma_index: npt.NDArray[np.uint8], tables: Tables) -> Floats:
    """(r − r̂_k)² + λ_q·bits_k."""
    assert np.all(abs(residual) <= REACHED * tables.settings.spacing)
    points_LCW, rates_LCW = _levels_and_rates(tables)
    costs: Floats = (residual.astype(np.float64)[:, None, None] - points_LCW[sigma_index]) ** 2
    return costs + rates_LCW[sigma_index]


@lru_cache(maxsize=1)
def _levels_and_rates(tables: Tables) -> tuple[Floats, Floats]:
    """r̂_k and λ_q·bits_k of each σ level, from the definitions."""
    settings, m_W = tables.settings, abs(K_W)
    shape = SIGMA_LEVELS, settings.contexts, len(K_W)
    levels_LCW, rates_LCW = np.empty(shape), np.empty(shape)
    for level, context in np.ndindex(shape[:2]):
        K, quantizer = int(tables.alphabet[level]), settings.context_quantizers[context]
        bits, coded = frequency_bits(tables.frequency_rows(level)[context]), m_W <= K
        magnitude = settings.lattice(m_W)[quantizer].astype(np.float32)
        magnitude[coded] = tables.reconstruction_rows(level)[quantizer][m_W[coded]]
        levels_LCW[level, context] = np.sign(K_W) * magnitude.astype(np.float64)
        after_escape = bits[-1] + escape_bits(np.maximum(m_W - K - 1, 0))
        rates_LCW[level, context] = np.where(coded, bits[np.where(coded, K_W + K, 0)], after_escape)
    return levels_LCW, settings.lmbda_q * settings.step**2 * rates_LCW
