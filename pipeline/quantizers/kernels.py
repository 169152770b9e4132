"""The compiled loops of everything that follows from indices; those of the search are in `search_kernels`.

Shapes: C channels, T positions of a channel; S states of a trellis.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from pipeline.quantizers.trellis import LANES

_Scalar = TypeVar("_Scalar", bound=np.generic)


def plain(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """The array itself if contiguous and writable, else such a copy: for each other kind Numba would compile again."""
    return np.require(array, requirements=("C_CONTIGUOUS", "WRITEABLE"))


_TOGETHER = 8
"""Lanes followed at once: a lane's next state is long in coming."""
_U = np.uint64
"""Indices that cannot be negative: Numba then leaves out what it would do if they were."""


@numba.njit(nogil=True, cache=True)
def follow(indices_CT: Any, next_state: Any, context: Any, contexts_CT: Any) -> None:
    """Fill in the context in which a trellis codes each index."""
    channels, positions = indices_CT.shape
    arrays = indices_CT.reshape(-1), next_state.reshape(-1), context, contexts_CT.reshape(-1)
    state = np.zeros(LANES, np.uint64)
    for channel in range(0, channels, _TOGETHER):
        lanes = state[channel % LANES : channel % LANES + _TOGETHER]
        if channels - channel >= _TOGETHER:  # a constant, for which LLVM unrolls
            _follow_lanes(*arrays, lanes, channel * positions, positions, _TOGETHER)
        else:
            _follow_lanes(*arrays, lanes, channel * positions, positions, channels - channel)


@numba.njit(nogil=True, cache=True)
def _follow_lanes(
    indices: Any, ways: Any, context: Any, contexts: Any, state: Any, start: int, positions: int, lanes: int
) -> None:
    """`follow` through a channel of each of some neighbouring lanes."""
    for position in range(start, start + positions):
        for lane in range(lanes):
            at, s = _U(position + lane * positions), state[_U(lane)]
            contexts[at] = context[s]
            state[_U(lane)] = ways[_U(2) * s + _U(indices[at] & 1)]


@numba.njit(nogil=True, cache=True)
def fill_bits(
    sigma_index: Any,
    contexts: Any,
    indices: Any,
    alphabet: Any,
    row: Any,
    symbol: Any,
    escape: Any,
    bits: Any,
) -> None:
    """Fill in each index's code length: its symbol's, or the escape's and that of the excess |k| − K − 1."""
    for i in range(indices.size):
        k, K, first = indices[i], alphabet[sigma_index[i]], row[sigma_index[i], contexts[i]]
        if abs(k) <= K:
            bits[i] = symbol[_U(first + K + k)]
        else:
            bits[i] = symbol[_U(first + 2 * K + 1)] + escape[_U(abs(k) - K - 1)]


@numba.njit(nogil=True, cache=True)
def fill_levels(
    sigma_index: Any,
    contexts: Any,
    indices: Any,
    alphabet: Any,
    row: Any,
    point: Any,
    lattice: Any,
    levels: Any,
) -> None:
    """Fill in each index's level: the point of |k| with k's sign, beyond the alphabet the lattice's."""
    for i in range(indices.size):
        k, first = indices[i], row[sigma_index[i], contexts[i]]
        within = abs(k) <= alphabet[sigma_index[i]]
        level = point[_U(first + abs(k))] if within else lattice[contexts[i], _U(abs(k))]
        levels[i] = -level if k < 0 else level


@numba.njit(nogil=True, cache=True)
def count(
    residual: Any,
    sigma_index: Any,
    contexts: Any,
    indices: Any,
    alphabet: Any,
    row: Any,
    point: Any,
    counts: Any,
    uses: Any,
    sums: Any,
) -> None:
    """Add up what was chosen: each symbol, escapes as one; each |k| coded without escape, and its sgn(k)·r."""
    for i in range(indices.size):
        level, context, k = sigma_index[i], contexts[i], indices[i]
        K, first = np.int64(alphabet[level]), row[level, context]
        if abs(k) <= K:
            counts[first + K + k] += 1
            used = point[level, context] + abs(k)
            uses[used] += 1
            sums[used] += np.sign(k) * np.float64(residual[i])
        else:
            counts[first + 2 * K + 1] += 1
