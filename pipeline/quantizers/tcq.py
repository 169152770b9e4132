"""Trellis-coded quantization (dependent quantization): two quantizers in turn, the path found by Viterbi's algorithm.

Quantizer Q0 has the levels 2kΔ, Q1 has (2k − sgn k)Δ; the parity of k moves the trellis. Levels lie 2Δ apart in each
and Δ apart in their union, so a trellis takes the rate of a step of 2Δ and has less distortion: denser packing.
Sources: Marcellin and Fischer, IEEE Trans. Commun. 38 (1990); Schwarz et al., DCC 2019 (VVC's dependent quantization).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pipeline.quantizers.envelope import best, envelopes
from pipeline.quantizers.tables import Settings, Tables
from pipeline.quantizers.trellis import LANES, TRELLISES, Trellis, follow

DEFAULTS = Settings("tcq", "vvc8", step=0.7, lmbda_q=0.1)

_METRIC_LIMIT = 1e9


def check(settings: Settings) -> None:
    """Raise ValueError unless the settings name a trellis."""
    if settings.trellis is None:
        raise ValueError(f"quantizer tcq: expected a trellis, one of {', '.join(TRELLISES)}; found none")


def contexts(indices_CT: npt.NDArray[np.int32], settings: Settings) -> npt.NDArray[np.uint8]:
    """The quantizer (0 or 1) of the state in which each index is coded, uint8 [C, T]."""
    trellis = _trellis(settings)
    return follow(indices_CT, trellis.next_state, trellis.quantizer)


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] of least (r − r̂)² + λ_q·bits in total, over all paths and all |k| ≤ 32766, lane by lane."""
    trellis = _trellis(tables.settings)
    previous, parity = trellis.predecessors()
    into = np.stack([previous, 2 * trellis.quantizer[previous] + parity], axis=-1)
    indices_CT = np.empty(residual_CT.shape, np.int32)
    _search_lanes(residual_CT, sigma_index_CT, *envelopes(tables, 2), into, indices_CT)
    return indices_CT


def _trellis(settings: Settings) -> Trellis:
    check(settings)
    return TRELLISES[str(settings.trellis)]


# `into`, uint8 [S, 2, 2]: the two ways into each state, each the state before and the branch (2·context + parity).


@numba.njit(nogil=True, cache=True)
def _search_lanes(
    residual_CT: Any, sigma_index_CT: Any, branches: Any, guess: Any, lines: Any, into: Any, indices_CT: Any
) -> None:
    channels, positions = residual_CT.shape
    longest = (channels + LANES - 1) // LANES * positions
    survivors = np.empty((longest, (len(into) + 7) // 8), np.uint8)
    for lane in range(min(LANES, channels)):
        r, sigma_index, k = residual_CT[lane::LANES], sigma_index_CT[lane::LANES], indices_CT[lane::LANES]
        state = _forward(r, sigma_index, branches, guess, lines, into, survivors)
        _trace_back(survivors[: r.size], into, state)
        _choose(r, sigma_index, branches, guess, lines, survivors, k)


@numba.njit(nogil=True, cache=True)
def _forward(
    residual_CT: Any, sigma_index_CT: Any, branches: Any, guess: Any, lines: Any, into: Any, survivors: Any
) -> Any:
    """Viterbi algorithm over a lane: fills `survivors`, one bit a state (which way in), returns the best last state."""
    states, (channels, positions) = len(into), residual_CT.shape
    metric, following, cost = np.full(states, np.inf), np.empty(states), np.empty(4)
    metric[0] = 0.0
    step = 0
    for channel in range(channels):
        for position in range(positions):
            r, first = (
                np.float64(residual_CT[channel, position]),
                4 * np.int64(sigma_index_CT[channel, position]),
            )
            for branch in range(4):
                cost[branch] = best(r, first + branch, branches, guess, lines)[0]
            for byte in range(survivors.shape[1]):
                bits = np.int64(0)
                for state in range(8 * byte, min(8 * byte + 8, states)):
                    one = metric[into[state, 0, 0]] + cost[into[state, 0, 1]]
                    other = metric[into[state, 1, 0]] + cost[into[state, 1, 1]]
                    bits |= np.int64(other < one) << (state & 7)
                    following[state] = min(one, other)
                survivors[step, byte] = bits
            metric, following = following, metric
            if metric[0] > _METRIC_LIMIT:  # huge costs must not swallow the small ones after them
                metric -= metric.min()
            step += 1
    return np.int64(np.argmin(metric))


@numba.njit(nogil=True, cache=True)
def _trace_back(survivors: Any, into: Any, state: Any) -> None:
    """Follow the best path backwards; the branch it takes replaces the first byte of each position's survivors."""
    for step in range(len(survivors) - 1, -1, -1):
        way = (survivors[step, state >> 3] >> (state & 7)) & 1
        survivors[step, 0] = into[state, way, 1]
        state = np.int64(into[state, way, 0])


@numba.njit(nogil=True, cache=True)
def _choose(
    residual_CT: Any, sigma_index_CT: Any, branches: Any, guess: Any, lines: Any, path: Any, indices_CT: Any
) -> None:
    """The indices along a path: to find one again is cheaper than to keep four a position."""
    channels, positions = residual_CT.shape
    step = 0
    for channel in range(channels):
        for position in range(positions):
            r, first = (
                np.float64(residual_CT[channel, position]),
                4 * np.int64(sigma_index_CT[channel, position]),
            )
            indices_CT[channel, position] = best(r, first + path[step, 0], branches, guess, lines)[1]
            step += 1
