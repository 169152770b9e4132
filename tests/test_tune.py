"""Tuning: the search, what a try measures, what is kept, and the stage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import skimage.data
import torch
from laboratory import Lab

from jobs.run import RunFailed
from jobs.tune import evenly
from pipeline.codec.artifact import Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.coding import code, synthesise
from pipeline.judging import sample
from pipeline.pixels import centre_crop
from pipeline.quantizers import Settings, Tables, contexts, design, quantize, settings
from pipeline.quantizers.compass import Point, descend
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.refine import Residuals, refine
from pipeline.quantizers.tuning import Sample, Try, Tuned, choose, mean, measure, search
from pipeline.sigma import sigma_levels
from storage.lineage import default_tracking_uri

LMBDA = 0.013
DATA_SIGMA = 20  # level of σ ≈ 1.3
REFINED = ("", " with counts", " with counts and centroids")


def searched(cost: Callable[[Point], float], axes: int, halvings: int = 3) -> tuple[Point, list[Point]]:
    """Where a search ends, and where it looked."""
    search = descend([0.5] * axes, halvings)
    looks = [next(search)]
    while True:
        try:
            looks.append(search.send(cost(looks[-1])))
        except StopIteration as end:
            return end.value, looks


@pytest.mark.parametrize("minimum", [(0.0,), (1.3,), (-0.7, 0.4), (2.1, -1.6)])
def test_the_search_finds_a_minimum_in_few_looks(minimum: Point) -> None:
    def bowl(point: Point) -> float:
        x = np.subtract(point, minimum)
        return 1 + math.cosh(float(x[0])) + (0 if len(x) == 1 else float(x[1] ** 2 + 0.5 * x[0] * x[1]))

    best, looks = searched(bowl, len(minimum))
    assert np.abs(np.subtract(best, minimum)).max() < 0.04
    assert len(set(looks)) == len(looks) <= 22 * len(minimum)
    assert bowl(best) == min(bowl(look) for look in looks)


def test_the_search_stays_where_there_are_places() -> None:
    best, looks = searched(lambda p: math.inf if p[0] > 0.8 else -p[0], 1)
    assert best == (0.75,)
    assert max(look[0] for look in looks) <= 1.25  # a step beyond


def source(scale: float, seed: int) -> Sample:
    """A Gaussian image whose picture is its latents: what tuning should find is known."""
    rng = np.random.default_rng(seed)
    sigma_index = np.full((32, 400), DATA_SIGMA, np.uint8)
    residual = (rng.normal(size=sigma_index.shape) * sigma_levels()[DATA_SIGMA] * scale).astype(np.float32)
    return Sample(
        Residuals(residual, sigma_index),
        lambda r: float(np.square(r - residual, dtype=np.float64).mean()),
        side_bits=100.0,
        pixels=residual.size,
    )


def tuned(
    start: Settings, samples: list[Sample], lmbda: float, refining: bool = True
) -> tuple[Tuned, list[Try]]:
    """The outcome, and the tries on the way."""
    tries, looks = [], search(start, samples, lmbda)
    while True:
        try:
            tries.append(next(looks))
        except StopIteration as end:
            return choose(start, end.value, samples, lmbda, refining=refining), tries


def test_what_is_measured_is_rate_and_distortion() -> None:
    tables, samples = midpoint_tables(settings("urq")), [source(1.0, seed) for seed in (1, 2)]
    rows = measure(tables, samples, 2.0)
    for row, one in zip(rows, samples, strict=True):
        bits = quantize(*one.latents, tables).bits.sum() + 100
        assert row.bpp == pytest.approx(bits / one.pixels)
        assert row.distortion == pytest.approx(1 / 12, rel=0.05)
        assert row.cost == row.bpp + 2.0 * row.distortion
    assert mean(rows).cost == pytest.approx((rows[0].cost + rows[1].cost) / 2)


def test_a_step_is_found_that_suits_lmbda() -> None:
    """At high rate D = Δ²/12 and R falls by log2 Δ: J is least where Δ² = 6/(λ ln 2)."""
    lmbda = 60.0
    best = math.sqrt(6 / (lmbda * math.log(2)))
    samples = [source(1.0, seed) for seed in range(4)]
    outcome, tries = tuned(settings("urq", step=0.7), samples, lmbda, refining=False)
    assert outcome.tables.settings.step == pytest.approx(best, rel=0.04)
    assert len(tries) < 12
    assert outcome.kept == "tuned"
    assert outcome.held_out["tuned"].cost < outcome.held_out["default"].cost
    again, _ = tuned(settings("urq", step=0.7), samples, lmbda, refining=False)
    assert again.tables.digest == outcome.tables.digest
    assert again.held_out == outcome.held_out


def test_held_out_images_alone_decide() -> None:
    """Each half has a scale of its own: what suits the finding half is worse than the default on the other."""
    samples = [source(scale, seed) for seed, scale in enumerate((0.2, 1.0, 0.2, 1.0))]
    start = settings("tcq", "vvc4", step=0.5, lmbda_q=0.1)
    found = settings("tcq", "vvc4", step=1.0, lmbda_q=0.4)
    outcome, designed = choose(start, found, samples, 20.0), design(start)
    assert outcome.kept == "default"
    assert outcome.held_out["default"] == mean(measure(designed, samples[1::2], 20.0))
    counted = refine(designed, [one.latents for one in samples[::2]])
    by_finders = [mean(measure(tables, samples[::2], 20.0)).cost for tables in (counted, designed)]
    assert by_finders[0] < by_finders[1]
    same = choose(start, start, samples, 20.0)
    assert list(same.held_out) == [f"default{refined}" for refined in REFINED]


def test_what_the_search_looks_at_is_the_other_half() -> None:
    """Images held out may be anything: the tries are the same."""
    finding, held_out = [source(1.0, seed) for seed in (0, 1)], source(1.0, 2)
    runs = []
    for scale in (1.0, 0.1):
        other = source(scale, 3)
        looks = search(settings("urq"), [finding[0], held_out, finding[1], other], 5.0)
        runs.append([next(looks) for _ in range(3)])
    assert runs[0] == runs[1]


def test_refined_tables_are_kept_where_residuals_are_not_what_sigma_says() -> None:
    """A σ that is predicted twice too large: counts tell."""
    samples = [source(0.5, seed) for seed in range(4)]
    outcome, _ = tuned(settings("urq", step=0.9), samples, 5.0)
    assert "with counts" in outcome.kept
    assert outcome.held_out[outcome.kept].cost < 0.98 * outcome.held_out["tuned"].cost
    names = [f"{name}{refined}" for refined in REFINED for name in ("default", "tuned")]
    assert list(outcome.held_out) == names
    plain, _ = tuned(settings("urq", step=0.9), samples, 5.0, refining=False)
    assert set(plain.held_out) == {"default", "tuned"}


@pytest.mark.parametrize(
    ("start", "axes"),
    [
        (settings("tcq", "vvc4"), {"step", "lmbda_q"}),
        (settings("rdoq", lmbda_q=0.0), {"step"}),
        (settings("deadzone"), {"step", "offset"}),
        (settings("urq", step=0.05), {"step"}),  # at the end of the range: only upwards
    ],
)
def test_what_is_searched_is_what_the_kind_has(start: Settings, axes: set[str]) -> None:
    looks = search(start, [source(1.0, seed) for seed in range(2)], 5.0)
    tries = [next(looks).settings for _ in range(5 if len(axes) == 2 else 2)]
    assert tries[0] == start
    names = ("step", "lmbda_q", "offset")
    assert {n for t in tries[1:] for n in names if getattr(t, n) != getattr(start, n)} == axes
    assert all(t.step >= 0.05 for t in tries)


def test_a_step_searched_alone_keeps_the_weight_of_rate() -> None:
    start = settings("tcq", "vvc4")
    tries = list(search(start, [source(2.0, seed) for seed in range(2)], 5.0, alone="step"))
    assert len({one.settings.step for one in tries}) > 3
    assert {one.settings.lmbda_q for one in tries} == {start.lmbda_q}


def test_mistakes_are_named() -> None:
    one = source(1.0, 0)
    with pytest.raises(
        ValueError, match="expected at least 2 images, one to find by and one held out, found 1"
    ):
        next(search(settings("urq"), [one], LMBDA))
    with pytest.raises(ValueError, match="expected a finite λ above 0, found 0"):
        next(search(settings("urq"), [one, one], 0.0))
    for alone in (None, "step"):
        with pytest.raises(
            ValueError, match="expected one rounding offset to start from, found 64, one a σ level"
        ):
            next(search(settings("deadzone", offset=(0.4,) * 64), [one, one], LMBDA, alone=alone))


def test_counting_leaves_unseen_levels_alone() -> None:
    prior, one = midpoint_tables(settings("tcq", "vvc4")), source(0.5, 3)
    refined = refine(prior, [one.latents])
    for level in (DATA_SIGMA - 1, DATA_SIGMA + 1):
        np.testing.assert_array_equal(refined.frequency_rows(level), prior.frequency_rows(level))
    used = quantize(*one.latents, prior)
    zero = refined.alphabet[DATA_SIGMA]
    assert (refined.frequency_rows(DATA_SIGMA)[:, zero] > prior.frequency_rows(DATA_SIGMA)[:, zero]).all()
    assert set(np.unique(contexts(used.indices, prior))) == {0, 1}
    np.testing.assert_array_equal(refined.reconstruction, prior.reconstruction)
    moved = refine(prior, [one.latents], centroids=True)
    assert not np.array_equal(moved.reconstruction_rows(DATA_SIGMA), prior.reconstruction_rows(DATA_SIGMA))


def test_a_sample_is_what_coding_an_image_gives() -> None:
    torch.manual_seed(0)
    codec = Codec.from_network(MeanScaleHyperprior(8, 12).eval())
    pixels = np.ascontiguousarray(skimage.data.astronaut()[:100, :130])
    tables = midpoint_tables(settings("urq"))
    (row,) = measure(tables, [sample(codec, pixels)], LMBDA)
    coded = code(codec, tables, pixels)
    assert row.bpp == pytest.approx((coded.bits_y + coded.bits_z) / (100 * 130))
    error = synthesise(codec, coded.latent, 100, 130).astype(np.float64) - pixels
    assert row.distortion == pytest.approx(
        np.square(error).mean(), rel=2e-3
    )  # of pixels that are not rounded


@pytest.mark.parametrize(
    ("shape", "expected"), [((600, 100), (512, 64)), ((130, 700), (128, 512)), ((40, 64), (40, 64))]
)
def test_crops_come_from_the_middle(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = np.arange(math.prod(shape) * 3, dtype=np.uint32).astype(np.uint8).reshape(*shape, 3)
    found = centre_crop(pixels, 512, 64)
    assert found.shape == (*expected, 3)
    top, left = ((whole - part) // 2 for whole, part in zip(shape, expected, strict=True))
    np.testing.assert_array_equal(found, pixels[top : top + expected[0], left : left + expected[1]])


def test_images_are_spread_evenly() -> None:
    names = [f"{i:02}" for i in range(10)]
    assert evenly(names, 4) == ["00", "02", "05", "07"]
    assert evenly(names, 99) == names


TUNED = ("quantizers.urq.tune=true", "tune.count=4", "tune.crop=64")


def test_the_stage_gives_tables_that_quantize_and_evaluate_take(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    planned = lab.plan(*TUNED)
    assert "some 15 tries on 2 of 4 images; first of its stage here" in planned
    assert "compute tune lmbda=0.013 quantizer=urq" in planned
    printed = lab.run(*TUNED, only={"quantizer": "urq", "arm": "base"})
    record = lab.record("tune")
    tables = Tables.from_bytes(lab.workspace.blobs.get(record["outputs"]["tables"]["blob"]))
    assert tables.digest == record["outputs"]["tables"]["digest"]
    assert tables.settings.step == record["summary"]["delta"] == record["outputs"]["tables"]["note"]["delta"]
    scores = [r for r in lab.records("results/evaluate").values() if r["reads"]["tables"] == tables.digest]
    assert len(scores) == 1
    assert "done: tune lmbda=0.013 quantizer=urq" in printed
    more = lab.plan(*TUNED, f"latents.images={lab.folder / 'train'}")
    assert "reuse" in more.split("tune ")[0].splitlines()[-1]
    # where the search begins is part of the key, and said so
    assert "settings.quantizer.step (1.0 → 0.9)" in lab.plan(*TUNED, "quantizers.urq.step=0.9")


def test_a_finetuned_codec_is_tuned_again(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    lab.run(*TUNED, stage="tune")
    finetuned = reference.record("finetune", quantizer="urq", arm="paper")["outputs"]["codec"]["digest"]
    again = (
        f"codec={{digest: {finetuned}, lmbda: 0.013}}",
        "train=null",
        f"latents.images={lab.folder / 'train'}",
    )
    lab.run(*TUNED, *again, stage="quantize", only={"quantizer": "urq"})
    first, second = sorted(lab.records("results/tune").values(), key=lambda record: record["ended"])
    assert first["reads"]["codec"] == lab.record("train")["outputs"]["codec"]["digest"]
    assert second["reads"]["codec"] == finetuned
    assert first["ingredients"]["settings"] == second["ingredients"]["settings"]
    assert first["summary"]["J default"] != second["summary"]["J default"]  # the decoder's pictures decide
    tables = second["outputs"]["tables"]["digest"]
    assert [
        r["reads"]["codec"]
        for r in lab.records("results/quantize").values()
        if r["reads"]["tables"] == tables
    ] == [finetuned]
    assert "1 tune" in lab.run(*TUNED, stage="tune").splitlines()[0]  # that of the base codec stands


ROUND = "arms.round={parts: decoder, after: scale, retune: true, steps: 6, batch: 2, crop: 96, precision: float32}"


def test_a_round_tunes_quantizes_and_finetunes_for_the_codec_before(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    lab.run(ROUND, "tune.count=4", "tune.crop=64", only={"quantizer": "tcq4", "arm": "round"})
    before = lab.record("finetune", quantizer="tcq4", arm="scale")
    after = lab.record("finetune", quantizer="tcq4", arm="round")
    tables = lab.record("tune")["outputs"]["tables"]["digest"]
    assert (
        after["reads"]["codec"]
        == before["outputs"]["codec"]["digest"]
        == lab.record("tune")["reads"]["codec"]
    )
    assert after["reads"]["tables"] == tables
    assert after["reads"]["latents"] != before["reads"]["latents"]
    scores = lab.record("evaluate", quantizer="tcq4", arm="round")
    assert scores["reads"]["codec"] == after["outputs"]["codec"]["digest"]
    assert scores["reads"]["tables"] == tables


def test_mlflow_shows_every_try_and_the_outcome(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    lab.run(*TUNED, stage="tune", tracking=None)
    record = lab.record("tune")
    lines = lab.workspace.blobs.get(record["outputs"]["metrics"]["blob"]).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    client = mlflow.MlflowClient(default_tracking_uri(lab.root))
    found = client.get_experiment_by_name("small")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], f"tags.`retrellis.id` = 'tune/{record['key']}'")
    for name in ("J", "bpp", "delta"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [
            (row["step"], row[name]) for row in rows
        ]
    assert run.data.metrics["summary/delta"] == record["summary"]["delta"]
    assert run.data.metrics["J default"] == record["summary"]["J default"]
    files = Path(lab.root, "mlflow-artifacts", run.info.artifact_uri.removeprefix("mlflow-artifacts:/"))
    kept = record["outputs"]["tables"]
    assert Tables.from_bytes((files / "tables.safetensors").read_bytes()).digest == kept["digest"]


def test_what_tuning_cannot_work_with_is_said(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    with pytest.raises(
        ValueError, match="this experiment has no tune; a quantizer with `tune: true` has one"
    ):
        lab.run(stage="tune")
    with pytest.raises(RunFailed, match=r"expected at least 2 images to tune on.* found 1; .*`tune\.images`"):
        lab.run(*TUNED, f"tune.images={{folders: [{lab.folder / 'train'}], limit: 1}}", stage="tune")
