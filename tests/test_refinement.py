"""Effort: J falls, decoders need nothing new, and experiments know which results it enters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hostile_files import photograph, small_codec, small_coder

from pipeline import shipped
from pipeline.bitstream import ImageCoder
from pipeline.codec.artifact import Codec
from pipeline.coding import CodedImage, analyse, code, decode_latent, synthesise
from pipeline.quantizers import Settings, dequantize, quantize, sequence_bits, settings
from pipeline.quantizers.envelope import grid
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.refinement import Refinement
from pipeline.sigma import SIGMA_LEVELS

GOLDEN_COST = 182800.9


def cost(codec: Codec, coded: CodedImage, pixels: np.ndarray, lmbda: float) -> float:
    """J in bits of the whole image, of the picture as it is decoded."""
    decoded = synthesise(codec, coded.latent, *pixels.shape[:2]).astype(float)
    return coded.bits_y + coded.bits_z + lmbda / 3 * float(np.square(decoded - pixels).sum())


def test_a_real_codec_trades_better() -> None:
    coder = ImageCoder.from_bytes(shipped.codec_file(3))
    codec, lmbda = coder.codec, shipped.SHIPPED[3].lmbda
    pixels = photograph(128, 200)
    plain = code(codec, coder.tables, pixels)
    refined = code(codec, coder.tables, pixels, Refinement(4, lmbda))
    assert cost(codec, refined, pixels, lmbda) < 0.995 * cost(codec, plain, pixels, lmbda)
    assert np.array_equal(refined.hyper_indices, plain.hyper_indices)
    found = decode_latent(codec, coder.tables, refined.indices, refined.hyper_indices)
    assert np.array_equal(found, refined.latent)
    file = coder.encode(pixels, Refinement(4, lmbda))
    assert np.array_equal(coder.decode(file), synthesise(codec, refined.latent, 128, 200))


@pytest.mark.parametrize("kind", ["urq", "tcq"])
@pytest.mark.parametrize(("steps", "lmbda"), [(3, 1e-6), (3, 1.0), (12, 1e30), (2, 1e38)])
def test_no_image_gets_worse(kind: str, steps: int, lmbda: float) -> None:
    """Steps that are far too long, with the last λ beyond all numbers, lead nowhere: the encoder's latents stay."""
    codec, tables = small_codec(), small_coder(kind).tables
    pixels = photograph(70, 40)
    plain = code(codec, tables, pixels)
    refined = code(codec, tables, pixels, Refinement(steps, lmbda))
    # pictures are rounded to 8 bits here, in the search they are not
    assert cost(codec, refined, pixels, lmbda) <= 1.001 * cost(codec, plain, pixels, lmbda)


def test_the_first_target_is_what_the_encoder_gives() -> None:
    codec, tables = small_codec(), small_coder("tcq").tables
    pixels = photograph(64, 64)
    a = analyse(codec, pixels)
    residual = (a.latent - a.means).reshape(12, -1)
    by_hand = quantize(residual, a.sigma_index.reshape(12, -1), tables).indices
    assert np.array_equal(code(codec, tables, pixels).indices.reshape(12, -1), by_hand)


def test_later_images_use_the_searches_of_earlier_ones() -> None:
    codec, tables = small_codec(), small_coder("tcq").tables
    images = [photograph(*size) for size in ((70, 40), (64, 64), (40, 70), (90, 60))]
    built = []
    for pixels in images:
        before = grid.cache_info().misses
        code(codec, tables, pixels, Refinement(8, 0.01))
        built.append(grid.cache_info().misses - before)
    assert sum(built[1:]) < 0.5 * 8 * len(built[1:])


def test_effort_without_steps_or_trade_is_refused() -> None:
    for wrong in ({"steps": 0}, {"lmbda": 0.0}, {"lmbda": float("nan")}):
        with pytest.raises(ValueError, match=r"expected at least one step and a λ above 0, found"):
            replace(Refinement(1, 0.01), **wrong)


def test_golden_effort() -> None:
    """When this moves, `EFFORT_VERSION` must, too."""
    codec, tables = small_codec(), small_coder("tcq").tables
    pixels = photograph(70, 40)
    refined = code(codec, tables, pixels, Refinement(3, 0.01))
    assert cost(codec, refined, pixels, 0.01) == pytest.approx(GOLDEN_COST, rel=3e-4)


@pytest.mark.parametrize(
    "chosen",
    [
        settings("urq"),
        settings("deadzone", offset=tuple(np.linspace(0.3, 0.5, SIGMA_LEVELS).tolist())),
        settings("rdoq"),
        settings("tcq"),
        settings("tcq", context="state"),
    ],
    ids=lambda chosen: f"{chosen.kind}-{chosen.context}",
)
def test_another_weight_of_rate_changes_what_is_found_and_not_what_it_means(chosen: Settings) -> None:
    tables = midpoint_tables(chosen)
    generator = np.random.default_rng(5)
    sigma_index = np.full((4, 200), 30, np.uint8)
    residual = generator.normal(0, 2, sigma_index.shape).astype(np.float32)
    errors, costs = {}, {}
    for weight in (0.0, 0.5):
        found = quantize(residual, sigma_index, tables.weighing(weight))
        assert np.array_equal(dequantize(found.indices, sigma_index, tables), found.reconstruction)
        assert np.array_equal(sequence_bits(found.indices, sigma_index, tables), found.bits)
        errors[weight] = float(np.square(found.reconstruction - residual, dtype=np.float64).sum())
        costs[weight] = errors[weight] / chosen.step**2 + 0.5 * float(found.bits.sum())
    assert errors[0.0] < errors[0.5]
    assert costs[0.5] < costs[0.0]


def test_a_rounding_quantizer_is_refined_with_the_rate_in_view() -> None:
    """Its own search never leaves the nearest level; effort at once finds indices of fewer bits."""
    coder = ImageCoder.from_bytes(shipped.codec_file(1))
    pixels = photograph(128, 128)
    lmbda = shipped.SHIPPED[1].lmbda
    tables = midpoint_tables(settings("urq", step=1.0))
    plain = code(coder.codec, tables, pixels)
    refined = code(coder.codec, tables, pixels, Refinement(6, lmbda))
    assert cost(coder.codec, refined, pixels, lmbda) < 0.99 * cost(coder.codec, plain, pixels, lmbda)
