"""Figures as bytes: rate-distortion curves with the gains beside them, and crops before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.comparison import Scored, gain_db

Pixels = npt.NDArray[np.uint8]

# Okabe and Ito's colours, distinguishable to the colour-blind; one per quantizer. Markers tell arms apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X<>"
DIFFERENCE_GAIN = 8
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "retrellis",
    "svg.fonttype": "none",
}


def rate_distortion(scored: Sequence[Scored], title: str) -> dict[str, bytes]:
    """PSNR over bpp of every arm (every seed is drawn), and ΔPSNR over the base at equal indices.

    Returns:
        "rate-distortion.png" and "rate-distortion.svg".
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _curves(left, scored)
        _gains(right, scored)
        figure.suptitle(title)
        figure.legend(loc="outside right upper", fontsize=7)
        return _save(figure, "rate-distortion")


def crops(images: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """A row per image: original, before, after, and after − before magnified around grey.

    Args:
        images: mappings with `name`, `original`, `before`, `after` (uint8 (h, w, 3), equal sizes), `before_title`
            and `after_title`.

    Returns:
        "crops.png".
    """
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(11, 2.95 * len(images)), layout="constrained")
        panels = figure.subplots(len(images), 4, squeeze=False)
        for row, image in zip(panels, images, strict=True):
            difference = image["after"].astype(np.int16) - image["before"]
            magnified = np.clip(128 + DIFFERENCE_GAIN * difference, 0, 255).astype(np.uint8)
            shown = (image["original"], image["before"], image["after"], magnified)
            titles = (
                image["name"],
                image["before_title"],
                image["after_title"],
                f"after − before, ×{DIFFERENCE_GAIN}",
            )
            for axes, pixels, text in zip(row, shown, titles, strict=True):
                axes.imshow(pixels, interpolation="nearest")
                axes.set_title(text, fontsize=8)
                axes.set_axis_off()
        return {"crops.png": _save(figure, "crops")["crops.png"]}


def busiest_window(before: Pixels, after: Pixels, side: int) -> tuple[int, int]:
    """Top and left of the window, on a grid of side/4, where two images differ most (sum of squares)."""
    energy = np.square(after.astype(np.float64) - before).sum(2)
    total = np.pad(energy, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = energy.shape
    tops, lefts = (range(0, max(1, extent - side + 1), max(1, side // 4)) for extent in (height, width))

    def inside(place: tuple[int, int]) -> float:
        top, left = place
        bottom, right = min(top + side, height), min(left + side, width)
        return float(total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left])

    return max(((top, left) for top in tops for left in lefts), key=inside)


def _curves(axes: Axes, scored: Sequence[Scored]) -> None:
    lines: dict[tuple[str, str, int | None], list[Scored]] = {}
    for s in scored:
        lines.setdefault((s.quantizer, s.arm, s.seed), []).append(s)
    labelled = set()
    for (quantizer, arm, _), curve in lines.items():
        points = sorted((s.mean("bpp"), s.mean("psnr_db")) for s in curve)
        label = None if (quantizer, arm) in labelled else f"{quantizer}, {arm}"
        labelled.add((quantizer, arm))
        colour, marker = _style(scored, quantizer, arm)
        axes.plot(
            *zip(*points, strict=True), marker=marker, color=colour, ms=5, lw=1, alpha=0.85, label=label
        )
    axes.set(xlabel="rate in bits per pixel", ylabel="PSNR in dB (RGB, mean over images)")


def _gains(axes: Axes, scored: Sequence[Scored]) -> None:
    """Dots are images, bars their mean; arms whose indices differ from the base's have no place here."""
    bars = []
    for s in scored:
        base = next(
            (o for o in scored if o.is_base and (o.lmbda, o.quantizer) == (s.lmbda, s.quantizer)), None
        )
        if base is not None and not s.is_base and gain_db(s, base) is not None:
            before = {row["image"]: row["psnr_db"] for row in base.images}
            bars.append((s, [row["psnr_db"] - before[row["image"]] for row in s.images]))
    for place, (s, gains) in enumerate(bars):
        colour, _ = _style(scored, s.quantizer, s.arm)
        axes.barh(place, np.mean(gains), color=colour, alpha=0.35 if s.is_control else 0.75)
        axes.plot(gains, np.full(len(gains), place), ".", color="black", ms=3, alpha=0.5)
    several = len({s.lmbda for s in scored}) > 1
    labels = [f"{s.quantizer}, {s.arm}" + (f", λ={s.lmbda:g}" if several else "") for s, _ in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.set(
        xlabel="ΔPSNR over the base in dB at equal indices\n(bars: mean, pale for controls; dots: images)"
    )


def _style(scored: Sequence[Scored], quantizer: str, arm: str) -> tuple[str, str]:
    quantizers = list(dict.fromkeys(s.quantizer for s in scored))
    arms = list(dict.fromkeys(s.arm for s in scored))
    return COLOURS[quantizers.index(quantizer) % len(COLOURS)], MARKERS[arms.index(arm) % len(MARKERS)]


def _save(figure: Figure, name: str) -> dict[str, bytes]:
    files = {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else {"Software": None}
        )
        files[f"{name}.{suffix}"] = buffer.getvalue()
    return files
