"""BD-rate and gains at each λ on curves whose answer is known, and the intervals over images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jobs.report import make_report, show
from jobs.report_tables import as_csv, as_markdown, flat
from pipeline.bootstrap import _weights, interval
from pipeline.comparison import Scored, pairs, rows
from pipeline.figures import bd_rate_figures, rate_distortion
from pipeline.metrics import bd_rate
from pipeline.rate_gains import OVERLAP_MIN, bd_rates, gains, log_rate_slopes, mean_curve, over_references
from storage.keys import canonical_json
from storage.workspace import Workspace

LMBDAS = (0.0018, 0.0067, 0.013, 0.025, 0.0483)
KINDS = {
    "base": ("none", "quantized"),
    "noise": ("decoder", "noise"),
    "paper": ("decoder", "quantized"),
}
SLOPE = np.log(10) / 8  # of ln(rate) over PSNR on every curve here


def curve(
    arm: str,
    *,
    quantizer: str = "urq",
    seed: int | None = None,
    rate: Sequence[float] = (1, 1, 1),
    gain_db: Sequence[float] = (0, 0, 0),
    lmbdas: Sequence[float] = LMBDAS,
) -> list[Scored]:
    """Quality is 8 · log10(rate) and a constant per image; `rate` then scales each image's rate, `gain_db` lifts it."""
    found = []
    for lmbda in lmbdas:
        images = []
        for i, (scale, gain) in enumerate(zip(rate, gain_db, strict=True)):
            bpp = (1 + 0.2 * i) * 6 * lmbda**0.5
            quality = 35 - i + 8 * np.log10(bpp) + gain
            images.append(
                {"image": f"d{i}", "bpp": scale * bpp, "psnr_db": float(quality), "indices": f"{lmbda} {i}"}
            )
        found.append(Scored(lmbda, quantizer, arm, seed, *KINDS[arm], "recipe", images))
    return found


def points(arms: Sequence[Scored]) -> list[tuple[float, float]]:
    return list(zip(*mean_curve(arms), strict=True))


def only(table: list[dict[str, Any]], relation: str, **names: Any) -> dict[str, Any]:
    (row,) = [r for r in table if r["relation"] == relation and all(r[n] == v for n, v in names.items())]
    return row


def test_three_per_cent_less_rate_is_three_per_cent_for_every_image_and_every_draw() -> None:
    (row,) = bd_rates([*curve("base"), *curve("paper", seed=0, rate=(0.97, 0.97, 0.97))])
    assert (row["relation"], row["anchor_quantizer"], row["anchor_arm"]) == ("base", "urq", "base")
    expected = pytest.approx(-3, abs=1e-9)
    assert row["bd_rate_percent"] == expected
    assert row["mean_curves_percent"] == expected
    assert list(row["per_image"]) == ["d0", "d1", "d2"]
    assert [*row["per_image"].values(), *row["interval_percent"], *row["seeds_percent"]] == [expected] * 6
    assert row["not_comparable"] == {}


def test_images_differ_and_the_interval_lies_between_them() -> None:
    base, test = curve("base"), curve("paper", seed=0, rate=(0.99, 0.97, 0.92))
    (row,) = bd_rates([*base, *test])
    assert list(row["per_image"].values()) == pytest.approx([-1, -3, -8], abs=1e-9)
    assert row["bd_rate_percent"] == pytest.approx(-4, abs=1e-9)
    low, high = row["interval_percent"]
    assert -8 - 1e-9 <= low < -4 < high <= -1 + 1e-9
    assert row["mean_curves_percent"] == pytest.approx(bd_rate(*mean_curve(base), *mean_curve(test)))


def test_seeds_are_averaged_and_shown() -> None:
    arms = [
        *curve("base"),
        *curve("paper", seed=4, rate=(0.98,) * 3),
        *curve("paper", seed=5, rate=(0.94,) * 3),
    ]
    (row,) = bd_rates(arms)
    assert row["seeds_percent"] == pytest.approx([-2, -6], abs=1e-9)
    assert row["bd_rate_percent"] == pytest.approx(-4, abs=1e-9)
    assert row["interval_percent"] == pytest.approx((-4, -4), abs=1e-9)  # over images, which agree
    text = as_markdown("x", {"table": rows(arms), "bd_rate": [row], "gains": []}, {}, "tables", [])
    assert "-6.00 … -2.00 % (2)" in text


