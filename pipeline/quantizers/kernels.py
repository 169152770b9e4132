"""Everything compiled. One file, because Numba's cache notices changes of a function's own file only.

Two more rules of that cache and of Numba's speed: arguments are arrays and numbers (a cache that names a class of
ours cannot be loaded once it is renamed), contiguous and writable (each other kind compiles again: see `plain`).

Shapes: C channels, T positions of a channel; S states of a trellis.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from pipeline.quantizers.tables import MAX_INDEX
from pipeline.quantizers.trellis import LANES

_Scalar = TypeVar("_Scalar", bound=np.generic)

_METRIC_LIMIT = 1e9


def plain(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """The array itself if contiguous and writable, else such a copy."""
    return np.require(array, requirements=("C_CONTIGUOUS", "WRITEABLE"))


@numba.njit(nogil=True, cache=True)
def hull(level: Any, offset: Any) -> Any:
    """Lower envelope of the lines offset − 2r·level, sorted by level: those kept, and the r at which each ends."""
    kept = np.empty(level.size, np.int64)
    end = np.empty(level.size, np.float64)
    n = 0
    for line in range(level.size):
        if n > 0 and level[kept[n - 1]] == level[line]:
            continue
        while n > 0:
            top = kept[n - 1]
            crossing = (offset[line] - offset[top]) / (2 * (level[line] - level[top]))
            if n > 1 and crossing <= end[n - 2]:
                n -= 1
            else:
                end[n - 1] = crossing
                break
        kept[n] = line
        n += 1
    end[n - 1] = np.inf
    return kept[:n], end[:n]


@numba.njit(nogil=True, cache=True)
def _best(r: float, number: int, branches: Any, guess: Any, lines: Any) -> Any:
    """The least cost (r − r̂_k)² + λ·bits_k in a branch's subset, |k| ≤ 32766, and its k; see envelope.py."""
    branch = branches[number]
    place = min(max(r, -branch.bound), branch.bound)
    line = guess[branch.first_bin + np.int64((place + branch.bound) * branch.bins_per_unit)]
    while r > lines[line].threshold:
        line += 1
    cost, k = (r - lines[line].level) ** 2 + lines[line].rate, lines[line].index
    if place == r:
        return cost, k
    return _search_escapes(r, branch, cost, k)


# Scalars and records only: an array as argument would be reference-counted in every call of `_best`, at 3× the time.
# And Python's check of the divisor would keep `_best` from being inlined.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _search_escapes(r: float, branch: Any, cost: float, k: int) -> Any:
    """The same where escapes on r's side may beat (cost, k): the nearest level within each code length."""
    K, u, stride = branch.alphabet, branch.subset, branch.stride
    place = min((abs(r) + branch.shift) / branch.spacing, MAX_INDEX + 1.0)
    nearest = u + stride * np.int64(np.rint((place - u) / stride))
    rate = branch.escape_rate + 2 * branch.bit_rate  # of a sign bit and the code of excess 0
    length = 1  # excesses length − 1 … 2·length − 2 have codes of one length
    while K + length <= min(place + stride, MAX_INDEX):
        low, high = K + length, min(K + 2 * length - 1, MAX_INDEX)
        low, high = low + (u - low) % stride, high - (high - u) % stride
        if low <= high:
            m = min(max(nearest, low), high)
            level = np.float64(np.float32(m * branch.spacing - branch.shift))
            m_cost = (abs(r) - level) ** 2 + rate
            if m_cost < cost:
                cost, k = m_cost, m if r > 0 else -m
        length, rate = 2 * length, rate + 2 * branch.bit_rate
    return cost, k


@numba.njit(nogil=True, cache=True)
def search_each(residual: Any, sigma_index: Any, branches: Any, guess: Any, lines: Any, indices: Any) -> None:
    """Fill in the best index of each residual by itself; one branch a σ level."""
    for i in range(residual.size):
        indices[i] = _best(np.float64(residual[i]), np.int64(sigma_index[i]), branches, guess, lines)[1]


# In the trellis search `into`, uint8 [S, 2, 2], has the two ways into each state: the state before, and the branch
# (2·context + parity). A σ level has four branches.


