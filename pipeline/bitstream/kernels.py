"""Interleaved rANS, compiled: indices to 16-bit words and back. docs/format.md says the same in formulas.

A coder's state x lies in [2^24, 2^40) between symbols; a symbol of frequency f out of 2^16 multiplies it by about
2^16 / f on the way in and divides it on the way out, and words move what does not fit (Duda, arXiv 1311.2540; several
states in turn: Giesen, arXiv 1402.3392). A state has 8 to 24 bits more than a frequency, so that rounding x / f down
loses little.

Order of symbols: blocks of 32 channels, in a block position by position, at a position channel by channel. So
neighbours belong to different lanes of the trellis and to different coders, and the CPU works on several at once.

Shapes: C channels, T positions; L levels, each with a K and with a row of frequencies for each context; S states of a
trellis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from pipeline.quantizers.trellis import LANES

FREQUENCY_BITS = 16
WORD_BITS = 16
LOW = 1 << 24
"""Least state between symbols, where the encoder starts and the decoder has to end."""
WORDS_A_SYMBOL = 4  # an escape, its sign, its prefix, its suffix
READ_AHEAD = LANES * WORDS_A_SYMBOL
"""Words that a decoder may read before it looks whether there were as many: what `decode` wants behind the last."""
PREFIX_MAX = 14  # excess + 1 = 32766 − K has at most 15 bits

OUT_OF_WORDS, OUT_OF_RANGE = -1, -2  # what `decode` returns for streams that no encoder wrote

_MASK = (1 << WORD_BITS) - 1
_FIRST, _COARSE, _SHIFT, _LIMIT = range(4)


class Model(NamedTuple):
    """Frequencies as the coder wants them. Unsigned, so that no index has to be compared with 0.

    Attributes:
        rows: uint32 [L, contexts, 4]: where its starts and its coarse index begin, 16 − the bits of that index, and K.
        starts: uint32, each row's running sums of frequencies: 0, …, 2^16 (2K + 3 of them).
        coarse: uint16, for each value of a slot's upper bits the first symbol that such slots can have.
    """

    rows: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.uint32]
    coarse: npt.NDArray[np.uint16]


@numba.njit(nogil=True, cache=True)
def _push(x: Any, start: Any, frequency: Any, words: Any, position: Any) -> Any:
    """Put one symbol into a state; words fill from the end. Selected, not branched: a word is full at random."""
    full = x >= frequency << 24
    words[position - 1] = x & _MASK
    x = x >> WORD_BITS if full else x
    position -= full
    # exact: x < 2^40, and a quotient that is no integer is at least 2^-16 away from one
    quotient = np.int64(np.float64(x) / np.float64(frequency))
    return (quotient << FREQUENCY_BITS) + (x - quotient * frequency) + start, position


@numba.njit(nogil=True, cache=True)
def _pull(x: Any, start: Any, frequency: Any, words: Any, position: Any) -> Any:
    """Take one symbol out of a state. Selected, not branched, as in `_push`."""
    x = frequency * (x >> FREQUENCY_BITS) + (x & _MASK) - start
    refill = x < LOW
    x = (x << WORD_BITS) | np.int64(words[position]) if refill else x
    return x, position + refill


@numba.njit(nogil=True, cache=True)
def _push_excess(x: Any, k: Any, K: Any, words: Any, position: Any) -> Any:
    """What follows an escape, last part first: suffix, prefix, sign."""
    value = abs(k) - K
    bits = 0
    while value >> (bits + 1):
        bits += 1
    x, position = _push(x, (value - (1 << bits)) << (16 - bits), 1 << (16 - bits), words, position)
    x, position = _push(x, 1 << (15 - bits), 1 << (15 - bits), words, position)
    return _push(x, (1 << 15) if k < 0 else 0, 1 << 15, words, position)


@numba.njit(nogil=True, cache=True)
def _pull_excess(x: Any, K: Any, words: Any, position: Any) -> Any:
    """The index after an escape, and the state; where the prefix is longer than any index's, K instead of an index."""
    negative = (x & _MASK) >> 15
    x, position = _pull(x, negative << 15, 1 << 15, words, position)
    bits = 0
    while bits <= PREFIX_MAX and not (x & _MASK) >> (15 - bits):
        bits += 1
    if bits > PREFIX_MAX:
        return x, position, K
    x, position = _pull(x, 1 << (15 - bits), 1 << (15 - bits), words, position)
    suffix = (x & _MASK) >> (16 - bits)
    x, position = _pull(x, suffix << (16 - bits), 1 << (16 - bits), words, position)
    magnitude = K + (1 << bits) + suffix
    return x, position, -magnitude if negative else magnitude


