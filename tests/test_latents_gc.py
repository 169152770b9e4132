"""`retrellis latents gc` and `export`, and the dataset: nothing is deleted that is needed, what goes out is whole."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from latent_sets import (
    KEY,
    OTHER,
    Told,
    file_of,
    leave_group,
    make_older,
    tree,
)
from test_latents import latents

import storage.latents
from storage.errors import StorageFull
from storage.export import export_set
from storage.keys import canonical_json
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage, content_digest
from storage.records import RecordError
from storage.workspace import Workspace


def test_gc_touches_nothing_that_is_referenced(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    make_older(workspace, "", 1000)
    before = tree(workspace.root)
    code, words = told("gc", "--delete", "--grace-days", "0", "--older-than", "0")
    assert code == 0
    assert re.search(rf"^keep set {KEY[:8]}: .* old; used by quantize .*tcq8, finetune .*arm=paper", words)
    assert words.endswith("deleted 0 item(s), 0 bytes\n")
    assert tree(workspace.root) == before


def test_gc_deletes_the_table_of_a_killed_writer_and_no_other(
    workspace: Workspace, stored: LatentSet, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.latents, "COMPACT_FROM", 2)
    stored.compact()
    (table,) = stored.table_groups()
    workspace.put(f"latents/{KEY}/table-of-nobody/images", b"torn")
    assert "\ndeleted 1 item(s), " in told("gc", "--delete", "--grace-days", "0")[1]
    there = workspace.folders(f"latents/{KEY}")
    assert "table-of-nobody" not in there
    assert table.rpartition("/")[2] in there


def test_gc_deletes_withdrawn_data_and_leftovers_after_the_grace_period(
    workspace: Workspace, stored: LatentSet, images: list[PartImage], told: Told
) -> None:
    part, kept = stored.parts()
    record = stored.record(part)
    stored.retire(part, "a bad disk")
    old, young = leave_group(workspace, record, days=8), workspace.path(f"latents/{KEY}/young")
    Path(young).mkdir()
    before = tree(workspace.root)
    code, words = told("gc")
    assert code == 0
    assert re.search(
        rf"^would delete leftover {KEY[:8]} {old.name}: 1.1 kB, 8.0 days old; no record", words, re.M
    )
    assert re.search(
        rf"^keep retired part {KEY[:8]} {part}: .*retired: a bad disk; expected an age of 7 days, found 0.0$",
        words,
        re.MULTILINE,
    )
    assert re.search(rf"^keep leftover {KEY[:8]} young: ", words, re.MULTILINE)
    assert "would delete 1 item(s), 1.1 kB; --delete does it\n" in words
    assert tree(workspace.root) == before

    assert "\ndeleted 1 item(s), 1.1 kB\n" in told("gc", "--delete")[1]
    assert not old.exists()
    assert Path(young).exists()
    assert file_of(workspace, record).exists()
    assert "\ndeleted 2 item(s), " in told("gc", "--delete", "--grace-days", "0")[1]
    assert workspace.folders(f"latents/{KEY}") == (stored.record(kept)["group"].rpartition("/")[2],)
    assert told("gc", "--delete", "--grace-days", "0")[1].endswith("deleted 0 item(s), 0 bytes\n")
    now = LatentSet(workspace, KEY)
    assert (now.part_names(), list(now.retired())) == ([kept], [part])
    assert now.write_part("0", images[:3])["part"] != part  # a name is used once


def test_gc_deletes_sets_that_no_result_refers_to(
    workspace: Workspace, stored: LatentSet, told: Told
) -> None:
    lost = LatentSet(workspace, OTHER)
    part = lost.write_part("0", [latents(9)])["part"]
    lost.retire(part, "a test")
    lost.write_part("1", [latents(8)])
    assert f"keep set {OTHER[:8]}: " in told("gc", "--delete")[1]  # young
    for prefix in (f"latents/{OTHER}", f"records/latents/{OTHER}"):
        make_older(workspace, prefix, 30)
    words = told("gc", "--delete", "--older-than", "31")[1]
    assert "no result refers to it; expected an age of 31 days, found 30.0" in words
    others = {name: data for name, data in tree(workspace.root).items() if OTHER not in name}
    assert f"would delete set {OTHER[:8]}: " in told("gc", "--older-than", "29")[1]
    assert f"deleted set {OTHER[:8]}: " in told("gc", "--delete", "--older-than", "1")[1]
    assert tree(workspace.root) == others
    assert told("verify")[0] == 0


def test_gc_waits_for_what_runs(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    LatentSet(workspace, OTHER).write_part("0", [latents(9)])
    record = next(iter(stored.parts().values()))
    make_older(workspace, "", 30)
    young, old = leave_group(workspace, record, days=0.5), workspace.path(f"latents/{KEY}/old")
    Path(old).mkdir()
    make_older(workspace, f"latents/{KEY}/old", 2)
    about = {"attempt": "b", "instance": "quantize quantizer=urq", "experiment": "small", "started": "2026"}
    workspace.records.create("attempts/quantize/1/b", {**about, "stage": "quantize", "key": "1"})
    beat = {"time": time.time() + 60, "done": 0, "total": 1, "text": ""}
    workspace.put("attempts/quantize/1/b/progress.json", canonical_json(beat))
    words = told("gc", "--delete", "--grace-days", "0")[1]
    assert "no result refers to it; quantize quantizer=urq runs and may need it" in words
    assert "expected an age of 1 days, found 0.5" in words
    assert young.exists()
    assert not Path(old).exists()
    assert workspace.list(f"latents/{OTHER}")


def test_gc_stops_where_a_result_cannot_be_read(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    LatentSet(workspace, OTHER).write_part("0", [latents(9)])
    workspace.put("records/results/quantize/torn.json", b"{")
    before = tree(workspace.root)
    code, words = told("gc", "--delete", "--grace-days", "0")
    assert code == 1
    assert words.startswith("retrellis: record 'results/quantize/torn' cannot be read")
    assert tree(workspace.root) == before
    with pytest.raises(RecordError):
        workspace.records.load("results")


# export, and the dataset


def test_export_and_back(stored: LatentSet, images: list[PartImage], told: Told, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    assert told("export", KEY[:4], str(folder)) == (0, f"wrote 5 image(s) of set {KEY[:8]} to {folder}\n")
    index = json.loads((folder / "index.json").read_bytes())
    assert (index["set"], [row["digest"] for row in index["images"]]) == (
        KEY,
        sorted(i.digest for i in images),
    )
    by_name = {image.digest: image for image in images}
    for row in index["images"]:
        image = by_name[row["digest"]]
        with np.load(folder / row["file"], allow_pickle=False) as arrays:
            np.testing.assert_array_equal(arrays["indices"], image.indices)
            np.testing.assert_array_equal(arrays["hyper_indices"], image.hyper_indices)
            assert tuple(arrays["shape"]) == (image.height, image.width) == (row["height"], row["width"])
        assert row["content"] == content_digest(image)
        assert (row["bits_y"], tuple(row["shape"])) == (image.bits_y, image.indices.shape)
    assert len(list(folder.iterdir())) == 6


def test_export_refuses_what_it_would_spoil(stored: LatentSet, told: Told, tmp_path: Path) -> None:
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "mine.txt").write_text("precious")
    file.write_text("precious")
    wanted = "expected an empty folder, or a name for a new one, found"
    for place, found in (
        (used, "1 entries, such as mine.txt"),
        (file, "a file of that name"),
        (tmp_path / "no" / "where", f"no folder {tmp_path}/no to make it in"),
    ):
        assert told("export", KEY, str(place)) == (1, f"retrellis: {place}: {wanted} {found}\n")
    assert (tree(str(used)), (tmp_path / "no").exists()) == ({str(used / "mine.txt"): b"precious"}, False)
    for part in stored.part_names():
        stored.retire(part, "a test")
    assert "expected images in the set" in told("export", KEY, str(tmp_path / "new"))[1]
    assert not (tmp_path / "new").exists()


def test_an_export_that_broke_off_has_no_index(
    workspace: Workspace, stored: LatentSet, small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(505_000))
    with pytest.raises(StorageFull, match=r"disk full: expected room for"):
        export_set(stored, small_disk / "out")
    assert not (small_disk / "out" / "index.json").exists()
    path = file_of(workspace, list(stored.parts().values())[1])
    path.write_bytes(b"")
    with pytest.raises(LatentError, match="is damaged at"):
        export_set(stored, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_dataset_gives_what_is_stored(
    workspace: Workspace,
    stored: LatentSet,
    images: list[PartImage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from torch.utils.data import DataLoader

    from jobs.latents_dataset import LatentDataset

    monkeypatch.setenv("RETRELLIS_SCRATCH", str(tmp_path / "scratch"))
    dataset = LatentDataset(workspace.root, KEY[:4])
    assert dataset.digests == sorted(image.digest for image in images)
    by_name = {image.digest: image for image in images}
    loader = DataLoader(
        dataset, batch_size=None, shuffle=True, num_workers=1
    )  # forked, after obstore's first use
    found = list(loader)
    assert {item["digest"] for item in found} == set(by_name)
    for item in [*found, dataset[-1], dataset[images[2].digest]]:
        image = by_name[item["digest"]]
        assert item["indices"].dtype == torch.int16
        np.testing.assert_array_equal(item["indices"], image.indices)
        np.testing.assert_array_equal(item["hyper_indices"], image.hyper_indices)
    assert dataset[images[2].digest]["digest"] == images[2].digest
    some = LatentDataset(workspace.root, KEY, [images[3].digest, images[1].digest])
    assert (len(some), some[0]["digest"]) == (2, min(images[3].digest, images[1].digest))
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(KeyError):
        some[images[0].digest]
    with pytest.raises(LatentError, match="1 are missing, such as beef"):
        LatentDataset(workspace.root, KEY, ["beef"])
