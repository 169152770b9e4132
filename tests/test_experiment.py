"""The experiment file: what is accepted, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from jobs.experiment import Experiment, ExperimentError, load
from jobs.fields import CHANNELS_MAX, Trellis
from jobs.tables import quantizer_settings
from pipeline.codec import artifact
from pipeline.quantizer_kinds import KINDS, STATE_CONTEXTS, STEP_RANGE
from pipeline.quantizers import settings
from pipeline.quantizers.trellis import TRELLISES
from pipeline.sigma import SIGMA_LEVELS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
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
        ("train.stepz=1", r"train\.stepz: unknown key; expected one of: images, held_out, architecture"),
        ("colour=red", r"colour: unknown key; expected one of: name, train"),
        ("resources.train.cpus=3", r"resources\.train\.cpus: unknown key; expected one of: num_cpus"),
        ("train.steps=many", r"train\.steps: .*integer \(found 'many'\)"),
        ("train.steps=-1", r"train\.steps: .*greater than 0 \(found -1\)"),
        ("train.crop=100", r"train\.crop: .*multiple of 64 \(found 100\)"),
        ("train.lmbda=[0.1, 0.1]", r"train\.lmbda: expected each value once \(found \[0\.1, 0\.1\]\)"),
        ("train.lmbda=.inf", r"train\.lmbda\.0: .*finite number \(found inf\)"),
        ("train.learning_rate=.nan", r"train\.learning_rate: .*finite number \(found nan\)"),
        ("train.N=4097", r"train\.N: .*less than or equal to 4096 \(found 4097\)"),
        ("train.M=4097", r"train\.M: .*less than or equal to 4096 \(found 4097\)"),
        ("train.seed=9223372036854775808", r"train\.seed: .*less than 9223372036854775808"),
        ("train.images='~no such user/photos'", r"'~no such user/photos': expected a path"),
        ("seeds=[0, -1]", r"seeds\.1: .*greater than or equal to 0 \(found -1\)"),
        ("seeds=[3, 3]", r"seeds: expected each value once \(found \[3, 3\]\)"),
        (
            "evaluate.metrics=[ms_ssim]",
            r"evaluate\.metrics: expected `psnr` .* report .*\(found \['ms_ssim'\]\)",
        ),
        ("evaluate.metrics=[]", r"evaluate\.metrics: expected `psnr` among them.*\(found \[\]\)"),
        ("evaluate.metrics=[psnr, psnr]", r"evaluate\.metrics: expected each value once"),
        ("quantizers.urq.step=0.04", r"quantizers\.urq\.step: .*or equal to 0\.05 \(found 0\.04\)"),
        ("quantizers.urq.step=65", r"quantizers\.urq\.step: .*or equal to 64 \(found 65\)"),
        ("quantizers.tcq8.lmbda_q=2000000.0", r"lmbda_q: .*less than or equal to 1000000 \(found 2000000"),
        ("quantizers.tcq8.lmbda_q=.inf", r"quantizers\.tcq8\.lmbda_q: .*finite number \(found inf\)"),
        ("quantizers.a b.kind=urq", r"quantizers: expected a name of letters, .*\(found 'a b'\)"),
        ("arms.-a.parts=none", r"arms: expected a name .* begins with a letter or a digit \(found '-a'\)"),
        ("quantizers.tcq8.trellis=vvc9", r"quantizers\.tcq8\.trellis: .*'vvc8'.*\(found 'vvc9'\)"),
        (
            "quantizers.urq.trellis=vvc4",
            r"quantizers\.urq: kind 'urq' takes no `trellis`, found vvc4; 'tcq' can use it",
        ),
        (
            "quantizers.urq.lmbda_q=0.1",
            r"quantizers\.urq: kind 'urq' takes no `lmbda_q`, found 0.1; 'rdoq' and 'tcq' can",
        ),
        (
            "quantizers.urq.offset=0.4",
            r"quantizers\.urq: kind 'urq' takes no `offset`, found 0.4; 'deadzone' can",
        ),
        ("quantizers.urq.offset=0", r"quantizers\.urq: kind 'urq' takes no `offset`, found 0"),
        ("quantizers.urq.context=state", r"`context: state` needs a `trellis` of at most 8 .* found none"),
        ("quantizers.new={kind: tcq, trellis: ungerboeck16, context: state}", r"found ungerboeck16"),
        (
            "quantizers.new={kind: deadzone, offset: 0.6}",
            r"offset.*less than or equal to 0\.5 \(found 0\.6\)",
        ),
        ("quantizers.new={kind: deadzone, offset: [0.4, 0.3]}", r"expected one `offset`, or 64, .*found 2"),
        ("quantizers.urq={kind: urq, tune: true, centroids: true}", r"leave `centroids` out"),
        ("tune.count=1", r"tune\.count: .*greater than or equal to 2 \(found 1\)"),
        ("tune.crop=100", r"tune\.crop: .*multiple of 64 \(found 100\)"),
        (
            "resources.train.workers=3",
            r"expected train\.batch to be a multiple of resources\.train\.workers, 3, found 8",
        ),
        (
            "resources.finetune.workers=3",
            r"expected arms\.paper\.batch to be a multiple of resources\.finetune\.workers, 3, found 8",
        ),
        ("resources.evaluate.workers=2", r"resources\.evaluate\.workers: unknown key"),
        ("arms.base.steps=3", r"arms\.base: an arm without `parts` trains nothing and takes no steps"),
        ("arms.base.retune=true", r"arms\.base: `retune` needs `after`"),
        ("arms.new={after: base, retune: true}", r"'new': expected `after` to name an arm .* found 'base'"),
        (
            "arms.new={after: paper, parts: decoder, latents: noise}",
            r"'new': expected `latents: quantized` as in 'paper', .* found noise",
        ),
        (
            "arms.new={after: paper}",
            r"nothing would differ from 'paper': expected `parts`, `effort` or `retune",
        ),
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


def test_a_name_that_reads_like_two_axes_is_refused(file: str) -> None:
    with pytest.raises(ExperimentError, match=r"arms: expected a name .*\(found 'paper seed=0'\)"):
        load(file, ["arms={paper: {parts: decoder}, paper seed=0: {parts: decoder}}"])
    with pytest.raises(ExperimentError, match=r"arms: expected a name .*\(found 8\)"):
        load(file, ["arms={8: {parts: decoder}}"])
    assert set(load(file, ["arms={paper+scale.v1_a-b: {}, 8x: {}}"]).arms) == {"paper+scale.v1_a-b", "8x"}


def test_nothing_behind_a_key_is_an_empty_section(file: str) -> None:
    with Path(file).open("a") as more:
        more.write("latents:\nresources:\n")
    experiment = load(file, ["arms={base: , paper: {parts: decoder}}"])
    assert experiment.arms["base"].parts == "none"
    assert load(file, ["resources.train.num_cpus=3"]).resources.train.num_cpus == 3


def test_two_codecs_of_one_lmbda_are_refused(file: str) -> None:
    codecs = ", ".join(f"{{digest: {digit * 64}, lmbda: 0.1}}" for digit in "ab")
    with pytest.raises(ExperimentError, match=r"`codec` holds two codecs of one λ, found \[0\.1, 0\.1\]"):
        load(file, ["train=null", "latents.images=photos", f"codec=[{codecs}]"])


def test_a_control_is_trained_like_what_it_controls_for(file: str) -> None:
    control = "{parts: decoder, latents: noise, steps: 10"
    assert load(file, [f"arms.noise={control}}}"]).arms["noise"].is_control
    message = (
        r"arms: expected the control 'noise' to be trained like an arm on quantized latents, found "
        r"batch 4 against 8, clip 2\.0 against 1\.0 in the nearest, 'paper'; give both the same"
    )
    with pytest.raises(ExperimentError, match=message):
        load(file, [f"arms.noise={control}, batch: 4, clip: 2}}", "arms.far={parts: decoder, steps: 11}"])
    fits = ["arms.short={parts: decoder+scale, steps: 5}", "arms.noise.steps=5"]  # one arm that fits will do
    assert load(file, ["arms.noise={parts: decoder, latents: noise}", *fits]).arms["noise"].steps == 5


@pytest.mark.parametrize("key", ["steps", "batch", "crop", "learning_rate", "warmup", "clip", "precision"])
def test_controls_share_every_setting_of_training(file: str, key: str) -> None:
    values = {"crop": "96", "precision": "float32"}
    with pytest.raises(ExperimentError, match=f"found {key} "):
        load(
            file,
            [
                "arms.noise={parts: decoder, latents: rounded, steps: 10}",
                f"arms.noise.{key}={values.get(key, 3)}",
            ],
        )


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="expected an experiment file, found none that can be read"):
        load(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(ExperimentError, match=r"broken\.yaml: not a YAML document"):
        load(str(broken))
    broken.write_text("name: 2020-13-45")  # a date that there is not
    with pytest.raises(ExperimentError, match=r"broken\.yaml: not a YAML document"):
        load(str(broken))
    broken.write_bytes("name: größe".encode("latin-1"))
    with pytest.raises(
        ExperimentError, match=r"broken\.yaml: expected text in UTF-8, .*save the file as UTF-8"
    ):
        load(str(broken))


def test_the_file_knows_the_trellises_that_there_are() -> None:
    assert set(get_args(Trellis)) == set(TRELLISES)


def test_what_is_not_given_is_the_kinds(file: str) -> None:
    """As the pipeline understands it; and what the file accepts fits it."""
    for kind in KINDS:
        section = load(file, [f"quantizers.new={{kind: {kind}}}"]).quantizers["new"]
        given = section.model_dump(mode="json", exclude={"centroids", "effort", "tune"})
        assert quantizer_settings(given) == settings(kind)
    assert load(file, ["quantizers.urq.step=null"]).quantizers["urq"].step == 1.0
    few = {name for name, trellis in TRELLISES.items() if trellis.states <= 8}
    assert set(STATE_CONTEXTS) == few


def test_offsets_are_one_or_one_a_level(file: str) -> None:
    levels = [round(0.3 + i / 1000, 3) for i in range(SIGMA_LEVELS)]
    section = load(file, [f"quantizers.new={{kind: deadzone, offset: {levels}}}"]).quantizers["new"]
    given = section.model_dump(mode="json", exclude={"centroids", "effort", "tune"})
    assert quantizer_settings(given).offset == tuple(levels)
    with pytest.raises(ExperimentError, match=r"`tune` searches one `offset`; give one number to start from"):
        load(file, [f"quantizers.new={{kind: deadzone, tune: true, offset: {levels}}}"])


def test_a_weight_of_rate_for_each_rate(file: str) -> None:
    """What is refused; what it does otherwise stands in tests/test_plan.py."""
    rates = "train.lmbda=[0.01, 0.05]"
    for weights, message in (
        ("{0.01: 0.1}", r"`quantizers\.new\.lmbda_q`: expected a weight for each λ .* found none for 0\.05"),
        ("{0.01: 0.1, 0.05: 0.1, -3: 0.1}", r"quantizers\.new\.lmbda_q: .*greater than 0 \(found -3\)"),
        ("{0.01: 0.1, 0.05: -1}", r"quantizers\.new\.lmbda_q.*greater than or equal to 0"),
    ):
        with pytest.raises(ExperimentError, match=message):
            load(file, [rates, f"quantizers.new={{kind: tcq, lmbda_q: {weights}}}"])
    with pytest.raises(ExperimentError, match=r"kind 'urq' takes no `lmbda_q`"):
        load(file, [rates, "quantizers.new={kind: urq, lmbda_q: {0.01: 0.1, 0.05: 0.1}}"])


def test_tuning_wants_training_images(file: str, tmp_path: Path) -> None:
    mine = ["quantizers.urq.tune=true", "tune.images=mine"]
    assert load(file, mine[:1]).tuning_images == load(file).latent_images
    tuned = load(file, [*mine, f"latents.images={tmp_path}"])
    assert tuned.tuning_images is not None
    assert tuned.tuning_images.folders == [str(Path.cwd() / "mine")]
    foreign = ["train=null", f"codec={{digest: {'a' * 64}, lmbda: 0.1}}", "arms={base: {}}"]
    assert load(file, [*foreign, *mine]).tuning_images == tuned.tuning_images
    with pytest.raises(
        ExperimentError, match=r"`tune\.images` is needed where there are no images of `train`"
    ):
        load(file, [*foreign, mine[0]])


def test_the_file_accepts_what_the_pipeline_accepts(file: str) -> None:
    assert CHANNELS_MAX == artifact.CHANNELS_MAX
    low, high = STEP_RANGE
    limits = [f"train.N={CHANNELS_MAX}", f"quantizers.urq.step={low}", f"quantizers.tcq8.step={high}"]
    assert load(file, limits).quantizers["tcq8"].step == high


@pytest.mark.parametrize("path", sorted(Path("experiments").glob("*.yaml")), ids=str)
def test_shipped_experiments_load(path: Path) -> None:
    assert isinstance(load(str(path)), Experiment)


def test_a_round_of_a_control_needs_one_of_the_arm(file: str) -> None:
    first = "arms.noise={parts: decoder, latents: noise, steps: 10}"
    with pytest.raises(
        ExperimentError, match=r"'noise2' .* found what it goes on from in the nearest, 'paper'"
    ):
        load(file, [first, "arms.noise2={after: noise, parts: decoder, latents: noise, steps: 10}"])


def test_what_retune_tunes_must_be_tunable(file: str) -> None:
    with pytest.raises(ExperimentError, match=r"`retune` itself decides on centroids; leave `centroids` out"):
        load(file, ["arms.new={after: paper, retune: true}", "quantizers.urq.centroids=true"])


def test_paths_of_a_start_are_relative_to_where_they_are_given(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    train = load(file, ["train.start=c.safetensors", "train.held_out=photos", "train.held_out.limit=2"]).train
    assert train is not None
    assert train.start is not None
    assert train.start.file == "/c.safetensors"
    assert train.held_out is not None
    assert (train.held_out.folders, train.held_out.limit) == (["/photos"], 2)


def test_curves_from_elsewhere_are_points_of_rate_and_quality(file: str) -> None:
    report = load(file, ["report.references={published (2018): [[0.1, 28], [0.2, 29.5]]}"]).report
    assert report.references == {"published (2018)": [[0.1, 28.0], [0.2, 29.5]]}
    with pytest.raises(ExperimentError, match=r"expected \[bpp, PSNR in dB\], with a rate above 0"):
        load(file, ["report.references={published: [[0, 28]]}"])


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_that_comes_along_can_be_read(path: Path) -> None:
    assert load(str(path)).arms
