"""From scores to what a paper's table says: each arm beside its base and its controls, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics import BD_POINTS_MIN, bd_rate


@dataclass(frozen=True)
class Scored:
    """The scores of one arm.

    Attributes:
        images: per image: `image` (digest), `bpp`, `psnr_db`, `ms_ssim` (or absent, or None) and `indices`, the
            digest of all its indices.
        parts, latents: what the arm trained, on what; parts is "none" for the base.
        recipe: digest of all else that decides a finetuning (steps, batch, rate of learning …); a control compares
            with arms of its own recipe alone.
    """

    lmbda: float
    quantizer: str
    arm: str
    seed: int | None
    parts: str
    latents: str
    recipe: str
    images: Sequence[Mapping[str, Any]]

    @property
    def is_base(self) -> bool:
        return self.parts == "none"

    @property
    def is_control(self) -> bool:
        return not self.is_base and self.latents != "quantized"

    def mean(self, name: str) -> float | None:
        """Mean over images; None if an image has no such value."""
        values = [row.get(name) for row in self.images]
        return None if any(v is None for v in values) else sum(values) / len(values)  # type: ignore[arg-type]


def gain_db(arm: Scored, other: Scored) -> float | None:
    """Mean ΔPSNR in dB of `arm` over `other` at equal indices and bits; None if any image's differ, or the recipes."""
    if not (arm.is_base or other.is_base) and arm.recipe != other.recipe:
        return None
    theirs = {row["image"]: row for row in other.images}
    if any(row[name] != theirs[row["image"]][name] for row in arm.images for name in ("indices", "bpp")):
        return None
    return sum(row["psnr_db"] - theirs[row["image"]]["psnr_db"] for row in arm.images) / len(arm.images)


def gain_percent(arm: Scored, other: Scored) -> float:
    """ΔJ/J in %, J = bpp + λ · 255² · MSE averaged over images; negative is better, whatever the indices."""
    ours, theirs = (
        sum(row["bpp"] + s.lmbda * 255**2 * 10 ** (-row["psnr_db"] / 10) for row in s.images) / len(s.images)
        for s in (arm, other)
    )
    return 100 * (ours / theirs - 1)


def rows(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """One row per arm and seed: bpp, psnr_db, ms_ssim, ΔJ over the base, ΔPSNR over the base and each control.

    `cost_over_base_percent` is `gain_percent`. The keys `over_<arm>_db` exist for the base and for controls, at equal
    indices and bits; None where those differ or nothing is compared.
    """
    anchors = sorted({s.arm for s in scored if s.is_base or s.is_control}, key=[s.arm for s in scored].index)
    table = []
    for s in scored:
        row: dict[str, Any] = {"lmbda": s.lmbda, "quantizer": s.quantizer, "arm": s.arm, "seed": s.seed}
        row |= {name: s.mean(name) for name in ("bpp", "psnr_db", "ms_ssim")}
        base = next((o for a in anchors if (o := _counterpart(scored, s, a)) and o.is_base), None)
        row["cost_over_base_percent"] = None if base is None or base is s else gain_percent(s, base)
        for anchor in anchors:
            other = _counterpart(scored, s, anchor)
            row[f"over_{anchor}_db"] = None if other is None or other is s else gain_db(s, other)
        table.append(row)
    return table


def bd_rates(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """BD-rate in % of each (quantizer, arm, seed) over the base of its quantizer, and of each base over the first.

    Per image, then averaged. Empty with fewer than four λ; a curve that cannot be compared has a `reason`.
    """
    curves: dict[tuple[str, str, int | None], list[Scored]] = {}
    for s in scored:
        curves.setdefault((s.quantizer, s.arm, s.seed), []).append(s)
    bases = {quantizer: curve for (quantizer, _, _), curve in curves.items() if curve[0].is_base}
    if not bases or len({s.lmbda for s in scored}) < BD_POINTS_MIN:
        return []
    first = next(iter(bases.values()))
    table = []
    for (quantizer, arm, seed), curve in curves.items():
        anchor = first if curve[0].is_base else bases.get(quantizer, first)
        if curve is not anchor:
            names = {
                "quantizer": quantizer,
                "arm": arm,
                "seed": seed,
                "anchor": f"{anchor[0].quantizer} {anchor[0].arm}",
            }
            table.append(names | _bd_rate(anchor, curve))
    return table


def _bd_rate(anchor: Sequence[Scored], test: Sequence[Scored]) -> dict[str, Any]:
    values = []
    try:
        for image in [row["image"] for row in anchor[0].images]:
            points = [_points(curve, image) for curve in (anchor, test)]
            values.append(bd_rate(*points[0], *points[1]))
    except ValueError as error:
        return {"bd_rate_percent": None, "reason": str(error)}
    return {"bd_rate_percent": sum(values) / len(values), "per_image": values}


def _points(curve: Iterable[Scored], image: str) -> tuple[list[float], list[float]]:
    found = [next(row for row in s.images if row["image"] == image) for s in curve]
    return [row["bpp"] for row in found], [row["psnr_db"] for row in found]


def _counterpart(scored: Sequence[Scored], s: Scored, arm: str) -> Scored | None:
    """The instance of another arm with the same λ, quantizer and (where it has one) seed."""
    return next(
        (
            o
            for o in scored
            if (o.lmbda, o.quantizer, o.arm) == (s.lmbda, s.quantizer, arm) and o.seed in (None, s.seed)
        ),
        None,
    )