def test_controls_are_paired_by_seed_and_recipe_and_quantizers_by_the_first() -> None:
    arms = [
        s
        for quantizer in ("urq", "tcq8")
        for s in (
            *curve("base", quantizer=quantizer),
            *(s for seed in (0, 1) for s in curve("noise", quantizer=quantizer, seed=seed, rate=(0.99,) * 3)),
            *(s for seed in (0, 1) for s in curve("paper", quantizer=quantizer, seed=seed, rate=(0.95,) * 3)),
        )
    ]
    found = [(p.relation, p.quantizer, p.arm, p.anchor_quantizer, p.anchor_arm) for p in pairs(arms)]
    assert found == [
        ("base", "urq", "noise", "urq", "base"),
        ("base", "urq", "paper", "urq", "base"),
        ("control", "urq", "paper", "urq", "noise"),
        ("first base", "tcq8", "base", "urq", "base"),
        ("base", "tcq8", "noise", "tcq8", "base"),
        ("first base", "tcq8", "paper", "urq", "base"),
        ("first quantizer", "tcq8", "paper", "urq", "paper"),
        ("base", "tcq8", "paper", "tcq8", "base"),
        ("control", "tcq8", "paper", "tcq8", "noise"),
    ]
    for seed, (ours, theirs) in pairs(arms)[2].seeds.items():
        assert {s.seed for s in (*ours, *theirs)} == {seed}
    expected = pytest.approx(100 * (0.95 / 0.99 - 1), abs=1e-9)
    assert only(bd_rates(arms), "control", quantizer="tcq8")["bd_rate_percent"] == expected


def test_an_image_that_cannot_be_compared_is_named_and_costs_no_other() -> None:
    arms = [*curve("base"), *curve("paper", seed=0, rate=(0.97, 0.97, 0.97))]
    arms[7].images[1]["psnr_db"] = 90.0  # type: ignore[index]  # not monotone
    for s in arms[5:]:
        s.images[2]["psnr_db"] += 60  # type: ignore[index]  # no overlap
    (row,) = bd_rates(arms)
    assert row["per_image"] == {"d0": pytest.approx(-3, abs=1e-9)}
    assert row["interval_percent"] is None  # one image shows no spread
    assert "expected quality to grow with rate" in row["not_comparable"]["d1"]
    assert "the curves do not overlap in quality" in row["not_comparable"]["d2"]
    images = {"d0": "a.png", "d1": "c.png", "d2": "b.png"}
    text = as_markdown("x", {"table": rows(arms), "bd_rate": [row], "gains": []}, images, "tables", [])
    assert "| 1 of 3 |" in text
    assert "- urq paper over base: b.png, c.png (the first: the curves do not overlap in quality" in text
    assert (flat(row)["images"], flat(row)["not_comparable"]) == (1, 2)


def test_curves_that_hardly_overlap_are_not_compared() -> None:
    base = curve("base")
    spread = base[-1].images[0]["psnr_db"] - base[0].images[0]["psnr_db"]
    shift = spread * (1 - OVERLAP_MIN)  # leaves just enough overlap
    (row,) = bd_rates([*base, *curve("paper", seed=0, gain_db=(0.1, shift - 0.01, shift + 0.01))])
    assert list(row["per_image"]) == ["d0", "d1"]
    assert f"overlap in {spread - shift - 0.01:.3f} dB" in row["not_comparable"]["d2"]
    assert f"range of {spread:.3f} dB: expected 25 % or more" in row["not_comparable"]["d2"]
    (row,) = over_references(base, {"far": points(curve("base", gain_db=(0.9 * spread,) * 3))})
    assert "expected 25 % or more" in row["reason"]


def test_where_no_image_can_be_compared_the_row_says_so() -> None:
    arms = [*curve("base"), *curve("paper", seed=0, gain_db=(60, 60, 60))]
    (row,) = bd_rates(arms)
    assert row["bd_rate_percent"] is row["interval_percent"] is row["mean_curves_percent"] is None
    assert "do not overlap" in row["mean_curves_reason"]
    assert len(row["not_comparable"]) == 3
    assert bd_rate_figures(arms, [row], "x") == {}
    text = as_markdown("x", {"table": rows(arms), "bd_rate": [row], "gains": []}, {}, "tables", [])
    assert "| 0 of 3 |" in text
    rate_distortion(arms, "x")


