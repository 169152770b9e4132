"""The entropy coder: round trips, against a decoder written from docs/format.md alone, sizes, hostile streams."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import plain_decoder
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from pipeline.bitstream.rans import (
    STATE_BYTES,
    UNCONNECTED,
    BitstreamError,
    Machine,
    decode_stream,
    encode_stream,
    hyper_model,
    latent_model,
)
from pipeline.codec.hyper_table import HyperTable
from pipeline.frequencies import TOTAL, integer_frequencies
from pipeline.quantizers import Settings, Tables, contexts, sequence_bits
from pipeline.quantizers.tables import MAX_INDEX
from pipeline.sigma import SIGMA_LEVELS

Indices = npt.NDArray[np.int32]
Levels = npt.NDArray[np.uint8]
CHOSEN = (
    Settings("urq", None, 1.0, 0.0),
    Settings("tcq", "vvc4", 0.7, 0.1),
    Settings("tcq", "vvc8", 0.7, 0.1, "state"),
    Settings("tcq", "ungerboeck256", 0.7, 0.1),
)
SCALE = 5.0  # of test indices


@cache
def random_tables(chosen: Settings, seed: int = 0) -> Tables:
    """Tables of no meaning: alphabets of 1 to 40, among them rows in which one symbol has almost everything."""
    rng = np.random.default_rng(seed)
    alphabet = rng.integers(1, 40, SIGMA_LEVELS)
    frequencies = [
        integer_frequencies(rng.random((chosen.contexts, 2 * K + 2)) ** rng.integers(1, 30)) for K in alphabet
    ]
    points = [chosen.lattice(np.arange(K + 1)).astype(np.float32) for K in alphabet]
    return Tables.from_rows(chosen, frequencies, points)


def random_indices(shape: tuple[int, int], seed: int) -> tuple[Indices, Levels]:
    """Indices of which some escape and a few are extreme, and their levels."""
    rng = np.random.default_rng(seed)
    indices = np.rint(rng.laplace(0, SCALE, shape)).astype(np.int32)
    extreme = rng.random(shape)
    indices[extreme < 0.01] = MAX_INDEX
    indices[extreme > 0.99] = -MAX_INDEX
    return indices, rng.integers(0, SIGMA_LEVELS, shape).astype(np.uint8)


def encode(indices_CT: Indices, level_CT: Levels, tables: Tables, coders: int) -> bytes:
    return encode_stream(indices_CT, contexts(indices_CT, tables), level_CT, latent_model(tables), coders)


def decode(stream: bytes, level_CT: Levels, tables: Tables, coders: int) -> Indices:
    machine = Machine.of(tables.settings)
    return decode_stream(stream, level_CT, latent_model(tables), machine, limit=MAX_INDEX, coders=coders)


def plainly(stream: bytes, coders: int, level_CT: Levels, tables: Tables) -> Indices:
    """The stream as a decoder reads it that was written from docs/format.md."""
    chosen = tables.settings

    def row(channel: int, position: int, state: int) -> list[int]:
        rows = tables.frequency_rows(level_CT[channel, position])
        frequencies: list[int] = rows[chosen.state_contexts[state]].tolist()
        return frequencies

    def following(state: int, k: int) -> int:
        return int(chosen.machine.next_state[state, k % 2])

    return plain_decoder.Coders(stream, coders).indices(level_CT.shape, row, following)


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: chosen.trellis or "scalar")
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 20)),
    coders=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**16),
)
@effort(deadline=None, max_examples=30)
def test_round_trip(chosen: Settings, shape: tuple[int, int], coders: int, seed: int) -> None:
    tables = random_tables(chosen, seed % 4)
    indices, levels = random_indices(shape, seed)
    stream = encode(indices, levels, tables, coders)
    assert np.array_equal(decode(stream, levels, tables, coders), indices)
    assert encode(decode(stream, levels, tables, coders), levels, tables, coders) == stream


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: chosen.trellis or "scalar")
@pytest.mark.parametrize("coders", [1, 2])
def test_a_decoder_written_from_the_specification_agrees(chosen: Settings, coders: int) -> None:
    tables = random_tables(chosen)
    indices, levels = random_indices((67, 9), seed=3)
    stream = encode(indices, levels, tables, coders)
    assert np.array_equal(plainly(stream, coders, levels, tables), indices)


def test_bytes_of_a_stream_are_fixed() -> None:
    """Golden bytes: a change of them is another format version."""
    frequencies = [integer_frequencies(np.array([[1, 2, 9, 3, 1, 1]]))] * SIGMA_LEVELS
    scalar = CHOSEN[0]
    points = [scalar.lattice(np.arange(3)).astype(np.float32)] * SIGMA_LEVELS
    tables = Tables.from_rows(scalar, frequencies, points)
    indices = np.array([[0, 1, -1, 0, 2], [0, 0, -2, 7, 0], [32766, 0, -32766, 0, 0]], np.int32)
    levels = np.zeros(indices.shape, np.uint8)
    assert encode(indices, levels, tables, coders=2).hex() == GOLDEN
    assert np.array_equal(plainly(bytes.fromhex(GOLDEN), 2, levels, tables), indices)


GOLDEN = "e4676c05002d60e601000200f0fff0d15f02f0ff8074"


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: chosen.trellis or "scalar")
def test_size_is_the_estimate(chosen: Settings) -> None:
    """Within 0.01 %: 24 bits of state over 16 of frequency; and what is there before the first symbol."""
    tables = random_tables(chosen)
    indices, levels = random_indices((64, 400), seed=1)
    estimate = sequence_bits(indices, levels, tables).sum() / 8
    found = len(encode(indices, levels, tables, coders=2))
    assert 0 <= found - estimate <= 2 * STATE_BYTES + 1e-4 * estimate


def test_nothing_costs_the_states_alone() -> None:
    empty = np.zeros((5, 0), np.int32)
    stream = encode(empty, empty.astype(np.uint8), random_tables(CHOSEN[0]), coders=4)
    assert stream == (1 << 24).to_bytes(5, "little") * 4


def test_likely_symbols_cost_next_to_nothing() -> None:
    row = np.ones((1, 4))
    row[0, 1] = 1e9
    table = HyperTable(np.array([1], np.int32), integer_frequencies(row)[0])
    zeros = np.zeros((1, 1_000_000), np.int32)
    levels = zeros.astype(np.uint16)
    model = hyper_model(table)
    stream = encode_stream(zeros, zeros.astype(np.uint8), levels, model, 1)
    ideal = zeros.size * (16 - math.log2(TOTAL - 3)) / 8
    assert len(stream) <= 1.01 * ideal + STATE_BYTES + 1
    assert np.array_equal(decode_stream(stream, levels, model, UNCONNECTED, limit=4095, coders=1), zeros)


def damaged(stream: bytes, rng: np.random.Generator) -> bytes:
    """A stream with some bytes changed, cut off, or added."""
    data = bytearray(stream)
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 5)):
            data[place] ^= int(rng.integers(1, 256))
    elif kind == 1:
        del data[int(rng.integers(len(data))) :]
    elif kind == 2:
        data += rng.bytes(int(rng.integers(1, 20)))
    else:
        data = bytearray(rng.bytes(int(rng.integers(400))))
    return bytes(data)


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda chosen: chosen.trellis or "scalar")
def test_damaged_streams_are_refused(chosen: Settings) -> None:
    """The states have to come back to where the encoder started: 2^-24 a coder that chance does it."""
    tables, rng = random_tables(chosen), np.random.default_rng(5)
    indices, levels = random_indices((40, 30), seed=2)
    stream = encode(indices, levels, tables, coders=2)
    for _ in range(150):
        hostile = damaged(stream, rng)
        with pytest.raises(BitstreamError, match=r"expected .*found|expected more than"):
            decode(hostile, levels, tables, coders=2)


def test_messages_about_streams() -> None:
    tables = random_tables(CHOSEN[0])
    indices, levels = random_indices((40, 30), seed=2)
    stream = encode(indices, levels, tables, coders=1)

    def told(hostile: bytes, limit: int = MAX_INDEX) -> str:
        with pytest.raises(BitstreamError) as error:
            decode_stream(hostile, levels, latent_model(tables), UNCONNECTED, limit=limit, coders=1)
        return str(error.value)

    assert told(b"1234") == "expected 5 bytes and a whole number of 16-bit words, found 4 bytes"
    assert told(stream + b"x").endswith(f"found {len(stream) + 1} bytes")
    assert told(bytes(5) + stream[5:]) == f"expected coder states of at least {1 << 24}, found 0"
    words = (len(stream) - 5) // 2
    assert told(stream + b"xy") == f"expected {words} words, found {words + 1}"
    assert told(stream[:-200]) == f"expected more than the {words - 100} words that there are"
    assert told(stream, limit=100) == "expected indices of at most 100 in magnitude, found a larger one"
    changed = bytearray(stream)
    changed[-1] ^= 1
    assert told(bytes(changed)).startswith(
        (f"expected the coders to end in state {1 << 24}, found [", "expected")
    )


def test_a_prefix_longer_than_any_index_ends_the_decoder() -> None:
    """Sixteen zero bits after an escape: a state whose slots are the escape, then plus, then zeros for ever."""
    row = integer_frequencies(np.array([[1, 1, 1, 1000]]))[0]
    model = hyper_model(HyperTable(np.array([1], np.int32), row))
    start = int(row[:3].sum())
    # the escape leaves frequency · (x >> 16) + slot − start; chosen so that its 16 bits are 0
    x = next(
        (high << 16) | (start + rest)
        for high in range(1 << 8, 1 << 16)
        if (rest := -int(row[3]) * high % TOTAL) < row[3]
    )
    with pytest.raises(BitstreamError, match="at most 4095 in magnitude, found a larger one"):
        decode_stream(
            x.to_bytes(5, "little"), np.zeros((1, 1), np.uint16), model, UNCONNECTED, limit=4095, coders=1
        )
