"""A trained codec is not replaced unasked, also where only reading the images shows that it would be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jobs.cluster import Cluster
from jobs.experiment import Experiment, check
from jobs.graph import expand
from jobs.plan import resolve
from jobs.progress import Board
from jobs.resources import AllResources
from jobs.run import Drive, RunFailed, run
from jobs.session import WouldRetrain, _refuse_retraining
from storage.workspace import Workspace


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for seed, name in enumerate(("train", "test")):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    document = {
        "name": "mine",
        "train": {"images": str(tmp_path / "train")},
        "quantizers": {"urq": {"kind": "urq"}},
        "arms": {"base": {}},
        "evaluate": {"images": str(tmp_path / "test")},
    }
    return check(document, "test")


def test_training_is_refused_once_its_images_are_known(experiment: Experiment, tmp_path: Path) -> None:
    nodes = [node for node in expand(experiment) if node.stage in ("ingest", "train")][:3]
    ingested = {
        node.id: {"outputs": {"images": {"kind": "images", "digest": "b" * 64, "note": {}}}}
        for node in nodes
        if node.stage == "ingest"
    }
    unknown = next(step for step in resolve(nodes, {}) if step.node.stage == "train")
    train = next(step for step in resolve(nodes, {}, ingested) if step.node.stage == "train")
    old = {
        "experiment": "mine",
        "axes": {"lmbda": 0.013},
        "seconds": 7200.0,
        "ended": "2026-01-01",
        "outputs": {"codec": {"digest": "c" * 64}},
        "ingredients": {**(train.ingredients or {}), "inputs": {"images": "a" * 64}},
    }
    results = {"train": {"0" * 64: old}}

    _refuse_retraining(experiment, results, unknown)  # nothing to object to yet
    train = next(s for s in resolve(nodes, results, ingested) if s.node.stage == "train")
    with pytest.raises(WouldRetrain, match=r"7200 s.*inputs\.images \(aaaaaaaa → bbbbbbbb\).*--retrain"):
        _refuse_retraining(experiment, results, train)


def test_the_driver_asks_before_it_begins(experiment: Experiment, tmp_path: Path) -> None:
    def refuse(step: object) -> None:
        raise WouldRetrain("ask for it")

    workspace = Workspace.open(str(tmp_path / "workspace"))
    drive = Drive(workspace, Cluster(), AllResources(), "mine", Board(Console(quiet=True)), approve=refuse)
    ingest = expand(experiment)[:1]
    with pytest.raises(RunFailed, match="ask for it"):
        run(ingest, {}, drive)
    assert not workspace.records.load("attempts")