def test_no_bd_rate_with_three_lmbdas() -> None:
    assert bd_rates([*curve("base", lmbdas=LMBDAS[:3]), *curve("paper", lmbdas=LMBDAS[:3])]) == []


def test_psnr_is_worth_what_the_base_curve_says() -> None:
    base = curve("base")
    assert log_rate_slopes(base) == pytest.approx(dict.fromkeys(LMBDAS, SLOPE))
    arms = [
        *base,
        *curve("paper", seed=0, gain_db=(0.1, 0.2, 0.3)),
        *curve("noise", seed=0, gain_db=(0.1,) * 3),
    ]
    table = gains(arms)
    assert [row["lmbda"] for row in table if row["arm"] == "noise"] == list(LMBDAS)
    row = only(table, "base", arm="paper", lmbda=0.013)
    assert row["psnr_db"] == pytest.approx(0.2)
    assert row["rate_percent"] == pytest.approx(100 * (10 ** (-0.2 / 8) - 1))
    low, high = row["psnr_db_interval"]
    assert 0.1 <= low + 1e-9 < 0.2 < high <= 0.3 + 1e-9
    assert row["rate_percent_interval"] == pytest.approx([100 * (10 ** (-g / 8) - 1) for g in (high, low)])
    over_control = only(table, "control", lmbda=0.013)
    assert over_control["rate_percent"] == pytest.approx(100 * (10 ** (-0.1 / 8) - 1))


def test_cost_has_an_interval_whatever_the_indices() -> None:
    arms = [*curve("base"), *curve("paper", seed=0, rate=(0.9, 0.95, 1.02))]
    row = gains(arms)[0]
    assert row["psnr_db"] is row["rate_percent"] is row["psnr_db_interval"] is None
    assert row["psnr_db_seeds"] == []
    low, high = row["cost_percent_interval"]
    assert low < row["cost_percent"] < high
    assert row["cost_percent"] == pytest.approx(row["cost_percent_seeds"][0])
    cells = flat(row)
    assert (cells["cost_percent_low"], cells["psnr_db_low"], cells["psnr_db_seeds_max"]) == (low, "", "")
    (first, *_) = csv.DictReader(io.StringIO(as_csv([cells]).decode()))
    assert float(first["cost_percent_high"]) == high


def test_no_slope_without_a_curve() -> None:
    two = LMBDAS[:2]
    arms = [*curve("base", lmbdas=two), *curve("paper", seed=0, gain_db=(0.1,) * 3, lmbdas=two)]
    assert [row["rate_percent"] for row in gains(arms)] == [None, None]
    assert [row["psnr_db"] for row in gains(arms)] == pytest.approx([0.1, 0.1])


def test_the_interval_is_that_of_plain_resampling_and_reproducible() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(-2, 1, 24)
    low, high = interval(values[None])
    assert (low, high) == interval(values[None])
    draws = values[generator.integers(0, 24, (20_000, 24))].mean(1)
    assert (low, high) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.03)
    assert interval(values[None, :1]) is None
    with pytest.raises(ValueError, match="read-only"):
        _weights(24)[0, 0] = 0  # later intervals share it


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    found = [interval(generator.normal(1, 1, (1, 24))) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in found]) <= 0.98


def test_a_ratio_of_means_draws_its_columns_together() -> None:
    values = np.random.default_rng(5).uniform(1, 9, 24)
    both = interval(np.stack([0.9 * values, values]), lambda means: means[0] / means[1])
    assert both == pytest.approx((0.9, 0.9))


def test_figures_of_many_curves_are_pictures_and_deterministic() -> None:
    arms = [
        s
        for quantizer in ("urq", "tcq8")
        for arm, seed in (("base", None), ("noise", 0), ("paper", 0))
        for s in curve(arm, quantizer=quantizer, seed=seed, rate=(0.99, 0.97, 0.95))
    ]
    files = rate_distortion(arms, "x") | bd_rate_figures(arms, bd_rates(arms), "x")
    names = ("rate-distortion", "bd-rate-over-base", "bd-rate-over-controls", "bd-rate-over-first")
    assert sorted(files) == sorted(f"{name}.{suffix}" for name in names for suffix in ("png", "svg"))
    assert files == rate_distortion(arms, "x") | bd_rate_figures(arms, bd_rates(arms), "x")
    for name in names:
        assert Image.open(io.BytesIO(files[f"{name}.png"])).size[0] > 1000


