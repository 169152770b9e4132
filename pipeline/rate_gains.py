"""What an arm saves of the rate: BD-rate over whole curves, and the gain at each λ by the slope of the base's curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from pipeline.bootstrap import Floats, interval
from pipeline.comparison import Pair, Scored, curves_by_seed, gain_percent, image_costs, image_gains_db, pairs
from pipeline.metrics import BD_POINTS_MIN, ascending_curve, bd_rate

References = Mapping[str, Sequence[Sequence[float]]]  # name -> (bpp, PSNR in dB) of each point
Curve = Sequence[Scored]
Points = tuple[Sequence[float], Sequence[float]]  # bpp, PSNR in dB

# Of the shorter curve's range of quality. Each image weighs the same in a mean, also one whose curves share a few
# hundredths of a dB, where the difference of rate says little of the whole.
OVERLAP_MIN = 0.25


def bd_rates(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """BD-rate in % of each pair: per image, averaged over seeds, then over images. Empty with fewer than four λ.

    Returns:
        Per pair its names and

        - `bd_rate_percent`, and `interval_percent`, its bootstrap interval over images;
        - `seeds_percent`: the mean over images of each seed, in order;
        - `mean_curves_percent`: BD-rate of the curves of mean bpp and mean PSNR, averaged over seeds;
        - `per_image`: image -> BD-rate averaged over seeds;
        - `not_comparable`: image -> why it is in none of these but the mean curves.

        A value is None where it cannot be had; `mean_curves_reason` says why there is none. Curves that overlap by less
        than `OVERLAP_MIN` of the shorter one's range of quality are not compared, image or mean.
    """
    if len({s.lmbda for s in scored}) < BD_POINTS_MIN:
        return []
    return [pair.names | _images_apart(pair) | _mean_curves(pair) for pair in pairs(scored)]


def gains(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """What each pair gains at each λ, averaged over seeds.

    Returns:
        Per pair and λ the names, `lmbda` and

        - `cost_percent`: ΔJ/J, whatever the indices, negative is better;
        - `psnr_db`: ΔPSNR at equal indices and bits, else None;
        - `rate_percent`: the change of rate that `psnr_db` is worth on the curve of the base of the arm's quantizer,
          by its slope at this λ; None with fewer than four λ, or where that curve does not ascend;
        - `…_interval`: the bootstrap interval over images; `…_seeds`: the values of all seeds, in order.
    """
    slopes = {quantizer: log_rate_slopes(curve) for quantizer, curve in _bases(scored).items()}
    table = []
    for pair in pairs(scored):
        by_lmbda: dict[float, list[tuple[Scored, Scored]]] = {}
        for ours, theirs in pair.seeds.values():
            anchors = {s.lmbda: s for s in theirs}
            for s in ours:
                if s.lmbda in anchors:
                    by_lmbda.setdefault(s.lmbda, []).append((s, anchors[s.lmbda]))
        for lmbda, seeds in sorted(by_lmbda.items()):
            slope = slopes.get(pair.quantizer, {}).get(lmbda)
            table.append(pair.names | {"lmbda": lmbda} | _cost(seeds) | _quality(seeds, slope))
    return table


def mean_curve(curve: Curve) -> tuple[list[float], list[float]]:
    """Bits per pixel and PSNR in dB at each λ, each the mean over images."""
    bpp, psnr = (
        [float(np.mean([row[name] for row in s.images])) for s in curve] for name in ("bpp", "psnr_db")
    )
    return bpp, psnr


def _bases(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Quantizer -> the curve of its first base."""
    bases: dict[str, list[Scored]] = {}
    for (quantizer, _), seeds in curves_by_seed(scored).items():
        curve = next(iter(seeds.values()))
        if curve[0].is_base:
            bases.setdefault(quantizer, curve)
    return bases


def log_rate_slopes(curve: Curve) -> dict[float, float]:
    """λ -> d ln(rate) / d PSNR, per dB, of the PCHIP through the mean curve.

    Empty where the curve is none that `bd_rate` takes.
    """
    bpp, psnr = mean_curve(curve)
    try:
        rate, quality = ascending_curve("base", bpp, psnr)
    except ValueError:
        return {}
    slopes = PchipInterpolator(quality, np.log(rate)).derivative()(psnr)
    return {s.lmbda: float(slope) for s, slope in zip(curve, slopes, strict=True)}


def _images_apart(pair: Pair) -> dict[str, Any]:
    reasons = {}
    images = [row["image"] for row in next(iter(pair.seeds.values()))[0][0].images]
    per_image = {}
    for image in images:
        try:
            values = [
                _bd_rate(_image_curve(anchor, image), _image_curve(test, image))
                for test, anchor in pair.seeds.values()
            ]
        except ValueError as error:
            reasons[image] = str(error)
        else:
            per_image[image] = values
    seeds = np.array(list(per_image.values()), np.float64).reshape(len(per_image), len(pair.seeds))
    averages = seeds.mean(1)
    return {
        "bd_rate_percent": float(averages.mean()) if per_image else None,
        "interval_percent": interval(averages[None]) if per_image else None,
        "seeds_percent": seeds.mean(0).tolist() if per_image else [],
        "per_image": dict(zip(per_image, averages.tolist(), strict=True)),
        "not_comparable": reasons,
    }


