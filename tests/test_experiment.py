"""The experiment file: what is accepted, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from jobs.experiment import Experiment, ExperimentError, QuantizerSection, Trellis, load
from pipeline.quantizers import QUANTIZERS
from pipeline.quantizers.trellis import TRELLISES

FILE = """
name: small
train: {images: photos, lmbda: [0.0067, 0.013], steps: 1_000, learning_rate: 1e-4}
quantizers: {urq: {kind: urq}, tcq8: {kind: tcq, trellis: vvc8, step: 0.7, lmbda_q: 0.1}}
arms: {base: {}, paper: {parts: decoder, steps: 10}}
evaluate: {images: [kodak, /elsewhere]}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(FILE)
    return str(path)


def test_yaml_numbers_and_paths(file: str, tmp_path: Path) -> None:
    experiment = load(file)
    assert experiment.train is not None
    assert experiment.train.steps == 1000
    assert experiment.train.learning_rate == 1e-4
    assert experiment.train.images.folders == [str(tmp_path / "photos")]
    assert experiment.evaluate.images.folders == [str(tmp_path / "kodak"), "/elsewhere"]
    assert experiment.latent_images == experiment.train.images


def test_set_overrides_values_and_paths_are_relative_to_the_current_folder(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["train.steps=1e3", "train.images=mine", "train.images.limit=5", "arms.paper.latents=noise"]
    with pytest.raises(ExperimentError, match=r"train\.steps"):
        load(file, overrides)  # 1e3 is a float, and steps are counted
    experiment = load(file, [*overrides[1:], "seeds=[0, 1]"])
    assert experiment.train is not None
    assert experiment.train.images.folders == [str(tmp_path / "mine")]
    assert experiment.train.images.limit == 5
    assert experiment.arms["paper"].is_control
    assert experiment.seeds == [0, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", r"train\.stepz: unknown key; expected one of: images, architecture"),
        ("colour=red", r"colour: unknown key; expected one of: name, train"),
        ("resources.train.cpus=3", r"resources\.train\.cpus: unknown key; expected one of: num_cpus"),
        ("train.steps=many", r"train\.steps: .*integer \(found 'many'\)"),
        ("train.steps=-1", r"train\.steps: .*greater than 0 \(found -1\)"),
        ("train.crop=100", r"train\.crop: .*multiple of 64 \(found 100\)"),
        ("train.lmbda=[0.1, 0.1]", r"train\.lmbda holds a value twice"),
        ("quantizers.tcq8.trellis=vvc9", r"quantizers\.tcq8\.trellis: .*'vvc8'.*\(found 'vvc9'\)"),
        ("quantizers.new.kind=tcq", r"quantizers\.new: kind 'tcq' needs a `trellis`"),
        ("quantizers.urq.lmbda_q=0.1", r"quantizers\.urq: kind 'urq' rounds and takes no `lmbda_q`"),
        ("arms.base.steps=3", r"arms\.base: an arm without `parts` is the base codec and takes no steps"),
        ("codec={digest: abc, lmbda: 1}", r"codec\.0\.digest"),
        ("train=null", r"expected either `train` .* or `codec`"),
        ("nothing", r"expected KEY=VALUE"),
        ("name.x=3", r"'name' is not a section of the file"),
    ],
)
def test_each_mistake_is_named(file: str, override: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load(file, [override])


def test_scale_rows_need_real_latents(file: str) -> None:
    with pytest.raises(ExperimentError, match="`parts: decoder\\+scale` needs `latents: quantized`"):
        load(file, ["arms.paper={parts: decoder+scale, latents: noise}"])


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="expected an experiment file, found none that can be read"):
        load(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(ExperimentError, match=r"broken\.yaml: not a YAML document"):
        load(str(broken))


def test_the_file_knows_the_quantizers_that_there_are() -> None:
    assert set(get_args(Trellis)) == set(TRELLISES)
    assert set(get_args(QuantizerSection.model_fields["kind"].annotation)) == set(QUANTIZERS)


@pytest.mark.parametrize("path", sorted(Path("experiments").glob("*.yaml")), ids=str)
def test_shipped_experiments_load(path: Path) -> None:
    assert isinstance(load(str(path)), Experiment)