def test_a_curve_that_cannot_stand_beside_is_told() -> None:
    (row,) = over_references(curve("base"), {"other": [(0.1, 20.0), (0.2, 21.0)]})
    assert row["bd_rate_percent"] is None
    assert "at least 4 points" in row["reason"]
    tables = {"table": rows(curve("base")), "bd_rate": [], "gains": [], "references": [row]}
    text = as_markdown("x", tables, {}, "tables", [])
    assert "| other | urq     | — " in text
    assert "- base of urq over other: anchor curve: expected at least 4 points" in text


def test_of_two_bases_the_first_stands_beside_a_reference_and_a_figure_names_both() -> None:
    again = [replace(s, arm="again") for s in curve("base")]
    arms = [*curve("base"), *again, *curve("base", quantizer="tcq8", rate=(0.95,) * 3)]
    references = {"other": points(curve("base", rate=(0.5,) * 3))}
    assert [row["bd_rate_percent"] for row in over_references(arms, references)] == pytest.approx([100, 90])
    svg = bd_rate_figures(arms, bd_rates(arms), "x")["bd-rate-over-first.svg"].decode()
    for text in ("tcq8, base over base", "tcq8, base over again", "over a base of the first quantizer"):
        assert text in svg


def axis_used(files: dict[str, bytes]) -> float:
    """The part of the upper panel's width between the leftmost and the rightmost dark blue point."""
    picture = np.asarray(Image.open(io.BytesIO(files["rate-distortion.png"])).convert("RGB")).astype(int)
    upper = picture[100 : len(picture) // 2]
    blue = np.abs(upper - (0, 0x72, 0xB2)).sum(2) < 90
    frame = np.flatnonzero((upper < 60).all(2).mean(0) > 0.9)
    columns = np.flatnonzero(blue[:, frame[0] : frame[-1]].any(0))
    return float((columns[-1] - columns[0]) / (frame[-1] - frame[0]))


def test_the_curves_fill_their_panel_with_and_without_a_reference() -> None:
    arms = [*curve("base"), *curve("paper", seed=0, gain_db=(0.1,) * 3)]
    for references in ({}, {"far": [(0.01, 10.0), *points(curve("base")), (90.0, 60.0)]}):
        assert axis_used(rate_distortion(arms, "x", references)) > 0.8


def test_the_report_has_all_tables_and_the_terminal_the_short_ones(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path))
    entries = []
    # a name such as nested columns have
    control = [replace(s, arm="all_seeds") for s in curve("noise", seed=0, gain_db=(0.1,) * 3)]
    for s in [*curve("base"), *control]:
        axes = {
            name: getattr(s, name)
            for name in ("lmbda", "quantizer", "arm", "seed", "parts", "latents", "recipe")
        }
        blob = canonical_json({"images": s.images, "rate": "tables"})
        entries.append({"scores": workspace.blobs.put(blob, ".json"), **axes})
    manifest = {"images": [{"digest": f"d{i}", "source": f"photos/{i}.png"} for i in range(3)]}
    published = [[0.98 * bpp, psnr] for bpp, psnr in points(curve("base"))]
    images = workspace.blobs.put(canonical_json(manifest), ".json")
    blobs, _ = make_report(str(tmp_path), "x", entries, images, {"published": published})
    report = json.loads(workspace.blobs.get(blobs["report.json"]))
    assert report["bd_rate"][0]["bd_rate_percent"] == pytest.approx(100 * (10 ** (-0.1 / 8) - 1), abs=1e-9)
    assert len(report["gains"]) == len(LMBDAS)
    assert report["references"][0]["bd_rate_percent"] == pytest.approx(100 * (1 / 0.98 - 1), abs=1e-9)
    table = list(csv.DictReader(io.StringIO(workspace.blobs.get(blobs["report.csv"]).decode())))
    assert float(table[-1]["over_base_db"]) == pytest.approx(0.1)
    assert table[-1]["over_all_seeds_db"] == ""
    assert {"report.csv", "bd-rate.csv", "gains.csv", "bd-rate-over-base.png"} <= set(blobs)

    console = Console(file=io.StringIO(), width=200)
    show(workspace, {"axes": {"experiment": "x"}, "outputs": {"report": {"files": blobs}}}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "-2.84 … -2.84 %" in shown
    assert "| published | urq     | +2.04 % " in shown
    assert "Gains at each λ" not in shown
    assert "Gains at each λ" in (tmp_path / "reports/x/report.md").read_text()
