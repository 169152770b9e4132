"""Streams of indices: what the coder needs of tables, and the checks around the compiled loops.

A stream is the coders' states, 5 bytes each, then 16-bit words, all little-endian. It is whole if a decoder that has
read all indices has read all words as well, and all its states are back where the encoder started.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.bitstream import kernels
from pipeline.bitstream.kernels import LOW, READ_AHEAD, WORDS_A_SYMBOL, Model
from pipeline.codec.hyper_table import HyperTable
from pipeline.frequencies import PRECISION_BITS, TOTAL
from pipeline.quantizers.kernels import plain
from pipeline.quantizers.tables import Settings, Tables
from pipeline.quantizers.trellis import SCALAR
from pipeline.sigma import SIGMA_LEVELS

STATE_BYTES = 5
COARSE_BITS = (6, 11)  # of the coarse index: at least, at most

Levels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


class BitstreamError(ValueError):
    """Bytes that no encoder wrote, or that another codec wrote."""


class Machine(NamedTuple):
    """What makes contexts of the indices before: next state uint8 [S, 2] by parity, context of a state uint8 [S]."""

    next_state: npt.NDArray[np.uint8]
    context: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, settings: Settings) -> Machine:
        """The machine of a quantizer."""
        return cls(settings.machine.next_state, settings.state_contexts)


UNCONNECTED = Machine(SCALAR.next_state, SCALAR.quantizer)
"""Always the one context."""


def latent_model(tables: Tables) -> Model:
    """The model of indices; a level is a σ index."""
    return _model(tables.settings.contexts, map(tables.frequency_rows, range(SIGMA_LEVELS)))


def hyper_model(table: HyperTable) -> Model:
    """The model of hyper indices; a level is a channel."""
    return _model(1, (table.row(channel)[None] for channel in range(len(table.limits))))


def encode_stream(
    indices_CT: npt.NDArray[np.int32],
    contexts_CT: npt.NDArray[np.uint8],
    level_CT: Levels,
    model: Model,
    coders: int,
) -> bytes:
    """One stream. The arguments are not checked.

    Args:
        indices_CT: |k| ≤ 32766.
        contexts_CT, level_CT: which row of the model codes each index.
        coders: a power of two; each costs 5 bytes.
    """
    arrays = plain(indices_CT), plain(contexts_CT), plain(level_CT)
    escapes = kernels.count_escapes(arrays[0], arrays[2], model)
    words = np.empty(1 + indices_CT.size + (WORDS_A_SYMBOL - 1) * escapes, np.uint16)
    states = np.full(coders, LOW, np.int64)
    begin = kernels.encode(*arrays, model, states, words)
    heads = b"".join(int(state).to_bytes(STATE_BYTES, "little") for state in states)
    return heads + words[begin:].astype("<u2").tobytes()


def decode_stream(
    stream: bytes, level_CT: Levels, model: Model, machine: Machine, *, limit: int, coders: int
) -> npt.NDArray[np.int32]:
    """The indices int32 [C, T] of one stream.

    Args:
        level_CT: the level of each index, within the model.
        limit: largest |k| there can be.
        coders: as many as it was encoded with.

    Raises:
        BitstreamError: no encoder wrote this stream for these levels and this model.
    """
    head = coders * STATE_BYTES
    if len(stream) < head or (len(stream) - head) % 2:
        raise BitstreamError(
            f"expected {head} bytes and a whole number of 16-bit words, found {len(stream)} bytes"
        )
    places = range(0, head, STATE_BYTES)
    states = np.array([int.from_bytes(stream[i : i + STATE_BYTES], "little") for i in places], np.int64)
    if states.min() < LOW:
        raise BitstreamError(f"expected coder states of at least {LOW}, found {states.min()}")
    count = (len(stream) - head) // 2
    words = np.zeros(count + READ_AHEAD, np.uint16)
    words[:count] = np.frombuffer(stream, "<u2", count, head)
    indices_CT = np.empty(level_CT.shape, np.int32)
    used = kernels.decode(plain(level_CT), *map(plain, machine), model, limit, states, words, indices_CT)
    _check_end(used, count, states, limit)
    return indices_CT


def _check_end(used: int, count: int, states: npt.NDArray[np.int64], limit: int) -> None:
    if used == kernels.OUT_OF_RANGE:
        raise BitstreamError(f"expected indices of at most {limit} in magnitude, found a larger one")
    if used == kernels.OUT_OF_WORDS or used > count:
        raise BitstreamError(f"expected more than the {count} words that there are")
    if used < count:
        raise BitstreamError(f"expected {used} words, found {count}")
    if (states != LOW).any():
        raise BitstreamError(f"expected the coders to end in state {LOW}, found {states.tolist()}")


def _model(contexts: int, levels: Iterable[npt.NDArray[np.uint32]]) -> Model:
    """Lay out the rows of each level in turn, each level uint32 [contexts, 2K + 2]."""
    rows: list[tuple[int, int, int, int]] = []
    starts, coarse = [], []
    first = coarse_first = 0
    for frequencies in levels:
        symbols = frequencies.shape[1]
        bits = int(np.clip((symbols - 1).bit_length() + 1, *COARSE_BITS))
        slots = np.arange(0, TOTAL, TOTAL >> bits)
        for row in frequencies:
            sums = np.concatenate([np.zeros(1, np.uint32), np.cumsum(row, dtype=np.uint32)])
            rows.append((first, coarse_first, PRECISION_BITS - bits, symbols // 2 - 1))
            starts.append(sums)
            coarse.append(np.searchsorted(sums, slots, side="right") - 1)
            first, coarse_first = first + len(sums), coarse_first + len(slots)
    table = np.array(rows, np.uint32).reshape(-1, contexts, 4)
    return Model(table, np.concatenate(starts), np.concatenate(coarse).astype(np.uint16))