@numba.njit(nogil=True, cache=True)
def search_lanes(
    residual_CT: Any, sigma_index_CT: Any, branches: Any, guess: Any, lines: Any, into: Any, indices_CT: Any
) -> None:
    """Fill in the indices of the best path of each lane."""
    channels, positions = residual_CT.shape
    longest = (channels + LANES - 1) // LANES * positions
    survivors = np.empty((longest, (len(into) + 7) // 8), np.uint8)
    for lane in range(min(LANES, channels)):
        r, sigma_index, k = residual_CT[lane::LANES], sigma_index_CT[lane::LANES], indices_CT[lane::LANES]
        state = _forward(r, sigma_index, branches, guess, lines, into, survivors)
        _trace_back(survivors[: r.size], into, state)
        _choose(r, sigma_index, branches, guess, lines, survivors, np.int64(into[:, :, 1].max()) + 1, k)


@numba.njit(nogil=True, cache=True)
def _forward(
    residual_CT: Any, sigma_index_CT: Any, branches: Any, guess: Any, lines: Any, into: Any, survivors: Any
) -> Any:
    """Viterbi's algorithm over a lane: fills `survivors`, a bit a state (which way in), returns the best last state."""
    states, (channels, positions) = len(into), residual_CT.shape
    ways = np.int64(into[:, :, 1].max()) + 1
    metric, following, cost = np.full(states, np.inf), np.empty(states), np.empty(ways)
    metric[0] = 0.0
    step = 0
    for channel in range(channels):
        for position in range(positions):
            r = np.float64(residual_CT[channel, position])
            first = ways * np.int64(sigma_index_CT[channel, position])
            for branch in range(ways):
                cost[branch] = _best(r, first + branch, branches, guess, lines)[0]
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
    residual_CT: Any,
    sigma_index_CT: Any,
    branches: Any,
    guess: Any,
    lines: Any,
    path: Any,
    ways: int,
    indices_CT: Any,
) -> None:
    """The indices along a path: to find one again is cheaper than to keep four a position."""
    channels, positions = residual_CT.shape
    step = 0
    for channel in range(channels):
        for position in range(positions):
            r = np.float64(residual_CT[channel, position])
            branch = ways * np.int64(sigma_index_CT[channel, position]) + path[step, 0]
            indices_CT[channel, position] = _best(r, branch, branches, guess, lines)[1]
            step += 1


@numba.njit(nogil=True, cache=True)
def follow(indices_CT: Any, next_state: Any, context: Any, contexts_CT: Any) -> None:
    """Fill in the context in which a trellis codes each index."""
    channels, positions = indices_CT.shape
    for lane in range(min(LANES, channels)):
        state = 0
        for channel in range(lane, channels, LANES):
            for position in range(positions):
                contexts_CT[channel, position] = context[state]
                state = next_state[state, indices_CT[channel, position] & 1]


@numba.njit(nogil=True, cache=True)
def fill_bits(
    sigma_index: Any,
    contexts: Any,
    indices: Any,
    alphabet: Any,
    start: Any,
    symbol: Any,
    escape: Any,
    bits: Any,
) -> None:
    """Fill in each index's code length: its symbol's, or the escape's and that of the excess |k| − K − 1."""
    for i in range(indices.size):
        k, K = indices[i], alphabet[sigma_index[i]]
        row = start[sigma_index[i]] + contexts[i] * (2 * K + 2)
        if abs(k) <= K:
            bits[i] = symbol[row + K + k]
        else:
            bits[i] = symbol[row + 2 * K + 1] + escape[abs(k) - K - 1]


@numba.njit(nogil=True, cache=True)
def fill_levels(
    sigma_index: Any,
    quantizers: Any,
    indices: Any,
    alphabet: Any,
    start: Any,
    point: Any,
    lattice: Any,
    levels: Any,
) -> None:
    """Fill in each index's level: the point of |k| with k's sign, beyond the alphabet the lattice's."""
    for i in range(indices.size):
        k, K = indices[i], alphabet[sigma_index[i]]
        if abs(k) <= K:
            level = point[start[sigma_index[i]] + quantizers[i] * (K + 1) + abs(k)]
        else:
            level = lattice[quantizers[i], abs(k)]
        levels[i] = -level if k < 0 else level
