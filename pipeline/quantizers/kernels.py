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


@numba.njit(nogil=True, cache=True)
def count(
    residual: Any,
    sigma_index: Any,
    contexts: Any,
    indices: Any,
    alphabet: Any,
    frequency_start: Any,
    reconstruction_start: Any,
    context_quantizer: Any,
    counts: Any,
    uses: Any,
    sums: Any,
) -> None:
    """Add up what was chosen: each symbol, escapes as one; each |k| coded without escape, and its sgn(k)·r."""
    for i in range(indices.size):
        level, context, k = sigma_index[i], contexts[i], indices[i]
        K = np.int64(alphabet[level])
        row = frequency_start[level] + context * (2 * K + 2)
        if abs(k) <= K:
            counts[row + K + k] += 1
            point = reconstruction_start[level] + context_quantizer[context] * (K + 1) + abs(k)
            uses[point] += 1
            sums[point] += np.sign(k) * np.float64(residual[i])
        else:
            counts[row + 2 * K + 1] += 1
