"""The whole path on real Ray, Zarr and MLflow: what is computed, what is reused, and what a user is told."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import photos
import PIL.Image
import pytest
from laboratory import Lab, mean

from jobs.session import WouldRetrain
from pipeline.bitstream import ImageCoder
from pipeline.codec.artifact import Codec
from pipeline.coding import analyse
from pipeline.quantizers import Tables, quantize, sequence_bits
from storage.images import ImageStore
from storage.latents import LatentSet
from storage.lineage import default_tracking_uri

QUANTIZERS = ("urq", "tcq4")
DECODER_ARMS = ("base", "noise", "rounded", "paper")  # they differ in g_s alone
ARMS = (*DECODER_ARMS, "scale")
HEAVY = ("ray", "torch", "mlflow", "numba")
REUSE = """
import sys, time
from jobs.cli import main
begin = time.monotonic()
try:
    main()
finally:
    loaded = [name for name in {heavy!r} if name in sys.modules]
    print("seconds", time.monotonic() - begin, "loaded", loaded, file=sys.stderr)
"""


def test_every_instance_has_a_record_that_explains_itself(reference: Lab) -> None:
    records = reference.records("results")
    stages = [name.split("/")[1] for name in records]
    expected = {
        "ingest": 2,
        "train": 1,
        "tables": 2,
        "quantize": 2,
        "finetune": 8,
        "evaluate": 10,
        "report": 1,
    }
    assert {stage: stages.count(stage) for stage in expected} == expected
    assert len(records) == sum(expected.values())
    for name, record in records.items():
        assert name == f"results/{record['stage']}/{record['key']}"
        assert {"stage", "stage_version", "settings", "inputs"} == record["ingredients"].keys()
        assert {"torch", "ray", "zarr"} < record["versions"].keys()
        assert record["host"]
        assert record["started"] < record["ended"]


def test_latent_sets_hold_what_the_quantizer_gives(reference: Lab) -> None:
    workspace = reference.workspace
    codec = Codec.from_bytes(workspace.blobs.get(reference.record("train")["outputs"]["codec"]["blob"]))
    for quantizer in QUANTIZERS:
        tables = _tables(reference, quantizer)
        note = reference.record("quantize", quantizer=quantizer)["outputs"]["latents"]["note"]
        latents = LatentSet(workspace, note["set"])
        assert len(latents.images()) == note["images"] == len(photos.TRAIN)
        for name in sorted(latents.images())[:2]:
            stored = latents.read(name)
            seen = analyse(codec, ImageStore(workspace).read(name))
            flat = (seen.latent.shape[0], -1)
            quantized = quantize(
                (seen.latent - seen.means).reshape(flat), seen.sigma_index.reshape(flat), tables
            )
            np.testing.assert_array_equal(stored.indices.reshape(flat), quantized.indices)
            np.testing.assert_array_equal(stored.hyper_indices, seen.hyper_indices)
            bits = sequence_bits(quantized.indices, seen.sigma_index.reshape(flat), tables)
            assert stored.bits_y == pytest.approx(bits.sum(), rel=1e-12)


def test_decoder_arms_share_indices_and_bits(reference: Lab) -> None:
    for quantizer in QUANTIZERS:
        base = reference.scores(quantizer, "base")
        for arm in DECODER_ARMS[1:]:
            scores = reference.scores(quantizer, arm)
            assert scores["codec"] != base["codec"]
            for mine, other in zip(scores["images"], base["images"], strict=True):
                assert {n: mine[n] for n in ("image", "indices", "bits_y", "bits_z", "bpp")} == {
                    n: other[n] for n in ("image", "indices", "bits_y", "bits_z", "bpp")
                }
                assert mine["psnr_db"] != other["psnr_db"]
        assert 0.5 < mean(base, "psnr_db") < 60
        assert 0 < mean(base, "ms_ssim") < 1
    assert (
        reference.scores("urq", "base")["images"][0]["indices"]
        != (reference.scores("tcq4", "base")["images"][0]["indices"])
    )


def test_bits_come_from_the_tables_that_drove_the_search(reference: Lab) -> None:
    workspace = reference.workspace
    for arm in ("base", "scale"):  # `scale` quantizes with its own σ
        scores = reference.scores("tcq4", arm)
        codec = Codec.from_bytes(workspace.blobs.get(scores["codec"]))
        row = scores["images"][0]
        seen = analyse(codec, ImageStore(workspace).read(row["image"]))
        flat = (seen.latent.shape[0], -1)
        tables = _tables(reference, "tcq4")
        sigma_index = seen.sigma_index.reshape(flat)
        indices = quantize((seen.latent - seen.means).reshape(flat), sigma_index, tables).indices
        assert row["bits_y"] == pytest.approx(sequence_bits(indices, sigma_index, tables).sum(), rel=1e-12)
        data = ImageCoder(codec, tables).encode(ImageStore(workspace).read(row["image"]))
        assert row["bytes"] == len(data)
        assert row["bpp"] == 8 * row["bytes"] / (row["height"] * row["width"])
        assert 0 < 8 * row["bytes"] - row["bits_y"] - row["bits_z"] < 8 * 64 + 0.003 * row["bits_y"]


def test_report_files_say_what_the_scores_say(reference: Lab) -> None:
    folder = Path(reference.root) / "reports" / "small"
    report = json.loads((folder / "report.json").read_text())
    with (folder / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["quantizer"], row["arm"]) for row in table] == [(q, a) for q in QUANTIZERS for a in ARMS]
    for row, shown in zip(table, report["table"], strict=True):
        assert float(row["psnr_db"]) == pytest.approx(shown["psnr_db"])
        assert shown["psnr_db"] == pytest.approx(
            mean(reference.scores(row["quantizer"], row["arm"]), "psnr_db")
        )
    assert "exaggerates what finetuning gives" in (folder / "report.md").read_text()
    for name in ("rate-distortion.png", "channel-rates.png", "crops.png"):
        with PIL.Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 200
    assert (folder / "rate-distortion.svg").read_text().startswith("<?xml")


def test_lineage_leads_from_a_finetuned_codec_to_the_images(reference: Lab) -> None:
    client = mlflow.MlflowClient(default_tracking_uri(reference.root))
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags["retrellis.id"]: client.get_run(run.info.run_id) for run in found}
    assert {name.removeprefix("results/") for name in reference.records("results")} < runs.keys()
    finetune = runs[f"finetune/{reference.record('finetune', quantizer='tcq4', arm='paper')['key']}"]
    quantize = runs[f"quantize/{reference.record('quantize', quantizer='tcq4')['key']}"]
    train = runs[f"train/{reference.record('train')['key']}"]
    assert finetune.outputs.model_outputs
    read = {client.get_logged_model(entry.model_id).source_run_id for entry in finetune.inputs.model_inputs}
    assert {train.info.run_id, quantize.info.run_id} <= read
    assert train.inputs.dataset_inputs
    assert train.data.metrics["loss"] > 0


def test_again_reuses_everything_at_once_and_starts_nothing(reference: Lab) -> None:
    runner = REUSE.format(heavy=HEAVY)
    command = [sys.executable, "-c", runner, "run", reference.file, "--workspace", reference.root]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=reference.folder)
    assert time.monotonic() - begin < 10
    assert done.returncode == 0, done.stderr
    assert "reuse: 2 ingest, 1 train, 2 tables, 2 quantize, 10 evaluate, 8 finetune, 1 report" in done.stdout
    assert "nothing to compute: no training step, no image quantized" in done.stdout
    assert "| tcq4      | paper" in done.stdout
    assert done.stderr.strip().endswith("loaded []"), done.stderr


def test_more_latent_images_quantize_just_these(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    photos.write(tmp_path / "more", photos.MORE)
    (tmp_path / "more" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then something else")
    printed = lab.run(f"latents.images=[{lab.folder}/train, {tmp_path}/more]", stage="quantize")
    assert "reuse: 1 ingest, 1 train, 2 tables" in printed
    assert "compute: 1 ingest, 2 quantize" in printed
    assert f"skipped {tmp_path}/more/broken.png: " in printed
    for quantizer in QUANTIZERS:
        records = [r for r in lab.records("results/quantize").values() if r["axes"]["quantizer"] == quantizer]
        counts = {r["summary"]["images"]: r["summary"]["quantized_now"] for r in records}
        assert counts == {len(photos.TRAIN): len(photos.TRAIN), len(photos.TRAIN) + 2: 2}
    assert len(lab.records("results/train")) == 1


def test_a_changed_arm_reuses_its_latents(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    changed = "arms.paper.learning_rate=2e-4"
    planned = lab.plan(changed)
    assert "differs from the nearest record in settings.learning_rate (0.0001 → 0.0002)" in planned
    assert "21 to reuse, 5 to compute" in planned  # 2 finetune, 2 evaluate, the report
    printed = lab.run(changed, only={"quantizer": "urq", "arm": "paper"})
    assert "reuse: 2 ingest, 1 train, 1 tables, 1 quantize" in printed
    assert "compute: 1 finetune, 1 evaluate" in printed
    assert len(lab.records("results/finetune")) == 9


def test_a_changed_codec_is_not_trained_again_unasked(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    with pytest.raises(WouldRetrain) as refused:
        lab.run("train.steps=4", stage="train")
    assert "train lmbda=0.013 has been trained before in experiment 'small'" in str(refused.value)
    assert "differs from the nearest record in settings.steps (30 → 4)" in str(refused.value)
    assert "add --retrain" in str(refused.value)
    assert len(lab.records("attempts/train")) == 1
    lab.run("train.steps=4", stage="train", retrain=True)
    assert len(lab.records("results/train")) == 2


def test_more_steps_go_on_from_the_codec_unasked(reference: Lab, tmp_path: Path) -> None:
    lab = reference.copy(tmp_path / "workspace")
    with pytest.raises(WouldRetrain) as refused:
        lab.run("train.steps=40", stage="train")
    old = lab.record("train")["outputs"]["codec"]["digest"]
    said = f"to go on from it for `train.steps` more steps, --set train.start.digest={old}"
    assert said in str(refused.value)
    printed = lab.run(f"train.start.digest={old}", "train.steps=4", "train.learning_rate=1e-4", stage="train")
    assert "compute: 1 import, 1 train" in printed
    (new,) = [r for r in lab.records("results/train").values() if "start" in r["ingredients"]["inputs"]]
    assert new["ingredients"]["inputs"]["start"] == old


def test_two_runs_on_one_workspace_give_one_set_of_results(
    reference: Lab, ray_address: str, tmp_path: Path
) -> None:
    lab = reference.beside(tmp_path / "workspace")
    both = [
        lab.start("run", lab.file, "--only", "quantizer=urq,arm=paper", address=ray_address) for _ in "ab"
    ]
    assert [run.finish() for run in both] == [0, 0], [run.text for run in both]
    records = lab.records("results")
    assert len(records) == 7  # 2 ingest, train, tables, quantize, finetune, evaluate
    assert len(lab.records("attempts")) > len(records)
    assert lab.content().items() <= reference.content().items()
    latents = LatentSet(lab.workspace, lab.record("quantize")["outputs"]["latents"]["note"]["set"])
    assert len(latents.images()) == len(photos.TRAIN)
    for part in latents.parts():
        latents.read_part(part)  # verifies every object


def _tables(lab: Lab, quantizer: str) -> Tables:
    blob = lab.record("tables", quantizer=quantizer)["outputs"]["tables"]["blob"]
    return Tables.from_bytes(lab.workspace.blobs.get(blob))
