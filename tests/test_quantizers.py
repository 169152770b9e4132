"""The contract that every quantizer keeps, whatever it chooses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt
import pytest

from pipeline import quantizers
from pipeline.frequencies import escape_bits, frequency_bits
from pipeline.quantizers import QUANTIZERS, Quantized
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.tables import MAX_INDEX, Settings, Tables
from pipeline.sigma import SIGMA_LEVELS, sigma_levels

CASES = [quantizers.settings(kind) for kind in QUANTIZERS] + [
    quantizers.settings("tcq", "vvc4", 1.0, 0.3),
    quantizers.settings("tcq", "ungerboeck16", 0.4, 0.0),
    quantizers.settings("tcq", "vvc8", 0.9, context="state"),
    quantizers.settings("rdoq", step=0.5, lmbda_q=0.6),
    quantizers.settings("deadzone", step=0.8, offset=tuple(np.linspace(0.2, 0.5, SIGMA_LEVELS).tolist())),
]


@pytest.fixture(params=CASES, ids=lambda chosen: f"{chosen.kind}-{chosen.trellis}-{chosen.step:g}")
def tables(request: pytest.FixtureRequest) -> Tables:
    return midpoint_tables(request.param)


def image(channels: int = 70, positions: int = 40) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Residuals of every σ level, with tails far heavier than the tables expect."""
    rng = np.random.default_rng(4)
    sigma_index_CT = rng.integers(0, SIGMA_LEVELS, (channels, positions)).astype(np.uint8)
    residual_CT = sigma_levels()[sigma_index_CT] * rng.standard_t(2, sigma_index_CT.shape)
    residual_CT[:, 0] *= 100
    return np.clip(residual_CT, -8000, 8000).astype(np.float32), sigma_index_CT


def bits_by_hand(found: Quantized, sigma_index_CT: npt.NDArray[np.uint8], tables: Tables) -> list[float]:
    context_CT = quantizers.contexts(found.indices, tables)
    total = [0.0] * len(found.indices)
    for (c, t), k in np.ndenumerate(found.indices):
        level = int(sigma_index_CT[c, t])
        K, row = int(tables.alphabet[level]), frequency_bits(tables.frequency_rows(level)[context_CT[c, t]])
        total[c] += row[k + K] if abs(k) <= K else row[-1] + float(escape_bits(np.array(abs(k) - K - 1)))
    return total


def test_a_decoder_gets_the_same_reconstruction(tables: Tables) -> None:
    residual_CT, sigma_index_CT = image()
    found = quantizers.quantize(residual_CT, sigma_index_CT, tables)
    assert found.indices.dtype == np.int32
    assert found.reconstruction.dtype == np.float32
    again = quantizers.dequantize(found.indices, sigma_index_CT, Tables.from_bytes(tables.to_bytes()))
    assert again.tobytes() == found.reconstruction.tobytes()


def test_bits_are_those_of_the_tables(tables: Tables) -> None:
    residual_CT, sigma_index_CT = image()
    found = quantizers.quantize(residual_CT, sigma_index_CT, tables)
    assert found.bits.shape == (len(residual_CT),)
    assert found.bits == pytest.approx(bits_by_hand(found, sigma_index_CT, tables), rel=1e-12)
    assert np.array_equal(found.bits, quantizers.sequence_bits(found.indices, sigma_index_CT, tables))


def test_threads_change_nothing(tables: Tables) -> None:
    residual_CT, sigma_index_CT = image()

    def run(threads: int) -> bytes:
        numba.set_num_threads(threads)  # of this thread alone
        found = quantizers.quantize(residual_CT, sigma_index_CT, tables)
        return found.indices.tobytes() + found.reconstruction.tobytes() + found.bits.tobytes()

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(run, [1, numba.config.NUMBA_NUM_THREADS] * 4))
    assert len(found) == 1


def test_a_deadzone_of_its_own_for_each_level() -> None:
    offsets = tuple(np.linspace(0, 0.5, SIGMA_LEVELS).tolist())
    chosen = midpoint_tables(quantizers.settings("deadzone", offset=offsets))
    sigma_index_CT = np.arange(SIGMA_LEVELS, dtype=np.uint8)[:, None].repeat(2, axis=1)
    edge = 1 - np.array(offsets)[:, None]
    residual_CT = np.add(edge, [-1e-3, 1e-3]).astype(np.float32)
    for sign in (1, -1):
        found = quantizers.quantize(sign * residual_CT, sigma_index_CT, chosen)
        assert np.array_equal(found.indices, np.tile([0, sign], (SIGMA_LEVELS, 1)))


def test_the_error_stays_within_the_step(tables: Tables) -> None:
    """A quantizer that weights the rate may give up accuracy, but not more than the bits it could save."""
    residual_CT, sigma_index_CT = image()
    found = quantizers.quantize(residual_CT, sigma_index_CT, tables)
    error = np.square(found.reconstruction - residual_CT, dtype=np.float64).mean() / tables.settings.step**2
    assert error < 0.34 + tables.settings.lmbda_q * found.bits.sum() / residual_CT.size


def test_nothing_depends_on_what_comes_later(tables: Tables) -> None:
    """In lane order: the contexts of channels 0 … 31 stay when channels after them change."""
    residual_CT, sigma_index_CT = image()
    indices_CT = quantizers.quantize(residual_CT, sigma_index_CT, tables).indices
    changed_CT = indices_CT.copy()
    changed_CT[32:] ^= 1
    before, after = quantizers.contexts(indices_CT, tables), quantizers.contexts(changed_CT, tables)
    assert before.max() < tables.settings.contexts
    assert np.array_equal(before[:32], after[:32])


