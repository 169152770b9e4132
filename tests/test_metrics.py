"""PSNR by definition, MS-SSIM against its package, BD-rate of curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.metrics import bd_rate, ms_ssim, psnr_db


def image(height: int = 200, width: int = 180, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_psnr_is_over_all_samples() -> None:
    a, b = image(), image(seed=1)
    mse = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert psnr_db(a, b) == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-12)
    assert psnr_db(a, a) == math.inf
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 10, np.uint8)
    assert psnr_db(black, grey) == pytest.approx(28.130803608679)


def test_ms_ssim_needs_five_scales() -> None:
    a = np.kron(image(42, 42), np.ones((4, 4, 1), np.uint8))
    noisy = np.clip(a.astype(int) + np.random.default_rng(2).normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    found = ms_ssim(a, noisy)
    assert found is not None
    assert 0.9 < found < 1
    assert ms_ssim(a[:160], noisy[:160]) is None
    assert ms_ssim(a[:161, :161], noisy[:161, :161]) is not None


def test_bd_rate_of_a_curve_moved_by_a_factor() -> None:
    rate = np.array([0.12, 0.2, 0.31, 0.46, 0.66])
    quality = [27.7, 29.4, 31.1, 33.0, 35.0]
    assert bd_rate(rate, quality, 0.9 * rate, quality) == pytest.approx(-10, abs=1e-9)
    assert bd_rate(rate, quality, rate[::-1], quality[::-1]) == pytest.approx(0, abs=1e-12)
    assert bd_rate(rate[:4], quality[:4], 1.05 * rate, quality) == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize(
    ("rate", "quality", "message"),
    [
        ([0.1, 0.2, 0.3], [30, 31, 32], "test curve: expected at least 4 points"),
        ([0.1, 0.2, 0.3, 0.4], [30, 31, 32], "test curve: expected at least 4 points"),
        ([0.0, 0.2, 0.3, 0.4], [30, 31, 32, 33], "test curve: expected finite values and rates above 0"),
        ([0.1, 0.2, 0.3, 0.4], [30, 31, math.nan, 33], "test curve: expected finite values"),
        ([0.1, 0.2, 0.3, 0.4], [30, 32, 31, 33], "test curve: expected quality to grow with rate"),
        (
            [0.1, 0.2, 0.3, 0.4],
            [40, 41, 42, 43],
            "the curves do not overlap in quality: anchor 30.000 … 33.000",
        ),
    ],
)
def test_bd_rate_refuses(rate: list[float], quality: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bd_rate([0.1, 0.2, 0.3, 0.4], [30, 31, 32, 33], rate, quality)


def test_images_must_match() -> None:
    with pytest.raises(
        ValueError, match=r"expected two images of one shape, found \(200, 180, 3\) and \(200, 90, 3\)"
    ):
        psnr_db(image(), image()[:, :90])
    for wrong in (image().astype(float), image()[..., 0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\), found"):
            ms_ssim(wrong, wrong)
