"""What the report says: who is compared with whom, gains only at equal indices and bits, pictures that are pictures."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.report import _before_after, _first_and_last
from jobs.report_tables import as_csv, as_markdown
from pipeline.comparison import Scored, gain_db, gain_percent, rows
from pipeline.figures import busiest_window, channel_rates, crops, rate_distortion

IMAGES = ("a", "b", "c")


def scored(
    arm: str, gain: float, *, lmbda: float = 0.013, seed: int | None = None, recipe: str = "r", **image: Any
) -> Scored:
    """An arm whose images gain `gain` dB at the rate of its λ."""
    kinds = {"base": ("none", "quantized"), "noise": ("decoder", "noise"), "paper": ("decoder", "quantized")}
    bpp = 10 * lmbda**0.5
    images = [
        {
            "image": name,
            "bpp": bpp + 0.1 * i,
            "psnr_db": 30 + 8 * np.log10(bpp + 0.1 * i) + gain,
            "indices": name,
        }
        | image
        for i, name in enumerate(IMAGES)
    ]
    return Scored(lmbda, "tcq8", arm, seed, *kinds[arm], recipe, images)


def test_rows_compare_with_the_base_and_the_control_of_the_same_seed() -> None:
    arms = [
        scored("base", 0.0),
        scored("noise", 0.1, seed=0),
        scored("noise", 0.2, seed=1),
        scored("paper", 0.5, seed=1),
    ]
    table = rows(arms)
    assert list(table[0])[:7] == ["lmbda", "quantizer", "arm", "seed", "bpp", "psnr_db", "ms_ssim"]
    assert table[0]["over_base_db"] is None
    assert table[3]["over_base_db"] == pytest.approx(0.5)
    assert table[3]["over_noise_db"] == pytest.approx(0.3)
    assert table[3]["ms_ssim"] is None


@pytest.mark.parametrize("other", [{"indices": "others"}, {"bpp": 0.5}])
def test_no_gain_is_stated_at_other_indices_or_bits(other: dict[str, Any]) -> None:
    assert gain_db(scored("paper", 0.5, **other), scored("base", 0.0)) is None


def test_a_control_of_another_recipe_is_no_control() -> None:
    paper, base = scored("paper", 0.5, seed=0), scored("base", 0.0, recipe="none")
    assert gain_db(paper, scored("noise", 0.1, seed=0)) == pytest.approx(0.4)
    assert gain_db(paper, scored("noise", 0.1, seed=0, recipe="fewer steps")) is None
    assert gain_db(paper, base) == pytest.approx(0.5)


def test_the_cost_compares_whatever_the_indices() -> None:
    base, other = scored("base", 0.0), scored("paper", 0.0, seed=0, indices="x")
    assert gain_percent(other, base) == pytest.approx(0)
    image = base.images[0]
    cost = sum(r["bpp"] + 0.013 * 255**2 * 10 ** (-r["psnr_db"] / 10) for r in base.images)
    cheaper = replace(other, images=[*base.images[1:], {**image, "bpp": 0}])
    assert gain_percent(cheaper, base) == pytest.approx(-100 * image["bpp"] / cost)
    assert rows([base, other])[1]["cost_over_base_percent"] == pytest.approx(0)
    assert rows([base, other])[0]["cost_over_base_percent"] is None


def test_tables_are_aligned_and_say_what_is_not_comparable() -> None:
    table = rows(
        [scored("base", 0.0), scored("paper", 0.25, seed=0), scored("noise", 0.1, seed=0, indices="x")]
    )
    tables = {"table": table, "bd_rate": [], "gains": []}
    text = as_markdown("small", tables, dict.fromkeys(IMAGES, "x.png"), "bitstream", ["report.csv"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert "+0.250" in lines[3]
    assert lines[4].count("—") >= 2
    assert "bpp (files)" in lines[0]
    assert "exaggerates what finetuning gives" in text
    assert as_csv(table).decode().splitlines()[0].startswith("lmbda,quantizer,arm,seed,bpp")


def test_crops_show_a_finetuned_decoder_where_there_is_one() -> None:
    base, paper, noise = scored("base", 0.0), scored("paper", 0.5, seed=0), scored("noise", 0.1, seed=0)
    retuned = replace(paper, arm="retuned", parts="tables")
    assert _before_after([base, paper, retuned, noise]) == (0, 1)
    assert _before_after([base, retuned, noise]) == (0, 1)
    assert _before_after([base, noise]) is None


def test_crops_show_the_rate_at_which_a_decoder_gains_most() -> None:
    arms = [scored("base", 0.0), scored("paper", 0.5, seed=0), scored("noise", 0.9, seed=0)]
    higher = [replace(arms[0], lmbda=0.05), replace(scored("paper", 0.2, seed=0), lmbda=0.05)]
    assert _before_after(arms + higher) == (0, 1)
    assert _before_after(higher + arms) == (2, 3)


def test_bits_are_compared_with_those_of_the_first_quantizer() -> None:
    rounding, trellis = (scored("base", 0.0), replace(scored("base", 0.0), quantizer="tcq8"))
    paper = replace(scored("paper", 0.5, seed=0), quantizer="tcq8")
    noise = replace(scored("noise", 0.1, seed=0), quantizer="tcq8")
    assert _first_and_last([rounding, trellis, paper, noise]) == (rounding, paper)


def test_figures_are_pictures_and_deterministic() -> None:
    arms = [scored("base", 0.0), scored("noise", 0.1, seed=0), scored("paper", 0.5, seed=0)]
    files = rate_distortion(arms, "small")
    assert files == rate_distortion(arms, "small")
    assert Image.open(io.BytesIO(files["rate-distortion.png"])).size[0] > 1000
    assert files["rate-distortion.svg"].startswith(b"<?xml")
    generator = np.random.default_rng(0)
    original, before = generator.integers(0, 255, (2, 40, 50, 3), np.uint8)
    row = {
        "name": "x",
        "original": original,
        "before": before,
        "after": before,
        "before_title": "b",
        "after_title": "a",
    }
    assert Image.open(io.BytesIO(crops([row])["crops.png"])).size[0] > 1000


def test_rates_of_channels_stand_in_the_order_before() -> None:
    base, after = scored("base", 0.0), scored("paper", 0.5, seed=0)
    for s, bits in ((base, [100.0, 900.0, 0.0]), (after, [50.0, 930.0, 10.0])):
        sizes = {"height": 10, "width": 100, "channel_bits": bits}
        s.images[:] = [{**row, **sizes} for row in s.images]  # type: ignore[index]
    svg = channel_rates(base, after, "small")["channel-rates.svg"].decode()
    assert "base: 1.0000 bpp" in svg
    assert "paper: 0.9900 bpp" in svg
    assert "small; λ = 0.013" in svg


def test_the_window_shown_is_where_two_images_differ_most() -> None:
    before = np.zeros((200, 300, 3), np.uint8)
    after = before.copy()
    after[120:160, 200:240] = 90
    top, left = busiest_window(before, after, 80)
    assert 80 <= top <= 120
    assert 160 <= left <= 200