@numba.njit(nogil=True, cache=True)
def count_escapes(indices_CT: Any, level_CT: Any, model: Any) -> int:
    """How many indices lie beyond their alphabet."""
    escapes = 0
    for channel in range(indices_CT.shape[0]):
        for position in range(indices_CT.shape[1]):
            escapes += abs(indices_CT[channel, position]) > model.rows[level_CT[channel, position], 0, _LIMIT]
    return escapes


@numba.njit(nogil=True, cache=True)
def encode(indices_CT: Any, contexts_CT: Any, level_CT: Any, model: Any, states: Any, words: Any) -> int:
    """Code all indices, last first.

    Args:
        states: int64, a power of two of them, all `LOW`; afterwards those that a decoder starts with.
        words: filled from the end; room for one, one more a symbol and three more an escape.

    Returns:
        Where the words begin.
    """
    channels, positions = indices_CT.shape
    at = words.size
    for block in range((channels - 1) // LANES * LANES, -1, -LANES):
        for position in range(positions - 1, -1, -1):
            for channel in range(min(block + LANES, channels) - 1, block - 1, -1):
                coder = channel & (states.size - 1)
                x = states[coder]
                k = np.int64(indices_CT[channel, position])
                row = model.rows[level_CT[channel, position], contexts_CT[channel, position]]
                K = np.int64(row[_LIMIT])
                symbol = row[_FIRST] + K + k
                if abs(k) > K:
                    x, at = _push_excess(x, k, K, words, at)
                    symbol = row[_FIRST] + 2 * K + 1
                start = np.int64(model.starts[symbol])
                frequency = np.int64(model.starts[symbol + 1]) - start
                states[coder], at = _push(x, start, frequency, words, at)
    return at


@numba.njit(nogil=True, cache=True)
def decode(
    level_CT: Any,
    next_state: Any,
    context: Any,
    model: Any,
    limit: Any,
    states: Any,
    words: Any,
    indices_CT: Any,
) -> int:
    """Fill in the indices; the trellis (`next_state` [S, 2], `context` [S]) follows along. For any input it ends.

    Args:
        limit: largest |k| there can be.
        states: int64, as the encoder left them, below 2^40; afterwards all are `LOW` if the stream is whole.
        words: with `READ_AHEAD` zeros behind the last.

    Returns:
        How many words were read, or `OUT_OF_WORDS` or `OUT_OF_RANGE`.
    """
    channels, positions = level_CT.shape
    lanes = np.zeros(LANES, np.uint8)
    at, last = 0, words.size - READ_AHEAD
    for block in range(0, channels, LANES):
        for position in range(positions):
            if at > last:
                return OUT_OF_WORDS
            for channel in range(block, min(block + LANES, channels)):
                coder, lane = channel & (states.size - 1), channel - block
                x = states[coder]
                row = model.rows[level_CT[channel, position], context[lanes[lane]]]
                first, K = np.int64(row[_FIRST]), np.int64(row[_LIMIT])
                slot = x & _MASK
                symbol = first + model.coarse[row[_COARSE] + (slot >> row[_SHIFT])]
                end = np.int64(model.starts[symbol + 1])
                while end <= slot:  # a row's last entry is beyond every slot
                    symbol += 1
                    end = np.int64(model.starts[symbol + 1])
                start = np.int64(model.starts[symbol])
                x, at = _pull(x, start, end - start, words, at)
                k = symbol - first - K
                if k > K:
                    x, at, k = _pull_excess(x, K, words, at)
                    if k == K or abs(k) > limit:
                        return OUT_OF_RANGE
                states[coder] = x
                indices_CT[channel, position] = k
                lanes[lane] = next_state[lanes[lane], k & 1]
    return at
