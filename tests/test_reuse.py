"""What a change computes again of the latents: the table of docs/latents.md, row by row."""

from __future__ import annotations

import shutil
from pathlib import Path

import photos
import pytest
from laboratory import Lab

TCQ = {"quantizer": "tcq4"}
ALL = len(photos.TRAIN)


def quantize(lab: Lab, *overrides: str) -> tuple[str, int, int]:
    """Run the stage; its set, its images, and how many of them it computed just now (0 if it had nothing to do)."""
    before = lab.records("results/quantize")
    lab.run(*overrides, stage="quantize", only=TCQ, retrain=True)
    new = [record for name, record in lab.records("results/quantize").items() if name not in before]
    record = new[0] if new else lab.record("quantize", **TCQ)
    summary = record["summary"]
    return (
        record["outputs"]["latents"]["note"]["set"],
        summary["images"],
        summary["quantized_now"] if new else 0,
    )


@pytest.fixture
def lab(reference: Lab, tmp_path: Path) -> Lab:
    return reference.copy(tmp_path / "workspace")


def test_nothing_is_computed_where_nothing_of_the_encoder_changes(lab: Lab, tmp_path: Path) -> None:
    known, _, _ = quantize(lab)
    shutil.copytree(lab.folder / "train", tmp_path / "elsewhere")
    for change, images in (
        ("arms.paper.steps=7", ALL),
        ("arms.paper.learning_rate=1e-5", ALL),
        ("seeds=[3]", ALL),
        ("resources.quantize.num_cpus=2", ALL),
        ("resources.quantize.in_flight=1", ALL),
        ("name=other", ALL),
        (f"latents.images={tmp_path / 'elsewhere'}", ALL),
        ("moved", ALL),
        (f"latents.images={{folders: {lab.folder / 'train'}, limit: 4}}", 4),
    ):
        if change == "moved":
            shutil.move(lab.root, tmp_path / "moved")
            lab = lab.beside(tmp_path / "moved")
        found = quantize(lab, *([] if change == "moved" else [change]))
        assert found == (known, images, 0), change


def test_a_limit_grows_into_the_whole_set(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace", without=["quantize"])
    few = f"latents.images={{folders: {lab.folder / 'train'}, limit: 2}}"
    known, images, computed = quantize(lab, few)
    assert (images, computed) == (2, 2)
    assert quantize(lab) == (known, ALL, ALL - 2)
    expected = reference.record("quantize", **TCQ)["outputs"]["latents"]["digest"]
    digests = [r["outputs"]["latents"]["digest"] for r in lab.records("results/quantize").values()]
    assert expected in digests


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.seed=1", "settings.seed (0 → 1)"),
        ("quantizers.tcq4.step=0.8", "settings.step (0.7 → 0.8)"),
        ("quantizers.tcq4.lmbda_q=0.2", "settings.lmbda_q (0.1 → 0.2)"),
        ("quantizers.tcq4.centroids=true", "settings.centroids (False → True)"),
    ],
)
def test_another_encoder_makes_a_new_set(lab: Lab, change: str, named: str) -> None:
    known, _, _ = quantize(lab)
    assert named in lab.plan(change)
    found, images, computed = quantize(lab, change)
    assert found != known
    assert (images, computed) == (ALL, ALL)
