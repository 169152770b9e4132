"""What a session trusts: a record counts only while the data that it names is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.plan import Step
from jobs.session import WouldRetrain, _refuse_retraining, _without_data
from jobs.stage import Input, Node
from storage.blobs import BlobError
from storage.images import ImageStore, Source, pixel_digest
from storage.keys import canonical_json
from storage.latents import LatentSet
from storage.parts import PartImage
from storage.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"))


@pytest.fixture
def steps(workspace: Workspace) -> list[Step]:
    """An ingest and a quantize that have finished, with real data behind them."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    name = pixel_digest(pixels)
    ImageStore(workspace).write_shard({name: pixels}, [Source("a.png", 1, 1, {}, digest=name)])
    manifest = workspace.blobs.put(canonical_json({"images": [{"digest": name}]}), ".json")
    latents = LatentSet(workspace, "5" * 64)
    latents.write_part(
        "0", [PartImage(name, 8, 8, np.ones((2, 4, 4), "i2"), np.ones((1, 1, 1), "i2"), 1.0, 1.0, 1.0)]
    )
    images = {"images": {"kind": "images", "digest": "d", "blob": manifest, "note": {}}}
    found = {"latents": {"kind": "latents", "digest": "l", "note": {"set": latents.key}}}
    ingest = Node("ingest", {"images": "train"}, {})
    quantize = Node("quantize", {"quantizer": "urq"}, {}, {"images": Input(ingest.id, "images")})
    return [Step(ingest, "1" * 64, {}, record(images), ""), Step(quantize, "2" * 64, {}, record(found), "")]


def record(outputs: dict[str, Any]) -> dict[str, Any]:
    return {"outputs": outputs, "summary": {}}


def test_whole_data_is_trusted(workspace: Workspace, steps: list[Step]) -> None:
    assert list(_without_data(workspace, steps)) == []


def test_a_retired_part_is_quantized_again(workspace: Workspace, steps: list[Step]) -> None:
    latents = LatentSet(workspace, "5" * 64)
    latents.retire(next(iter(latents.parts())), "a test")
    assert list(_without_data(workspace, steps)) == [f"results/quantize/{'2' * 64}"]


def test_images_whose_shard_record_was_moved_away_are_ingested_again(
    workspace: Workspace, steps: list[Step]
) -> None:
    workspace.delete("records/images")
    assert list(_without_data(workspace, steps)) == [f"results/ingest/{'1' * 64}"]


def test_a_missing_output_is_told_with_what_to_do(workspace: Workspace, steps: list[Step]) -> None:
    workspace.delete("blobs")
    with pytest.raises(
        BlobError, match=r"is missing: .*move the records in records/results that name it away"
    ):
        list(_without_data(workspace, steps))


def test_a_codec_taken_from_another_experiment_is_guarded_too(small: Any) -> None:
    experiment, results, step = small
    _refuse_retraining(experiment, results, step)
    with pytest.raises(WouldRetrain, match=r"has been trained before in experiment 'mine'.*--retrain"):
        _refuse_retraining(experiment, results, step, {"old"})


def test_going_on_from_a_codec_is_free_once(small: Any) -> None:
    experiment, results, step = small
    further = replace(step, ingredients={"inputs": {"start": "first"}})
    _refuse_retraining(experiment, results, further, {"old"})
    second = results["train"]["old"] | {
        "outputs": {"codec": {"digest": "second"}},
        "ingredients": {"inputs": {"start": "first"}},
    }
    results["train"]["further"] = second
    with pytest.raises(WouldRetrain):
        _refuse_retraining(experiment, results, further, {"old", "further"})


@pytest.fixture
def small(tmp_path: Path) -> Any:
    from jobs.experiment import check

    document = {
        "name": "mine",
        "train": {"images": str(tmp_path)},
        "quantizers": {"urq": {"kind": "urq"}},
        "arms": {"base": {}},
        "evaluate": {"images": str(tmp_path)},
    }
    old = {"experiment": "another", "axes": {"lmbda": 0.013}, "seconds": 1.0, "ended": "then"}
    old |= {"outputs": {"codec": {"digest": "first"}}, "ingredients": {"inputs": {}}}
    why = "differs in settings.steps (1 → 2)"
    step = Step(Node("train", {"lmbda": 0.013}, {}), "new", {"inputs": {}}, None, why)
    return check(document, "test"), {"train": {"old": old}}, step
