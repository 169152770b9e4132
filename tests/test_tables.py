"""Tables: their bytes, what they refuse, what they charge, and how good the designed ones are."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from pipeline import quantizers
from pipeline.frequencies import TOTAL, escape_bits, frequency_bits, integer_frequencies
from pipeline.quantizers import lloyd
from pipeline.quantizers.lloyd import gather, gaussian_cells, midpoint_tables, retabulate
from pipeline.quantizers.lookup import code_bits, reconstruct
from pipeline.quantizers.tables import METADATA_KEY, Settings, Tables
from pipeline.sigma import SIGMA_LEVELS, sigma_levels

URQ = Settings("urq", None, 1.0, 0.0)
TCQ = Settings("tcq", "vvc8", 0.7, 0.1)


@cache
def designed(chosen: Settings) -> Tables:
    return quantizers.design(chosen, centroids=True)


def gap_db(tables: Tables, sigma: float, level: int) -> tuple[float, float]:
    """Bits a sample, and how far the error of N(0, σ²) samples lies above D(R) = σ²·2^(−2R)."""
    unit = np.random.default_rng(11).standard_normal((768, 192))
    residual_CT = (unit * (sigma / np.sqrt(np.square(unit).mean()))).astype(np.float32)
    found = quantizers.quantize(residual_CT, np.full(residual_CT.shape, level, np.uint8), tables)
    bits = found.bits.sum() / residual_CT.size
    error = np.square(found.reconstruction - residual_CT, dtype=np.float64).mean()
    return bits, 10 * np.log10(error / (sigma**2 * 2 ** (-2 * bits)))


def midpoint_tables_at(chosen: Settings, sigma: float) -> Tables:
    """Midpoint tables of one σ that is not among the levels, in place of level 63's."""
    tables = midpoint_tables(chosen)
    rows = [tables.frequency_rows(level) for level in range(SIGMA_LEVELS - 1)]
    points = [tables.reconstruction_rows(level) for level in range(SIGMA_LEVELS - 1)]
    K = int(np.ceil(4 * sigma / chosen.spacing)) + 1
    cells = integer_frequencies(gaussian_cells(chosen, K, sigma))
    lattice = chosen.lattice(np.arange(K + 1)).astype(np.float32)
    return Tables.from_rows(chosen, [*rows, cells], [*points, lattice])


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
        (("rdoq", None, 1.0, -1.0), "lmbda_q .*: expected a finite number, at least 0, found -1.0"),
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


def test_gaussian_cells_are_probabilities_between_midpoints() -> None:
    cells = gaussian_cells(TCQ, 5, sigma=1.0)
    assert cells.shape == (2, 12)
    assert cells.sum(-1) == pytest.approx(1)
    assert np.array_equal(cells[:, :11], cells[:, 10::-1])
    # Q0's zero: |r| < Δ = 0.7; Q1's: |r| < Δ/2
    assert cells[:, 5] == pytest.approx([0.516073, 0.273661], abs=1e-6)


def test_counts_replace_a_prior_as_they_grow() -> None:
    tables = midpoint_tables(URQ)
    residual = np.full((1, 100_000), 1.2, np.float32)
    level, context = np.full(residual.shape, 40, np.uint8), np.zeros(residual.shape, np.uint8)
    counted = retabulate(
        tables, gather(tables, residual, level, context, np.ones(residual.shape, np.int32)), centroids=True
    )
    K = int(tables.alphabet[40])
    assert counted.frequency_rows(40)[0, K + 1] > 0.99 * TOTAL
    assert counted.reconstruction_rows(40)[0, 1] == pytest.approx(1.2, abs=1e-4)
    assert np.array_equal(counted.frequency_rows(39), tables.frequency_rows(39))
    assert np.array_equal(counted.reconstruction_rows(39), tables.reconstruction_rows(39))


@pytest.mark.parametrize(
    ("chosen", "sigma", "expected_db"),
    [
        # λ_q is 0.10 in latent units: over Δ² it would be 0.33
        (Settings("tcq", "vvc8", 0.55, 0.10 / 0.55**2), 4.18, 0.536),
        (Settings("tcq", "vvc8", 0.55, 0.10 / 0.55**2), 1.02, 0.822),
        (URQ, 4.18, 1.550),
        (URQ, 1.02, 1.868),
    ],
)
def test_gap_of_midpoint_tables(chosen: Settings, sigma: float, expected_db: float) -> None:
    _, found_db = gap_db(midpoint_tables_at(chosen, sigma), sigma, SIGMA_LEVELS - 1)
    assert found_db == pytest.approx(expected_db, abs=0.04)


@pytest.mark.parametrize(
    ("level", "least", "most"), [(20, 1.2, 1.3), (24, 1.85, 2.05), (26, 2.25, 2.4), (30, 3.0, 3.2)]
)
def test_gap_of_designed_tables(level: int, least: float, most: float) -> None:
    """VVC-8's best gaps by rate: 1.04 → 0.62, 1.35 → 0.56, 2.27 → 0.49, 3.15 → 0.47 dB."""
    tables = designed(Settings("tcq", "vvc8", 1.0, 0.5))
    bits, found_db = gap_db(tables, float(sigma_levels()[level]), level)
    assert least < bits < most
    assert found_db < np.interp(bits, [1.04, 1.35, 2.27, 3.15], [0.62, 0.56, 0.49, 0.47]) + 0.04


def test_design_depends_on_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd, "_SCHEDULE", ((2, 200),))
    assert (
        quantizers.design(TCQ).digest
        == quantizers.design(TCQ).digest
        != quantizers.design(TCQ, seed=1).digest
    )


def test_design_beats_midpoints_at_low_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd, "_SCHEDULE", ((6, 4_000),))
    chosen = Settings("rdoq", None, 1.0, 0.3)
    better = quantizers.design(chosen, centroids=True)
    for level in (14, 18, 22):
        sigma = float(sigma_levels()[level])
        costs = []
        for tables in (better, midpoint_tables(chosen)):
            bits, gap = gap_db(tables, sigma, level)
            costs.append(sigma**2 * 2 ** (-2 * bits) * 10 ** (gap / 10) + 0.3 * bits)
        assert costs[0] < costs[1]


def test_points_stay_on_the_lattice_unless_centroids_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd, "_SCHEDULE", ((2, 500),))
    plain, plainest = quantizers.design(TCQ), midpoint_tables(TCQ)
    assert np.array_equal(plain.reconstruction, plainest.reconstruction)
    assert not np.array_equal(plain.frequencies, plainest.frequencies)
    assert not np.array_equal(quantizers.design(TCQ, centroids=True).reconstruction, plain.reconstruction)


def test_design_of_urq_is_the_gaussian() -> None:
    """Against the cells' exact probabilities and, for |k| = 1, the exact centroid."""
    sigma, normal = float(sigma_levels()[18]), NormalDist()
    cells = gaussian_cells(URQ, int(designed(URQ).alphabet[18]), sigma)[0]
    assert designed(URQ).frequency_rows(18)[0] / TOTAL == pytest.approx(cells, abs=3e-4)
    low, high = 0.5 / sigma, 1.5 / sigma
    centroid = sigma * (normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low))
    assert designed(URQ).reconstruction_rows(18)[0, 1] == pytest.approx(centroid, abs=1e-3)
