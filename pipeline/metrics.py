"""Distortion of images and differences of rate-distortion curves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from bjontegaard import bd_rate as _bd_rate
from pytorch_msssim import ms_ssim as _ms_ssim

Pixels = npt.NDArray[np.uint8]

MS_SSIM_SIDE_MIN = 161  # five scales of an 11-tap window: (11 − 1) · 2⁴ < side
BD_POINTS_MIN = 4


def psnr_db(a_HWC: Pixels, b_HWC: Pixels) -> float:
    """PSNR in dB between two RGB images, over all their samples; infinity where they are equal.

    Args:
        a_HWC, b_HWC: uint8 (H, W, 3).

    Raises:
        ValueError: another type or shape, or two shapes.
    """
    _check_pair(a_HWC, b_HWC)
    difference = a_HWC.astype(np.int32) - b_HWC
    squared_error = int((difference * difference).sum(dtype=np.int64))
    if squared_error == 0:
        return math.inf
    return 10 * math.log10(255**2 * difference.size / squared_error)


def ms_ssim(a_HWC: Pixels, b_HWC: Pixels) -> float | None:
    """MS-SSIM between two RGB images, mean of the channels; None where a side is 160 pixels or less.

    Source: Wang, Simoncelli, Bovik, "Multiscale structural similarity" (Asilomar 2003): five scales, which smaller
    images do not have.

    Args:
        a_HWC, b_HWC: uint8 (H, W, 3).

    Raises:
        ValueError: another type or shape, or two shapes.
    """
    _check_pair(a_HWC, b_HWC)
    if min(a_HWC.shape[:2]) < MS_SSIM_SIDE_MIN:
        return None
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float() for x in (a_HWC, b_HWC))
    return float(_ms_ssim(a, b, data_range=255))


def bd_rate(
    anchor_bpp: Sequence[float],
    anchor_psnr_db: Sequence[float],
    test_bpp: Sequence[float],
    test_psnr_db: Sequence[float],
) -> float:
    """Average difference of rate at equal quality, in per cent; negative: the test curve needs less.

    Piecewise cubic Hermite interpolation (PCHIP) of log rate over quality, integrated where the curves overlap,
    however little that is. Source: Bjøntegaard, "Calculation of average PSNR differences between RD-curves"
    (VCEG-M33, 2001), and, for PCHIP, JCTVC-L1100. Quality may be another metric that grows with rate.

    Raises:
        ValueError: fewer than four points on a curve, values that are not finite or rates not above 0, a curve
            whose quality does not grow with its rate, or curves without an overlap in quality.
    """
    anchor = ascending_curve("anchor", anchor_bpp, anchor_psnr_db)
    test = ascending_curve("test", test_bpp, test_psnr_db)
    low, high = max(anchor[1][0], test[1][0]), min(anchor[1][-1], test[1][-1])
    if low >= high:
        raise ValueError(
            f"the curves do not overlap in quality: anchor {anchor[1][0]:.3f} … {anchor[1][-1]:.3f}, "
            f"test {test[1][0]:.3f} … {test[1][-1]:.3f}; choose other λ"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a small overlap, which the caller judges
        return float(_bd_rate(*anchor, *test, method="pchip", require_matching_points=False))


def ascending_curve(
    name: str, rate: Sequence[float], quality: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rates and qualities of a curve by ascending rate.

    Raises:
        ValueError: as of `bd_rate`, named after the curve.
    """
    r, q = np.asarray(rate, np.float64), np.asarray(quality, np.float64)
    if r.ndim != 1 or r.shape != q.shape or len(r) < BD_POINTS_MIN:
        raise ValueError(
            f"{name} curve: expected at least {BD_POINTS_MIN} points, found {r.shape} rates and {q.shape} qualities"
        )
    if not (np.isfinite(r).all() and np.isfinite(q).all() and (r > 0).all()):
        raise ValueError(f"{name} curve: expected finite values and rates above 0, found {r} and {q}")
    order = np.argsort(r, kind="stable")
    r, q = r[order], q[order]
    if (np.diff(r) <= 0).any() or (np.diff(q) <= 0).any():
        raise ValueError(
            f"{name} curve: expected quality to grow with rate, found rates {r} and qualities {q}"
        )
    return r, q


def _check_pair(a: Pixels, b: Pixels) -> None:
    for image in (a, b):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"expected uint8 (H, W, 3), found {image.dtype} {image.shape}")
    if a.shape != b.shape:
        raise ValueError(f"expected two images of one shape, found {a.shape} and {b.shape}")