def test_zero_is_zero(tables: Tables) -> None:
    found = quantizers.quantize(np.zeros((3, 5), np.float32), np.zeros((3, 5), np.uint8), tables)
    assert not found.indices.any()
    assert not found.reconstruction.any()


def test_indices_saturate_short_of_the_fill_value(tables: Tables) -> None:
    limits = np.finfo(np.float32)
    residual_CT = np.array([[limits.max, limits.min, 1e6, -1e6]], np.float32)
    found = quantizers.quantize(residual_CT, np.zeros((1, 4), np.uint8), tables)
    assert (abs(found.indices) <= MAX_INDEX).all()
    assert (abs(found.indices) >= MAX_INDEX - 1).all()
    assert np.array_equal(np.sign(found.indices), np.sign(residual_CT))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_image_is_none_to_trip_over(tables: Tables, shape: tuple[int, int]) -> None:
    found = quantizers.quantize(np.zeros(shape, np.float32), np.zeros(shape, np.uint8), tables)
    assert found.indices.shape == shape
    assert found.bits.tolist() == [0.0] * shape[0]


def test_inputs_may_be_views(tables: Tables) -> None:
    residual_CT, sigma_index_CT = image()
    found = quantizers.quantize(residual_CT[::2, ::-1], sigma_index_CT[::2, ::-1], tables)
    copies = quantizers.quantize(residual_CT[::2, ::-1].copy(), sigma_index_CT[::2, ::-1].copy(), tables)
    assert np.array_equal(found.indices, copies.indices)
    assert np.array_equal(found.bits, copies.bits)


def test_what_is_not_finite_is_named_with_its_place(tables: Tables) -> None:
    residual_CT, sigma_index_CT = image()
    for value in (np.nan, np.inf, -np.inf):
        residual_CT[3, 17] = value
        with pytest.raises(
            ValueError, match=r"finite values, found (nan|-?inf) in channel 3, position 17 \(1 of"
        ):
            quantizers.quantize(residual_CT, sigma_index_CT, tables)


def test_wrong_arrays_are_refused(tables: Tables) -> None:
    residual_CT, sigma_index_CT = image()
    with pytest.raises(ValueError, match=r"residuals: expected float32 \[C, T\], found float64 \(70, 40\)"):
        quantizers.quantize(residual_CT.astype(np.float64), sigma_index_CT, tables)
    with pytest.raises(ValueError, match=r"residuals: expected float32 \[C, T\], found float32 \(40,\)"):
        quantizers.quantize(residual_CT[0], sigma_index_CT[0], tables)
    with pytest.raises(ValueError, match=r"σ indices: expected uint8 \(70, 40\).* found int64"):
        quantizers.quantize(residual_CT, sigma_index_CT.astype(np.int64), tables)
    with pytest.raises(ValueError, match="σ indices: expected at most 63, found 64"):
        quantizers.quantize(residual_CT, np.full_like(sigma_index_CT, 64), tables)
    with pytest.raises(ValueError, match=r"indices: expected int32 \[C, T\], found int32 \(4,\)"):
        quantizers.contexts(np.zeros(4, np.int32), tables)
    with pytest.raises(ValueError, match=r"indices: expected \|k\| ≤ 32766, found -32768 to"):
        quantizers.dequantize(np.full((70, 40), -32768, np.int32), sigma_index_CT, tables)


def test_settings_fill_in_defaults_and_refuse_what_has_no_use() -> None:
    assert quantizers.settings("urq") == Settings("urq", None, 1.0, 0.0)
    assert quantizers.settings("tcq", "vvc4", step=0.8) == Settings("tcq", "vvc4", 0.8, 0.1)
    with pytest.raises(ValueError, match=r"quantizer kind: expected one of urq, .*, found 'vq'"):
        quantizers.settings("vq")
    with pytest.raises(
        ValueError, match=r"kind 'urq' takes no `lmbda_q`, found 0\.1; 'rdoq' and 'tcq' can use it"
    ):
        quantizers.settings("urq", lmbda_q=0.1)
    with pytest.raises(ValueError, match="kind 'rdoq' takes no `trellis`, found vvc8; 'tcq' can use it"):
        quantizers.settings("rdoq", trellis="vvc8")
    assert quantizers.settings("urq", lmbda_q=0.0) == quantizers.settings("urq")  # none is none
    with pytest.raises(ValueError, match=r"kind 'urq' takes no `offset`, found \(0\.0,\); 'deadzone' can"):
        quantizers.settings("urq", offset=(0.0,))
    with pytest.raises(ValueError, match=r"kind: expected one of urq, .*, found 'vq'"):
        quantizers.design(Settings("vq", None, 1.0, 0.0))


def test_rdoq_without_rate_is_urq_and_with_it_costs_less() -> None:
    residual_CT, sigma_index_CT = image()
    plain = quantizers.settings("rdoq", lmbda_q=0.0)
    urq = quantizers.quantize(residual_CT, sigma_index_CT, midpoint_tables(quantizers.settings("urq")))
    rdoq = quantizers.quantize(residual_CT, sigma_index_CT, midpoint_tables(plain))
    assert np.array_equal(urq.indices, rdoq.indices)
    weighted = quantizers.quantize(residual_CT, sigma_index_CT, midpoint_tables(quantizers.settings("rdoq")))
    assert weighted.bits.sum() < urq.bits.sum()
