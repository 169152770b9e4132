"""Integer symbol frequencies: one truth for the quantizers' search, the rate estimate and the entropy coder.

A distribution over S symbols is S integers, each at least 1, that sum to 2**PRECISION_BITS. Its last symbol is
by convention the escape; what lies beyond the alphabet follows as a sign bit and an Exp-Golomb code of order 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PRECISION_BITS = 16
TOTAL = 1 << PRECISION_BITS


def integer_frequencies(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """Round distributions to integer frequencies that sum to 2**16, none of them 0.

    Args:
        probabilities: shape (..., S), non-negative; each row is normalised first. S is at most 2**15.

    Returns:
        uint32, shape (..., S). Largest remainders decide the rounding, so the result is deterministic.
    """
    p = np.asarray(probabilities, np.float64)
    symbols = p.shape[-1]
    if symbols > TOTAL // 2:
        raise ValueError(f"expected at most {TOTAL // 2} symbols in a distribution, found {symbols}")
    spare = TOTAL - symbols  # every symbol gets 1 before the rest is shared out
    share = p / p.sum(-1, keepdims=True) * spare
    floor = np.floor(share)
    missing = np.rint(spare - floor.sum(-1)).astype(np.int64)
    order = np.argsort(-(share - floor), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    frequencies: npt.NDArray[np.uint32] = (1 + floor + (rank < missing[..., None])).astype(np.uint32)
    return frequencies


def frequency_bits(frequencies: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Ideal code length of each symbol in bits: 16 − log2(frequency); same shape."""
    bits: npt.NDArray[np.float64] = PRECISION_BITS - np.log2(frequencies.astype(np.float64))
    return bits


def escape_bits(excess: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Bits after an escape: a sign and the Exp-Golomb code (order 0) of `excess` = |k| − K − 1 ≥ 0; same shape."""
    prefix = np.floor(np.log2(np.asarray(excess, np.float64) + 1))
    bits: npt.NDArray[np.float64] = 1 + 2 * prefix + 1
    return bits
