"""From scores to what a paper's table says: each arm beside its base and its controls, image by image."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class Pair:
    """One arm of one quantizer beside another.

    Attributes:
        relation: what the anchor is to the arm: its "base", a "control", the first quantizer's base ("first base"),
            or the arm of the same name of the "first quantizer".
        seeds: per seed of the arm the curves of arm and anchor, by ascending λ; a base has the seed None.
    """

    relation: str
    quantizer: str
    arm: str
    anchor_quantizer: str
    anchor_arm: str
    seeds: Mapping[int | None, tuple[Sequence[Scored], Sequence[Scored]]]

    @property
    def names(self) -> dict[str, str]:
        """The columns that name it in a table."""
        return {
            "relation": self.relation,
            "quantizer": self.quantizer,
            "arm": self.arm,
            "anchor_quantizer": self.anchor_quantizer,
            "anchor_arm": self.anchor_arm,
        }


def image_gains_db(arm: Scored, other: Scored) -> dict[str, float] | None:
    """ΔPSNR in dB of `arm` over `other` per image, at equal indices and bits.

    None if any image's differ, or the recipes.
    """
    if not (arm.is_base or other.is_base) and arm.recipe != other.recipe:
        return None
    theirs = {row["image"]: row for row in other.images}
    if any(row[name] != theirs[row["image"]][name] for row in arm.images for name in ("indices", "bpp")):
        return None
    return {row["image"]: row["psnr_db"] - theirs[row["image"]]["psnr_db"] for row in arm.images}


def gain_db(arm: Scored, other: Scored) -> float | None:
    """The mean of `image_gains_db`."""
    gains = image_gains_db(arm, other)
    return None if gains is None else sum(gains.values()) / len(gains)


def image_costs(s: Scored) -> dict[str, float]:
    """J = bpp + λ · 255² · MSE per image."""
    return {row["image"]: row["bpp"] + s.lmbda * 255**2 * 10 ** (-row["psnr_db"] / 10) for row in s.images}


def gain_percent(arm: Scored, other: Scored) -> float:
    """ΔJ/J in %, J averaged over images; negative is better, whatever the indices."""
    ours, theirs = (sum(image_costs(s).values()) / len(s.images) for s in (arm, other))
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


def curves_by_seed(scored: Sequence[Scored]) -> dict[tuple[str, str], dict[int | None, list[Scored]]]:
    """(quantizer, arm), in their order -> seed -> curve, by ascending λ."""
    curves: dict[tuple[str, str], dict[int | None, list[Scored]]] = {}
    for s in scored:
        curves.setdefault((s.quantizer, s.arm), {}).setdefault(s.seed, []).append(s)
    for seeds in curves.values():
        for curve in seeds.values():
            curve.sort(key=lambda s: s.lmbda)
    return curves


def pairs(scored: Sequence[Scored]) -> list[Pair]:
    """What is compared with what, in the order of the arms.

    Each arm with the base of its quantizer; each arm on real latents with the controls of its recipe; and with the
    first quantizer's base and, finetuned, its arm of the same name: that is what another quantizer gives.
    """
    curves = curves_by_seed(scored)
    found = []
    for (name, ours), (other, theirs) in itertools.product(curves.items(), repeat=2):
        one, anchor = (next(iter(seeds.values()))[0] for seeds in (ours, theirs))
        relation = _relation(one, anchor, scored[0].quantizer)
        seeds = {
            seed: (curve, theirs[seed if seed in theirs else None])
            for seed, curve in ours.items()
            if seed in theirs or None in theirs
        }
        if relation and seeds:
            found.append(Pair(relation, *name, *other, seeds))
    return found


def _relation(one: Scored, other: Scored, first: str) -> str | None:
    """What `other` is to `one`; None if they are not compared. `first` is the first quantizer."""
    if one.quantizer == other.quantizer:
        if one.is_base or one.arm == other.arm:
            return None
        if other.is_base:
            return "base"
        return "control" if other.is_control and not one.is_control and one.recipe == other.recipe else None
    if other.quantizer != first or one.is_control:
        return None
    if other.is_base:
        return "first base"
    return "first quantizer" if other.arm == one.arm else None


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
