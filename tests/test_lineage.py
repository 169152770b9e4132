"""Records projected into a real MLflow on sqlite: what it shows."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lineage_records import (
    TUNED,
    History,
    Shown,
    arms,
    find,
    ingest,
    kodak,
    name_of,
    of,
    project,
    small,
    workspace,
)

from storage.lineage import LineageError, SyncReport, default_tracking_uri, pages
from storage.lineage.graph import Graph


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return workspace(tmp_path)


def test_an_experiment_becomes_a_parent_run_with_its_stages(root: Path) -> None:
    history, instances = kodak()
    report = project(history, root)
    shown = Shown(default_tracking_uri(str(root)))
    assert report == SyncReport(created=13 + 5, updated=0, unchanged=0, waiting=0, page=report.page)
    parent = next(r for i, r in shown.runs.items() if i.startswith("experiments/"))
    assert parent.info.run_id in report.page
    assert len(shown.runs) == len(instances) + 1
    children = [r for r in shown.runs.values() if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(instances)
    assert {r.info.status for r in shown.runs.values()} == {"FINISHED"}

    run = shown.runs[find(instances, "train lmbda")]
    assert run.data.params["optimizer.name"] == "adam"
    assert run.data.params["input.images"] == of(instances[0], "images")[:12]
    assert run.data.tags["output.codec"] == of(instances[3], "codec")
    assert run.data.metrics == {"loss": 0.2, "lr": 1e-4, "summary/loss": 0.41, "psnr_db": 31.2}
    curve = shown.client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in curve] == [(10 * i, 1 / (i + 1)) for i in range(5)]
    assert run.info.start_time < curve[0].timestamp < curve[4].timestamp == run.info.end_time
    assert datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat() == instances[3]["started"]


def test_codecs_and_latents_are_models_and_images_are_datasets(root: Path) -> None:
    history, instances = kodak(names=("paper",))
    project(history, root)
    shown = Shown(default_tracking_uri(str(root)))
    images, codec, latents = instances[0], find(instances, "train"), find(instances, "quantize")
    tuned = find(instances, "finetune")

    (made,) = shown.runs[name_of(images)].inputs.dataset_inputs
    (read,) = shown.runs[codec].inputs.dataset_inputs
    assert made.dataset.digest == read.dataset.digest == of(images, "images")[:36]
    contexts = [{t.key: t.value for t in d.tags} for d in (made, read)]
    assert [c["mlflow.data.context"] for c in contexts] == ["output", "train"]
    assert contexts[0]["retrellis.digest"] == of(images, "images")

    ids = {m.model_id: i for i, m in shown.models.items()}
    assert {ids[m.model_id] for m in shown.runs[tuned].inputs.model_inputs} == {
        f"{codec}/codec",
        f"{latents}/latents",
    }
    assert [ids[m.model_id] for m in shown.runs[tuned].outputs.model_outputs] == [f"{tuned}/codec"]
    assert shown.models[f"{latents}/latents"].tags["mlflow.model.isExternal"] == "true"
    assert {m.status.name for m in shown.models.values()} == {"READY"}


def test_files_lie_in_the_workspace_under_addresses_that_move_with_it(root: Path) -> None:
    history, instances = kodak(names=("paper",))
    project(history, root)
    shown = Shown(default_tracking_uri(str(root)))

    def folder(uri: str) -> Path:
        assert uri.startswith("mlflow-artifacts:/")
        return root / "mlflow-artifacts" / uri.removeprefix("mlflow-artifacts:/")

    report = folder(shown.runs[find(instances, "report")].info.artifact_uri)
    assert (report / "plots/rd.svg").read_bytes() == b"<svg/>"
    assert json.loads((report / "record.json").read_text()) == instances[-1]
    codec = folder(shown.models[f"{find(instances, 'train')}/codec"].artifact_location)
    assert (codec / "codec.safetensors").read_bytes() == b"train lmbda=0.013"


def test_links_lead_from_a_finetuned_codec_to_the_images_and_back(root: Path) -> None:
    history, instances = kodak()
    project(history, root)
    shown = Shown(default_tracking_uri(str(root)))
    path = [find(instances, text) for text in (TUNED, "quantize", "train", "ingest")]
    there = [path[0]]
    for text in ("quantize lmbda", "train lmbda", "ingest"):
        there.append(shown.follow(there[-1], text))
    assert there == path
    back = [path[-1]]
    for text in ("train lmbda", "quantize lmbda", TUNED):
        back.append(shown.follow(back[-1], text))
    assert back == path[::-1]
    model = shown.follow(path[0], "codec ")
    assert model == f"{path[0]}/codec"
    assert shown.follow(model, "evaluate") == find(instances, "evaluate lmbda=0.013 quantizer=tcq8 arm=paper")
    assert shown.note(find(instances, "report")).count("evaluate lmbda=0.013") == 3
    assert "grid, rate from [train" in shown.note(path[1])  # one codec, read by two digests


def test_a_second_sync_finds_nothing_to_do_and_a_new_consumer_touches_only_what_it_read(root: Path) -> None:
    history, instances = kodak()
    project(history, root)
    before = Shown(default_tracking_uri(str(root))).snapshot()
    assert project(history, root) == SyncReport(0, 0, 18, 0, project(history, root).page)
    assert Shown(default_tracking_uri(str(root))).snapshot() == before

    new = arms(history, instances[3], instances[2], instances[0], instances[1], ["second"])
    history.experiment("more arms", [*instances[:4], *new], reused=5)
    report = project(history, root)
    # a parent, 2 runs, 5 that lead to reused ones, 1 model; what they read: 4 of 5 runs (quantize made nothing
    # new), 1 test set, and the models of codec and latents
    assert (report.created, report.updated) == (9, 7)
    shown = Shown(default_tracking_uri(str(root)))
    pointer = next(i for i in shown.runs if "#train" in i)
    assert shown.runs[pointer].info.run_name == "train lmbda=0.013 (reused)"
    assert shown.follow(pointer, "train") == find(instances, "train lmbda")
    table = shown.note(next(i for i, r in shown.runs.items() if r.info.run_name == "more arms"))
    assert table.count("| reused") == 5
    assert table.count("| computed") == 2
    assert "arm=second" in shown.note(find(instances, "quantize"))
    assert project(history, root).created == 0


def test_results_that_no_experiment_names_wait_and_are_owned_by_the_first_that_does(root: Path) -> None:
    history = History()
    images = ingest(history, "train")
    assert project(history, root).waiting == 1
    history.experiment(
        "again", [images], reused=1
    )  # the run that computed it was killed before it could say so
    assert project(history, root).waiting == 0
    shown = Shown(default_tracking_uri(str(root)))
    assert len(shown.runs) == 2
    assert shown.runs[name_of(images)].data.tags["mlflow.parentRunId"]


def test_long_curves_and_many_settings_keep_to_the_limits_of_a_call(root: Path) -> None:
    history = History()
    images = ingest(history, "train")
    settings = {f"setting {i}": i for i in range(130)}
    metrics = history.curve("long", 1100)
    long = history.result(
        "train lmbda=1", settings, {"images": of(images, "images")}, {"metrics": metrics}, {}
    )
    history.experiment("long", [images, long])
    project(history, root)
    run = Shown(default_tracking_uri(str(root))).runs[name_of(long)]
    assert len(run.data.params) == 132
    shown = Shown(default_tracking_uri(str(root)))
    assert len(shown.client.get_metric_history(run.info.run_id, "loss")) == 1100


def test_records_of_another_shape_are_named(root: Path) -> None:
    history = small()
    name = next(n for n in history.records if n.startswith("results/train"))
    for change, message in [
        ({"version": 2}, "expected version 1, found 2"),
        ({"started": "yesterday"}, "ValueError: Invalid isoformat string: 'yesterday'"),
        ({"ingredients": {}}, "KeyError: 'stage_version'"),
    ]:
        with pytest.raises(LineageError, match=re.escape(message)) as caught:
            Graph({name: {**history.records[name], **change}})
        assert str(caught.value).startswith(f"record {name}: ")


def test_pages_stay_below_the_limit_and_count_what_they_leave_out() -> None:
    history = History()
    instances = [ingest(history, f"set_{i}") for i in range(300)]
    history.experiment("many", instances)
    graph = Graph(history.records)
    places = pages.Places({r: ("1", hashlib.md5(r.encode()).hexdigest()) for r in graph.results})
    text = pages.experiment_page(graph, places, graph.experiments[0], set())
    assert len(text) <= pages.LIMIT
    rows = text.count("](#/experiments/1/runs/")
    assert text.endswith(f"… and {300 - rows} more lines, left out here for want of room.")
    assert "ingest images=set\\_299" in text  # from the last back; what Markdown would read is escaped


@given(st.lists(st.text(max_size=400), max_size=80))
def test_fitted_text_is_whole_lines(lines: list[str]) -> None:
    text = pages.fitted(lines)
    assert len(text) <= pages.LIMIT
    assert "\n".join(lines).rstrip("\n") == text or "more lines" in text


def test_importing_lineage_does_not_import_mlflow() -> None:
    code = "import sys, storage.lineage; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
