"""Figures as bytes: rate-distortion curves with their gains, BD-rate per image, and crops before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from scipy.interpolate import PchipInterpolator

from pipeline.bootstrap import Floats
from pipeline.comparison import Scored, curves_by_seed, image_gains_db
from pipeline.rate_gains import References, mean_curve

Pixels = npt.NDArray[np.uint8]

# Okabe and Ito's colours, distinguishable to the colour-blind; one per quantizer. Markers and
# dashes tell arms apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X<>"
DASHES: tuple[Any, ...] = ("-", (0, (3, 3)), "-.", ":", (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
BD_FIGURES = {  # relation of a pair -> file, what stands on its axis
    "base": ("bd-rate-over-base", "over the base of the same quantizer"),
    "control": ("bd-rate-over-controls", "over a control of the same recipe"),
    "first base": ("bd-rate-over-first", "over {anchor}"),
}
DIFFERENCE_GAIN = 8
RATE_LABEL = "rate in bits per pixel"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "retrellis",
    "svg.fonttype": "none",
}


def rate_distortion(
    scored: Sequence[Scored], title: str, references: References | None = None
) -> dict[str, bytes]:
    """PSNR over bpp of every arm, averaged over seeds, and what it gains.

    With several λ the gain over the first base's curve at equal rate stands below, else ΔPSNR over each quantizer's
    base at equal indices stands beside.

    Args:
        references: curves from elsewhere, drawn in grey: name -> (bpp, PSNR in dB) of each point.

    Returns:
        "rate-distortion.png" and "rate-distortion.svg".
    """
    several = len({s.lmbda for s in scored}) > 1
    bars = [] if several else _gain_bars(scored)
    size = (8, 7.6) if several else (11, max(4.4, 1.4 + 0.17 * len(bars)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if several:
            above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
            _curves(above, scored)
            _log_rate(above)
            _references(above, references or {})
            _gain_curves(below, scored)
        else:
            left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
            _curves(left, scored)
            _references(left, references or {})
            _gains(right, scored, bars)
        figure.suptitle(title)
        figure.legend(handles=_legend(scored), loc="outside right upper", fontsize=8, handlelength=3.5)
        return _save(figure, "rate-distortion")


def bd_rate_figures(
    scored: Sequence[Scored], table: Sequence[Mapping[str, Any]], title: str
) -> dict[str, bytes]:
    """BD-rate per image, one figure for each relation that `table`, of `bd_rates`, has.

    Returns:
        "bd-rate-over-base.png", the like for controls and for the first quantizer's base, and the same as ".svg".
    """
    files: dict[str, bytes] = {}
    for relation, (name, over) in BD_FIGURES.items():
        rows = [row for row in table if row["relation"] == relation and row["per_image"]]
        if rows:
            anchors = {f"{row['anchor_quantizer']}, {row['anchor_arm']}" for row in rows}
            anchor = anchors.pop() if len(anchors) == 1 else "a base of the first quantizer"
            with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
                figure = Figure(figsize=(8, 1.5 + 0.34 * len(rows)), layout="constrained")
                _bd_rates(figure.subplots(), scored, rows, over.format(anchor=anchor))
                figure.suptitle(title)
                files |= _save(figure, name)
    return files


def channel_rates(before: Scored, after: Scored, title: str) -> dict[str, bytes]:
    """Bits per pixel of each latent channel of two arms of one λ, means over images, and their difference.

    Channels stand in the order of their rate before.

    Returns:
        "channel-rates.png" and "channel-rates.svg".
    """
    rates = [
        np.mean([np.array(row["channel_bits"]) / (row["height"] * row["width"]) for row in s.images], axis=0)
        for s in (before, after)
    ]
    order = np.argsort(-rates[0], kind="stable")
    channels = np.arange(1, len(order) + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
        for s, rate, colour, place in zip((before, after), rates, COLOURS, (-0.2, 0.2), strict=False):
            label = f"{s.quantizer}, {s.arm}: {rate.sum():.4f} bpp"
            above.bar(channels + place, rate[order], 0.4, color=colour, label=label)
        above.set(ylabel="bits per pixel")
        above.legend(fontsize=8)
        below.bar(channels, (rates[1] - rates[0])[order], 0.8, color=COLOURS[1])
        below.axhline(0, color="black", lw=0.8)
        below.margins(x=0.01)
        below.set(
            ylabel="after − before",
            xlabel="channels of the latent, by their rate before (ideal code lengths)",
        )
        figure.suptitle(f"{title}; λ = {before.lmbda:g}")
        return _save(figure, "channel-rates")


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


def _seed_curves(scored: Sequence[Scored]) -> dict[tuple[str, str], Floats]:
    """(quantizer, arm) -> (seeds, 2, λ): bpp and PSNR in dB, means over images, by ascending λ.

    Seeds that lack a λ another seed has are left out.
    """
    found = curves_by_seed(scored)
    longest = {name: max(map(len, seeds.values())) for name, seeds in found.items()}
    return {
        name: np.array([mean_curve(curve) for curve in seeds.values() if len(curve) == longest[name]])
        for name, seeds in found.items()
    }


def _curves(axes: Axes, scored: Sequence[Scored]) -> None:
    several = len({s.lmbda for s in scored}) > 1
    for (quantizer, arm), seeds in _seed_curves(scored).items():
        axes.plot(*seeds.mean(0), **_style(scored, quantizer, arm), ms=4, lw=1, alpha=0.85)
    if not several:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlabel="" if several else RATE_LABEL, ylabel="PSNR in dB (RGB, mean over images)")


def _references(axes: Axes, references: References) -> None:
    """In grey, each with its name at its end, as far as the rates of the other curves reach.

    The scale of the axis is the caller's, and set: its limits are read and kept.
    """
    if not references:
        return
    axes.margins(0.08)
    low, high = axes.get_xlim()
    for name, points in references.items():
        rates, qualities = np.array(sorted(points, key=lambda point: point[0])).T
        if rates[-1] < low or rates[0] > high:
            continue
        cut = np.clip((low, high), rates[0], rates[-1])
        seen = np.unique([*cut, *rates[(low < rates) & (rates < high)]])
        curve = seen, np.interp(np.log(seen), np.log(rates), qualities)
        dots = np.flatnonzero(np.isin(seen, rates)).tolist()  # none where the panel cuts the curve
        axes.plot(*curve, color="0.45", lw=1.2, marker=".", markevery=dots, ms=5, zorder=1)
        end = (seen[-1], curve[1][-1])
        axes.annotate(name, end, (-4, 4), textcoords="offset points", color="0.35", fontsize=8, ha="right")
    axes.set_xlim(low, high)


def _gain_curves(axes: Axes, scored: Sequence[Scored]) -> None:
    """Differences of quality at equal rate over the first base, by PCHIP over log rate, where the curves overlap."""
    curves = _seed_curves(scored)
    name = next(((s.quantizer, s.arm) for s in scored if s.is_base), None)
    anchor = None if name is None else _interpolated(curves[name].mean(0))
    if name is None or anchor is None:
        axes.set(xlabel=RATE_LABEL)
        return
    for (quantizer, arm), seeds in curves.items():
        style = _style(scored, quantizer, arm)
        marker = style.pop("marker")
        ours = _interpolated(seeds.mean(0))
        if ours is not None:
            overlap = np.linspace(max(anchor.x[0], ours.x[0]), min(anchor.x[-1], ours.x[-1]), 200)
            axes.plot(np.exp(overlap), ours(overlap) - anchor(overlap), **style, lw=1, alpha=0.85)
        gains = seeds[:, 1] - anchor(np.log(seeds[:, 0]))  # NaN outside the anchor's rates
        mean = gains.mean(0)
        reach = np.abs(np.stack([gains.min(0), gains.max(0)]) - mean)
        points = {"fmt": marker, "color": style["color"], "ms": 4, "elinewidth": 0.8, "alpha": 0.85}
        axes.errorbar(seeds[:, 0].mean(0), mean, reach, **points)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.005), max(high, 0.005))  # dB: rounding errors are not stretched over the panel
    several = any(len(seeds) > 1 for seeds in curves.values())
    axes.set(
        xlabel=RATE_LABEL + ("\n(bars below: the least and the most of the seeds)" if several else ""),
        ylabel=f"ΔPSNR in dB at equal rate\nover {name[0]}, {name[1]}",
    )


def _interpolated(curve: Floats) -> PchipInterpolator | None:
    """Quality as a function of log rate; None where rates do not ascend."""
    order = np.argsort(curve[0])
    log_rate, quality = np.log(curve[0][order]), curve[1][order]
    if len(order) < 2 or (np.diff(log_rate) <= 0).any():
        return None
    return PchipInterpolator(log_rate, quality, extrapolate=False)


def _log_rate(axes: Axes) -> None:
    """A logarithmic axis, of panels that share it too, whose ticks are plain numbers, few enough not to touch."""
    axes.set_xscale("log")
    wide = axes.dataLim.x1 > 3 * axes.dataLim.x0
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)) if wide else MaxNLocator(6))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _gain_bars(scored: Sequence[Scored]) -> list[tuple[Scored, list[float]]]:
    """Arms with their ΔPSNR per image over their base; those whose indices differ have no place here."""
    bars = []
    for s in scored:
        base = next(
            (o for o in scored if o.is_base and (o.lmbda, o.quantizer) == (s.lmbda, s.quantizer)), None
        )
        gains = None if base is None or s.is_base else image_gains_db(s, base)
        if gains is not None:
            bars.append((s, list(gains.values())))
    return bars


def _gains(axes: Axes, scored: Sequence[Scored], bars: Sequence[tuple[Scored, Sequence[float]]]) -> None:
    """Dots are images, bars their mean."""
    for place, (s, gains) in enumerate(bars):
        colour = _style(scored, s.quantizer, s.arm)["color"]
        axes.barh(place, np.mean(gains), color=colour, alpha=0.35 if s.is_control else 0.75)
        axes.plot(gains, np.full(len(gains), place), ".", color="black", ms=3, alpha=0.5)
    seeds = len({s.seed for s, _ in bars}) > 1
    labels = [f"{s.quantizer}, {s.arm}" + (f", seed {s.seed}" if seeds else "") for s, _ in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(
        xlabel="ΔPSNR over the base in dB at equal indices\n(bars: mean, pale for controls; dots: images)"
    )


def _bd_rates(axes: Axes, scored: Sequence[Scored], rows: Sequence[Mapping[str, Any]], over: str) -> None:
    """A row per pair: images as dots from the best to the worst, their mean with its interval."""
    for place, row in enumerate(rows):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
        style = _style(scored, row["quantizer"], row["arm"])
        values = np.sort(list(row["per_image"].values()))
        heights = place + np.linspace(0.32, -0.32, len(values)) if len(values) > 1 else [place]
        axes.plot(values, heights, ".", color=style["color"], ms=4, alpha=0.55)
        if row["interval_percent"]:
            axes.plot(row["interval_percent"], (place, place), color="black", lw=1.4)
        axes.plot(
            row["bd_rate_percent"], place, style["marker"], color=style["color"], ms=6, mec="black", mew=0.8
        )
    several = rows[0]["relation"] == "control" or len({row["anchor_arm"] for row in rows}) > 1
    labels = [
        f"{row['quantizer']}, {row['arm']}" + (f" over {row['anchor_arm']}" if several else "")
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel=f"BD-rate in % {over}\n(dots: images; marker and bar: mean and its 95 % interval)")


def _legend(scored: Sequence[Scored]) -> list[Line2D]:
    """Colours of the quantizers, then dashes and markers of the arms."""
    quantizers, arms = _names(scored)
    colours = [Line2D([], [], color=_style(scored, q, arms[0])["color"], lw=3, label=q) for q in quantizers]
    styles = [_style(scored, quantizers[0], arm) | {"color": "0.25", "label": arm} for arm in arms]
    return [*colours, *(Line2D([], [], ms=4, lw=1, **style) for style in styles)]


def _names(scored: Sequence[Scored]) -> tuple[list[str], list[str]]:
    """Quantizers and arms in their order."""
    return list(dict.fromkeys(s.quantizer for s in scored)), list(dict.fromkeys(s.arm for s in scored))


def _style(scored: Sequence[Scored], quantizer: str, arm: str) -> dict[str, Any]:
    quantizers, arms = _names(scored)
    place = arms.index(arm)
    return {
        "color": COLOURS[quantizers.index(quantizer) % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
    }


def _save(figure: Figure, name: str) -> dict[str, bytes]:
    files = {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else {"Software": None}
        )
        files[f"{name}.{suffix}"] = buffer.getvalue()
    return files
