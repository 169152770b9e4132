"""Tables: their bytes, what they refuse, what they charge."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from pipeline.frequencies import TOTAL, escape_bits, frequency_bits
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.lookup import code_bits, reconstruct
from pipeline.quantizers.tables import METADATA_KEY, Settings, Tables
from pipeline.sigma import SIGMA_LEVELS, sigma_levels

URQ = Settings("urq", None, 1.0, 0.0)
TCQ = Settings("tcq", "vvc8", 0.7, 0.1)


def with_array(data: bytes, name: str, values: npt.NDArray[np.generic]) -> bytes:
    arrays = safetensors.numpy.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    written: bytes = safetensors.numpy.save({**arrays, name: values}, metadata=header["__metadata__"])
    return written


def test_sigma_levels_are_those_of_the_design() -> None:
    levels = sigma_levels()
    assert len(levels) == SIGMA_LEVELS
    assert levels[[0, -1]].tolist() == pytest.approx([0.11, 256])
    assert np.diff(np.log(levels)) == pytest.approx(np.log(256 / 0.11) / 63)


@pytest.mark.parametrize("chosen", [URQ, TCQ])
def test_bytes_round_trip(chosen: Settings) -> None:
    tables = midpoint_tables(chosen)
    again = Tables.from_bytes(tables.to_bytes())
    assert again.settings == chosen
    assert again.to_bytes() == tables.to_bytes()
    assert again.digest == tables.digest != midpoint_tables(replace(chosen, step=0.9)).digest


def test_bytes_of_other_things_are_refused() -> None:
    with pytest.raises(ValueError, match="tables: expected safetensors bytes, found 5 others"):
        Tables.from_bytes(b"hello")
    with pytest.raises(ValueError, match=r"expected the arrays \['alphabet', .*found \['weight'\]"):
        Tables.from_bytes(safetensors.numpy.save({"weight": np.zeros(3)}))
    arrays = safetensors.numpy.load(midpoint_tables(URQ).to_bytes())

    def with_header(header: dict[str, object]) -> bytes:
        written: bytes = safetensors.numpy.save(arrays, metadata={METADATA_KEY: json.dumps(header)})
        return written

    with pytest.raises(ValueError, match=f"expected metadata '{METADATA_KEY}', found .*; not a table file"):
        Tables.from_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(ValueError, match="expected format version 2, found 1; read it with the release"):
        Tables.from_bytes(with_header({"version": 1, "settings": {}}))
    with pytest.raises(ValueError, match=r"expected the settings \['context', 'kind', .*found \['kind'\]"):
        Tables.from_bytes(with_header({"version": 2, "settings": {"kind": "urq"}}))


def test_damaged_arrays_are_named() -> None:
    tables = midpoint_tables(TCQ)
    data = tables.to_bytes()
    with pytest.raises(ValueError, match=r"frequencies: expected uint16 in 1 dimension, found float32 \("):
        Tables.from_bytes(with_array(data, "frequencies", tables.frequencies.astype(np.float32)))
    with pytest.raises(ValueError, match="alphabet: expected 64 entries, found 63"):
        Tables.from_bytes(with_array(data, "alphabet", tables.alphabet[:63]))
    with pytest.raises(ValueError, match="alphabet: expected 1 to 2047 everywhere, found -4 to -4"):
        Tables.from_bytes(with_array(data, "alphabet", np.full(64, -4, np.int32)))
    with pytest.raises(ValueError, match=r"frequencies: expected \d+ entries, found 100"):
        Tables.from_bytes(with_array(data, "frequencies", tables.frequencies[:100]))
    shifted = tables.frequencies.copy()
    shifted[0] += 1
    with pytest.raises(ValueError, match=f"frequencies of σ level 0: expected .* sum to {TOTAL}, found sums"):
        Tables.from_bytes(with_array(data, "frequencies", shifted))
    for place, value in ((1, np.nan), (0, 0.1)):
        points = tables.reconstruction.copy()
        points[place] = value
        with pytest.raises(
            ValueError, match="reconstruction of σ level 0: expected finite points, 0 for k = 0"
        ):
            Tables.from_bytes(with_array(data, "reconstruction", points))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("tcq", "vvc9", 1.0, 0.1), "trellis: expected one of vvc4, vvc8, .*found 'vvc9'"),
        (("tcq", "vvc8", 0.0, 0.1), r"step Δ: expected 0.05 to 64.0 \(latent units\), found 0.0"),
        (("urq", None, float("nan"), 0.0), "step Δ: expected .* found nan"),
        (("rdoq", None, 1.0, -1.0), "lmbda_q .*: expected 0 to 1000000.0, found -1.0"),
        (("rdoq", None, 1.0, float("inf")), "lmbda_q .* found inf"),
    ],
)
def test_impossible_settings_are_refused(values: tuple[str, str | None, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(*values)


def test_lattice_is_the_two_quantizers_of_the_literature() -> None:
    assert TCQ.lattice([0, 1, 2]).tolist() == [pytest.approx([0, 1.4, 2.8]), pytest.approx([0, 0.7, 2.1])]
    assert URQ.lattice([0, 1, 2]).tolist() == [[0, 1, 2]]


def test_code_bits_and_levels_are_the_tables() -> None:
    """Against the definitions, symbol by symbol, escapes included; any σ level may be asked about any index."""
    tables = midpoint_tables(TCQ)
    rng = np.random.default_rng(2)
    level = rng.integers(0, SIGMA_LEVELS, (4, 50)).astype(np.uint8)
    context = rng.integers(0, 2, level.shape).astype(np.uint8)
    index = np.rint(rng.normal(0, 3, level.shape) * 10.0 ** rng.integers(0, 4, level.shape)).astype(np.int32)
    bits, points = code_bits(tables, level, context, index), reconstruct(tables, level, context, index)
    assert bits.shape == points.shape == level.shape
    for place in np.ndindex(level.shape):
        s, c, k = int(level[place]), int(context[place]), int(index[place])
        K, row = int(tables.alphabet[s]), frequency_bits(tables.frequency_rows(s)[c])
        if abs(k) <= K:
            expected, point = row[k + K], tables.reconstruction_rows(s)[c, abs(k)]
        else:
            expected = row[-1] + escape_bits(np.array(abs(k) - K - 1))
            point = np.float32(TCQ.lattice(abs(k))[c, 0])
        assert bits[place] == np.float32(expected)
        assert points[place] == np.sign(k) * point


def test_lookups_refuse_what_would_read_beyond_the_tables() -> None:
    tables = midpoint_tables(TCQ)
    level, context, index = np.zeros(3, np.uint8), np.zeros(3, np.uint8), np.zeros(3, np.int32)
    with pytest.raises(
        ValueError, match=r"indices: expected \|k\| ≤ 32766, found -32768 to 0; missing latents"
    ):
        code_bits(tables, level, context, np.array([0, -32768, 0], np.int32))
    with pytest.raises(ValueError, match="indices: expected int32, found int64"):
        code_bits(tables, level, context, index.astype(np.int64))
    with pytest.raises(ValueError, match="σ indices: expected at most 63, found 64"):
        code_bits(tables, level + 64, context, index)
    with pytest.raises(ValueError, match=r"σ indices: expected uint8 \(3,\).* found uint8 \(2,\)"):
        code_bits(tables, level[:2], context, index)
    with pytest.raises(ValueError, match="contexts: expected at most 1, found 2"):
        code_bits(tables, level, context + 2, index)
    with pytest.raises(ValueError, match=r"contexts: expected uint8 \(3,\), found int64 \(3,\)"):
        code_bits(tables, level, context.astype(np.int64), index)
