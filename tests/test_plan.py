"""Expansion, keys and reasons, without computing anything: results are records made up here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.experiment import Experiment, ExperimentError, load
from jobs.graph import expand
from jobs.ingest import EmptyFolder
from jobs.plan import explain, resolve, select
from jobs.quantize import set_key
from jobs.stage import Input, Node

FILE = """
name: small
train: {{images: {photos}, lmbda: [0.0067, 0.013]}}
quantizers: {{urq: {{kind: urq}}, tcq8: {{kind: tcq, trellis: vvc8, step: 0.7, lmbda_q: 0.1}}}}
arms: {{base: {{}}, noise: {{parts: decoder, latents: noise}}, paper: {{parts: decoder}}}}
seeds: [0, 1]
evaluate: {{images: {photos}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photos / name)
    path = tmp_path / "small.yaml"
    path.write_text(FILE.format(photos=photos))
    return str(path)


def made(node: Node) -> dict[str, Any]:
    """A record as if the node had been computed; digests are the node's name."""
    kinds = {
        "ingest": "images",
        "train": "codec",
        "tune": "tables",
        "finetune": "codec",
        "quantize": "latents",
        "evaluate": "scores",
    }
    kind = kinds.get(node.stage, node.stage)
    note = {"grid": f"grid of {node.id}", "rate": f"rate of {node.id}"}
    return {"outputs": {kind: {"kind": kind, "digest": node.id, "note": note}}, "summary": {}}


def keys(experiment: Experiment) -> dict[str, str | None]:
    """Every node's key when all that it reads is there."""
    nodes = expand(experiment)
    produced = {node.id: made(node) for node in nodes}
    keyed = {}
    for node in nodes:
        others = {name: record for name, record in produced.items() if name != node.id}
        keyed |= {step.node.id: step.key for step in resolve([node], {}, others)}
    return keyed


def test_expansion_is_rates_by_quantizers_by_arms_by_seeds(file: str) -> None:
    count: dict[str, int] = {}
    for node in expand(load(file)):
        count[node.stage] = count.get(node.stage, 0) + 1
    # two λ, two quantizers, two arms, two seeds; the base has no seed; equal image lists share one ingest
    expected = {
        "ingest": 1,
        "train": 2,
        "tables": 2,
        "quantize": 4,
        "finetune": 16,
        "evaluate": 20,
        "report": 1,
    }
    assert count == expected


def test_only_what_a_stage_reads_decides_its_key(file: str) -> None:
    before = keys(load(file))

    def changed(*overrides: str) -> set[str]:
        after = keys(load(file, list(overrides)))
        return {name.split()[0] for name in before if before[name] != after.get(name)}

    assert changed("resources.quantize.num_cpus=2", "resources.train.log_every=5") == set()
    assert changed("train.steps=77") == {"train"}  # and what follows, once the codec is another one
    # the report compares arms of one recipe
    assert changed("arms.paper.steps=77", "arms.noise.steps=77") == {"finetune", "report"}
    assert changed("quantizers.tcq8.step=0.8") == {"tables"}
    assert changed("quantizers.tcq8.context=state") == {"tables"}
    assert changed("tune.count=8") == set()  # nothing is tuned
    assert changed("evaluate.metrics=[psnr]") == {"evaluate"}


def test_a_tuned_quantizer_has_tables_for_each_codec(file: str, tmp_path: Path) -> None:
    tuned = ["quantizers.tcq8.tune=true"]
    nodes = {node.id: node for node in expand(load(file, tuned))}
    assert {name for name in nodes if name.startswith(("tables", "tune"))} == {
        "tables quantizer=urq",
        "tune lmbda=0.0067 quantizer=tcq8",
        "tune lmbda=0.013 quantizer=tcq8",
    }
    for stage in ("quantize", "evaluate"):
        arm = " arm=base" if stage == "evaluate" else ""
        reads = nodes[f"{stage} lmbda=0.013 quantizer=tcq8{arm}"].inputs["tables"]
        assert (reads.node, reads.output) == ("tune lmbda=0.013 quantizer=tcq8", "tables")
    before = keys(load(file, tuned))

    def changed(*overrides: str) -> set[str]:
        after = keys(load(file, [*tuned, *overrides]))
        return {name.split()[0] for name in before if before[name] != after.get(name)}

    assert changed("tune.count=8") == changed("tune.refine=false") == {"tune"}
    assert changed("quantizers.tcq8.step=0.8") == {"tune"}  # where its search begins
    assert changed("quantizers.tcq8.tune=step") == {"tune"}  # which searches less
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(more / "c.png")
    assert not changed(f"latents.images={more}") & {"train", "tune"}  # more latents: no codec, no tuning anew
    assert "tune lmbda=0.013 quantizer=tcq8" in {
        node.id for node in select(list(nodes.values()), "tune", {"lmbda": "0.013"})
    }


def test_a_latent_set_does_not_know_the_decoder_or_the_list_of_images() -> None:
    codec = {"digest": "c", "note": {"grid": "g", "rate": "r"}}
    inputs = {"codec": codec, "tables": {"digest": "t"}, "images": {"digest": "i"}}
    key = set_key(inputs, {})
    assert set_key(inputs | {"codec": codec | {"digest": "other"}, "images": {"digest": "more"}}, {}) == key
    assert set_key(inputs | {"tables": {"digest": "other"}}, {}) != key
    for part in ("grid", "rate"):
        other = codec | {"note": codec["note"] | {part: "other"}}
        assert set_key(inputs | {"codec": other}, {}) != key


def test_effort_enters_latents_and_scores_alone(file: str) -> None:
    before, after = keys(load(file)), keys(load(file, ["quantizers.tcq8.effort=3"]))
    changed = {name for name in before if before[name] != after[name]}
    assert {name.split()[0] for name in changed} == {"quantize", "evaluate"}
    assert all("quantizer=tcq8" in name for name in changed)
    nodes = {node.id: node for node in expand(load(file, ["quantizers.tcq8.effort=3"]))}
    latents = nodes["quantize lmbda=0.013 quantizer=tcq8"]
    assert latents.settings == {"effort": 3, "effort_version": 3, "lmbda": 0.013}
    assert latents.inputs["codec"].keyed  # the decoder decides, too
    assert not nodes["quantize lmbda=0.013 quantizer=urq"].inputs["codec"].keyed


@pytest.mark.parametrize("tune", ["false", "step"])
def test_a_weight_of_rate_for_each_rate_is_that_weight_at_its_rate(file: str, tune: str) -> None:
    """So results of one weight are found again by a file that has others at other rates."""
    written = ("0.3", "0.1", "{0.01: 0.1, 0.05: 0.3}")
    large, small, each = (
        keys(
            load(
                file,
                [
                    "train.lmbda=[0.01, 0.05]",
                    f"quantizers={{new: {{kind: tcq, lmbda_q: {weight}, tune: {tune}}}}}",
                ],
            )
        )
        for weight in written
    )
    stage = "tables" if tune == "false" else "tune"
    tables = {name: key for name, key in each.items() if name.startswith(stage)}
    assert list(tables) == [f"{stage} lmbda={lmbda} quantizer=new" for lmbda in (0.01, 0.05)]
    for (name, key), same in zip(tables.items(), (small, large), strict=True):
        assert key == same[name if tune == "step" else "tables quantizer=new"]


def test_latents_made_with_effort_are_a_set_of_their_own() -> None:
    codec = {"digest": "c", "note": {"grid": "g", "rate": "r"}}
    inputs = {"codec": codec, "tables": {"digest": "t"}}
    effort = {"effort": 3, "lmbda": 0.013}
    assert set_key(inputs, effort) != set_key(inputs, {})
    assert set_key(inputs, effort) != set_key(inputs, effort | {"lmbda": 0.02})
    assert set_key(inputs, effort) != set_key(inputs | {"codec": codec | {"digest": "other"}}, effort)


def test_waiting_steps_say_what_they_wait_for(file: str) -> None:
    steps = {step.node.id: step for step in resolve(expand(load(file)), {})}
    assert steps["train lmbda=0.0067"].key is None
    assert "ingest images=train, computed first" in steps["train lmbda=0.0067"].why
    assert steps["tables quantizer=urq"].why == "first of its stage here"


def test_the_ingredient_that_differs_is_named() -> None:
    def ingredients(steps: int, images: str) -> dict[str, Any]:
        return {"stage": "train", "settings": {"steps": steps}, "inputs": {"images": images}}

    records = [{"ingredients": ingredients(60, "a" * 64)}, {"ingredients": ingredients(70, "b" * 64)}]
    why = explain(ingredients(80, "a" * 64), records)
    assert why == "differs from the nearest record in settings.steps (60 → 80)"
    assert "inputs.images (bbbbbbbb → cccccccc)" in explain(ingredients(70, "c" * 64), records)
    inputs = {f"score {number}": "d" * 64 for number in range(300)}
    many = explain({"stage": "report", "inputs": inputs}, [{"ingredients": {"stage": "report"}}])
    assert many.endswith("inputs.score 100 (absent → dddddddd), 296 more")


def test_select_takes_a_stage_and_what_it_reads(file: str) -> None:
    nodes = expand(load(file))
    chosen = select(nodes, "quantize", {"lmbda": "0.013", "quantizer": "tcq8"})
    assert [node.id for node in chosen] == [
        "ingest images=train",
        "train lmbda=0.0067",
        "train lmbda=0.013",
        "tables quantizer=tcq8",
        "quantize lmbda=0.013 quantizer=tcq8",
    ]
    with pytest.raises(ValueError, match=r"--only quantizer=tcq9: expected quantizer to be one of tcq8, urq"):
        select(nodes, "quantize", {"quantizer": "tcq9"})
    with pytest.raises(ValueError, match=r"--only colour=red: expected one of the axes"):
        select(nodes, None, {"colour": "red"})


def test_folders_without_images_are_refused(file: str, tmp_path: Path) -> None:
    for folder in ("missing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(EmptyFolder, match=rf"{folder}: expected a folder with images .*found none"):
            expand(load(file, [f"train.images={tmp_path / folder}"]))


def test_run_takes_what_the_report_reads_and_only_takes_evaluations(file: str) -> None:
    base = load(file, ["arms={base: {}}"])
    assert not [node for node in select(expand(base)) if node.stage == "quantize"]
    assert len([node for node in select(expand(base), "quantize") if node.stage == "quantize"]) == 4
    chosen = select(
        expand(load(file)), None, {"lmbda": "0.013", "quantizer": "urq", "arm": "paper", "seed": "1"}
    )
    assert [node.id for node in chosen if node.stage == "evaluate"] == [
        "evaluate lmbda=0.013 quantizer=urq arm=paper seed=1"
    ]
    assert not [node for node in chosen if node.stage == "report"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("ingest images=train", {"train", "quantize", "evaluate", "report"}),
        ("train lmbda=0.013", {"quantize", "finetune", "evaluate"}),
        ("tables quantizer=tcq8", {"quantize", "finetune", "evaluate"}),
        ("quantize lmbda=0.013 quantizer=tcq8", {"finetune"}),
        ("finetune lmbda=0.013 quantizer=tcq8 arm=paper seed=1", {"evaluate"}),
        ("evaluate lmbda=0.013 quantizer=tcq8 arm=base", {"report"}),
    ],
)
def test_a_key_holds_the_digest_of_all_that_is_read(file: str, changed: str, expected: set[str]) -> None:
    nodes = expand(load(file))

    def keyed(suffix: str) -> dict[str, str | None]:
        produced = {node.id: made(node) for node in nodes}
        for output in produced[changed]["outputs"].values():
            output["digest"] += suffix
            output["note"] = {name: value + suffix for name, value in output["note"].items()}
        return {
            node.id: resolve([node], {}, {k: v for k, v in produced.items() if k != node.id})[0].key
            for node in nodes
        }

    before, after = keyed(""), keyed(" changed")
    assert {name.split()[0] for name in before if before[name] != after[name]} == expected


def test_equal_work_is_found_under_another_name(file: str) -> None:
    nodes = [n for n in expand(load(file, ["arms.same={parts: decoder}"])) if "quantizer=urq" in n.id]
    everything = {node.id: made(node) for node in expand(load(file))}
    paper = next(n for n in nodes if n.stage == "finetune" and n.axes["arm"] == "paper")
    same = next(n for n in nodes if n.stage == "finetune" and n.axes == dict(paper.axes) | {"arm": "same"})
    known = {name: record for name, record in everything.items() if name != paper.id}
    (step,) = resolve([paper], {}, known)
    record = made(paper) | {"stage": "finetune", "key": step.key}
    assert resolve([same], {}, known | {paper.id: record})[0].record is record


def trained(file: str, *overrides: str) -> dict[float, Node]:
    nodes = expand(load(file, list(overrides)))
    return {node.axes["lmbda"]: node for node in nodes if node.stage == "train"}


def test_each_rate_starts_from_its_nearest_neighbour_before_it(file: str) -> None:
    ladder = trained(file, "train.lmbda=[0.013, 0.0067, 0.0483, 0.03]", "train.steps=1000")
    starts = {lmbda: node.inputs["start"].node for lmbda, node in ladder.items() if "start" in node.inputs}
    assert starts == {
        0.0067: "train lmbda=0.013",
        0.0483: "train lmbda=0.013",
        0.03: "train lmbda=0.0483",
    }
    assert {lmbda: node.settings.get("start_lmbda") for lmbda, node in ladder.items()} == {
        0.013: None, 0.0067: 0.013, 0.0483: 0.013, 0.03: 0.0483
    }  # fmt: skip
    assert {lmbda: node.settings["steps"] for lmbda, node in ladder.items()} == {
        0.013: 1000, 0.0067: 334, 0.0483: 334, 0.03: 334
    }  # fmt: skip


def test_a_rate_added_at_the_end_leaves_the_others_as_they_are(file: str) -> None:
    before = trained(file, "train.lmbda=[0.013, 0.0067]")
    after = trained(file, "train.lmbda=[0.013, 0.0067, 0.0018]")
    assert all(after[lmbda] == node for lmbda, node in before.items())


def test_without_a_ladder_every_rate_is_trained_from_scratch(file: str) -> None:
    alone = trained(file, "train.lmbda=[0.0067]")
    both = trained(file, "train.lmbda=[0.013, 0.0067]", "train.ladder=false")
    assert all("start" not in node.inputs for node in both.values())
    assert both[0.0067] == alone[0.0067]  # and the settings of the ladder enter no key


def test_a_training_goes_on_from_a_file(file: str, tmp_path: Path) -> None:
    (tmp_path / "start.safetensors").write_bytes(b"a codec")
    path = tmp_path / "small.yaml"
    path.write_text(path.read_text().replace("train: {", "train: {start: start.safetensors, "))
    nodes = {node.id: node for node in expand(load(file))}
    assert nodes["import lmbda=0.0067"].parameters["file"] == str(tmp_path / "start.safetensors")
    assert nodes["train lmbda=0.0067"].inputs["start"].node == "import lmbda=0.0067"
    assert nodes["train lmbda=0.013"].inputs["start"].node == "train lmbda=0.0067"
    assert "evaluate lmbda=0.0067 quantizer=urq arm=base" in nodes
    assert nodes["evaluate lmbda=0.0067 quantizer=urq arm=base"].inputs["codec"].node == "train lmbda=0.0067"


def test_held_out_images_are_measured_and_decide_nothing(file: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(other / "c.png")
    with_held_out = load(file, [f"train.held_out={other}"])
    reads = {node.id: node for node in expand(with_held_out)}["train lmbda=0.013"].inputs
    assert reads["held_out"].node == "ingest images=held_out"
    assert keys(with_held_out)["train lmbda=0.013"] == keys(load(file))["train lmbda=0.013"]


def test_both_file_and_digest_are_refused(file: str) -> None:
    with pytest.raises(
        ExperimentError, match=r"train\.start: .*expected exactly one of `file`, `digest` and `quality`"
    ):
        load(file, ["train.start={}"])


def test_an_arm_after_another_quantizes_with_its_codec(file: str) -> None:
    arms = (
        "arms={base: {}, paper: {parts: decoder+scale}, tables: {after: paper, retune: true}, "
        "more: {parts: decoder, after: paper}}"
    )
    nodes = {node.id: node for node in expand(load(file, [arms]))}
    axes = "lmbda=0.013 quantizer=tcq8 arm="
    paper = f"finetune {axes}paper seed=1"
    tuned = nodes[f"tune {axes}tables seed=1"]
    assert tuned.inputs["codec"].node == paper
    scores = nodes[f"evaluate {axes}tables seed=1"].inputs
    assert (scores["codec"].node, scores["tables"].node) == (paper, tuned.id)
    assert f"quantize {axes}tables seed=1" not in nodes  # nothing is trained on them
    latents = nodes[f"quantize {axes}more seed=1"].inputs
    assert (latents["codec"].node, latents["tables"].node) == (paper, "tables quantizer=tcq8")
    trained = nodes[f"finetune {axes}more seed=1"].inputs
    assert (trained["codec"].node, trained["latents"].node) == (paper, f"quantize {axes}more seed=1")
    assert nodes[f"evaluate {axes}more seed=1"].inputs["codec"].node == f"finetune {axes}more seed=1"


def test_an_arm_with_effort_trains_on_latents_made_with_it(file: str) -> None:
    arms = (
        "arms={base: {}, base+effort: {effort: 3}, paper: {parts: decoder}, paper+effort: {after: paper, effort: 3}, "
        "both: {parts: decoder, effort: 3}, again: {after: both, parts: decoder, effort: 3}, "
        "less: {after: both, parts: decoder}, noise: {parts: decoder, latents: noise, effort: 3}}"
    )
    experiment = load(file, [arms])
    nodes = {node.id: node for node in expand(experiment)}
    axes = "lmbda=0.013 quantizer=tcq8 arm="
    effort = {"effort": 3, "effort_version": 3, "lmbda": 0.013}
    plain, searched = (nodes[f"evaluate {axes}{arm}"] for arm in ("base", "base+effort"))
    assert (plain.inputs, plain.settings | effort) == (searched.inputs, searched.settings)
    after, both = (nodes[f"evaluate {axes}{arm} seed=1"] for arm in ("paper+effort", "both"))
    assert after.inputs["codec"].node == f"finetune {axes}paper seed=1"
    assert after.settings == both.settings == searched.settings
    one, other = (nodes[f"finetune {axes}{arm} seed=1"] for arm in ("paper", "both"))
    assert one.settings == other.settings
    assert f"quantize {axes}paper+effort seed=1" not in nodes  # it trains nothing
    made = {arm: nodes[f"quantize {axes}{arm} seed=1"] for arm in ("again", "less")}
    shared = nodes[
        "quantize lmbda=0.013 quantizer=tcq8 effort=3"
    ]  # by all seeds and arms that start from the base
    assert other.inputs == one.inputs | {"latents": Input(shared.id, "latents")}
    control = nodes[f"finetune {axes}noise seed=0"]
    assert control.inputs == other.inputs
    assert [latents.settings for latents in (shared, *made.values())] == [effort, effort, {}]
    base = nodes["quantize lmbda=0.013 quantizer=tcq8"].inputs["codec"]
    assert shared.inputs["codec"] == replace(base, keyed=True)  # now the decoder decides, too
    assert made["again"].inputs["codec"].node == other.id
    said = list(nodes.values())[-1].settings["arms"]
    parts = ["none", "effort", "decoder", "effort", *["decoder"] * 4]
    assert [arm["parts"] for arm in said.values()] == parts
    assert said["both"]["recipe"] != said["paper"]["recipe"]
    with pytest.raises(ExperimentError, match=r"found effort 3 against 0 in the nearest, 'paper'"):
        load(
            file, ["arms={base: {}, paper: {parts: decoder}, n: {parts: decoder, latents: noise, effort: 3}}"]
        )


def test_the_report_compares_rounds_of_one_recipe(file: str) -> None:
    arms = (
        "arms={base: {}, paper: {parts: decoder}, noise: {parts: decoder, latents: noise}, "
        "noise2: {parts: decoder, latents: noise, after: noise}, paper2: {parts: decoder, after: paper}, "
        "tables: {after: noise2, retune: true}}"
    )
    said = expand(load(file, [arms]))[-1].settings["arms"]
    recipes = {name: arm.pop("recipe") for name, arm in said.items()}
    assert recipes["paper"] == recipes["noise"] != recipes["paper2"] == recipes["noise2"]
    assert said["tables"] == {"parts": "tables", "latents": "noise"}
    assert recipes["tables"] not in (recipes["paper2"], recipes["noise2"])  # it trains nothing more