def _bd_rate(anchor: Points, test: Points) -> float:
    """`bd_rate` of curves that overlap far enough to speak of.

    Raises:
        ValueError: as of `bd_rate`, or an overlap below `OVERLAP_MIN`.
    """
    value = bd_rate(*anchor, *test)
    ranges = [(min(quality), max(quality)) for _, quality in (anchor, test)]
    overlap = min(high for _, high in ranges) - max(low for low, _ in ranges)
    shorter = min(high - low for low, high in ranges)
    if overlap < OVERLAP_MIN * shorter:
        raise ValueError(
            f"the curves overlap in {overlap:.3f} dB of the shorter one's range of {shorter:.3f} dB: expected "
            f"{100 * OVERLAP_MIN:g} % or more; choose other λ"
        )
    return value


def _image_curve(curve: Curve, image: str) -> Points:
    rows = [next(row for row in s.images if row["image"] == image) for s in curve]
    return [row["bpp"] for row in rows], [row["psnr_db"] for row in rows]


def _mean_curves(pair: Pair) -> dict[str, Any]:
    try:
        values = [_bd_rate(mean_curve(anchor), mean_curve(test)) for test, anchor in pair.seeds.values()]
    except ValueError as error:
        return {"mean_curves_percent": None, "mean_curves_reason": str(error)}
    return {"mean_curves_percent": sum(values) / len(values), "mean_curves_reason": None}


def _cost(seeds: Sequence[tuple[Scored, Scored]]) -> dict[str, Any]:
    """ΔJ/J. Its interval is of a ratio of means: an image that costs more weighs more."""
    images = [row["image"] for row in seeds[0][0].images]
    ours, theirs = (_seed_mean([image_costs(pair[side]) for pair in seeds], images) for side in (0, 1))
    return {
        "cost_percent": float(100 * (ours.mean() / theirs.mean() - 1)),
        "cost_percent_interval": interval(np.stack([ours, theirs]), lambda m: 100 * (m[0] / m[1] - 1)),
        "cost_percent_seeds": [gain_percent(*pair) for pair in seeds],
    }


def _quality(seeds: Sequence[tuple[Scored, Scored]], slope: float | None) -> dict[str, Any]:
    """ΔPSNR, and what it is worth in rate; all None or empty where indices differ."""
    found = [gain for pair in seeds if (gain := image_gains_db(*pair)) is not None]
    names = ("psnr_db", "psnr_db_interval", "rate_percent", "rate_percent_interval")
    if len(found) < len(seeds):
        return dict.fromkeys(names) | {"psnr_db_seeds": []}
    values = _seed_mean(found, list(found[0]))
    mean, spread = float(values.mean()), interval(values[None])
    row: dict[str, Any] = dict(zip(names, (mean, spread, None, None), strict=True))
    if slope is not None:
        row["rate_percent"] = _worth(mean, slope)
        # more quality is less rate: the ends change places
        row["rate_percent_interval"] = spread and (_worth(spread[1], slope), _worth(spread[0], slope))
    return row | {"psnr_db_seeds": [float(np.mean(list(gain.values()))) for gain in found]}


def _worth(gain: float, slope: float) -> float:
    """The change of rate in % at equal quality: log rate is taken as straight around the point."""
    return float(100 * np.expm1(-slope * gain))


def _seed_mean(found: Sequence[Mapping[str, float]], images: Sequence[str]) -> Floats:
    """(images,) means over seeds."""
    return np.array([[values[image] for image in images] for values in found], np.float64).mean(0)


def over_references(scored: Sequence[Scored], references: References) -> list[dict[str, Any]]:
    """BD-rate in % of the mean curve of each quantizer's base over curves from elsewhere, means over the same images.

    Args:
        references: name -> (bpp, PSNR in dB) of each point.

    Returns:
        `reference`, `quantizer`, `bd_rate_percent` (None where the curves cannot be compared, with a `reason`).
    """
    bases = _bases(scored)
    table = []
    for reference, points in references.items():
        for quantizer, curve in bases.items():
            row: dict[str, Any] = {"reference": reference, "quantizer": quantizer}
            try:
                value = _bd_rate(([p[0] for p in points], [p[1] for p in points]), mean_curve(curve))
                row |= {"bd_rate_percent": value, "reason": None}
            except ValueError as error:
                row |= {"bd_rate_percent": None, "reason": str(error)}
            table.append(row)
    return table
