"""`retrellis latents`: what it says of known sets, every fault by name, and that nothing is deleted that is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from laboratory import Lab
from rich.filesize import decimal
from test_latents import assert_equal, damaged, latents

from jobs import cli
from storage.errors import StorageFull
from storage.export import export_set
from storage.inventory import Sizes, entry, find_set
from storage.keys import canonical_json
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage, content_digest
from storage.records import RecordError
from storage.workspace import Workspace

KEY, OTHER = "ab" * 32, "ab1" + "c" * 61
DAY_S = 86_400.0
Told = Callable[..., tuple[int, str]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"))


@pytest.fixture
def told(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Exit code and all words of `retrellis latents …` on the workspace."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["retrellis", "latents", *arguments, "--workspace", workspace.root])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out + output.err

    return call


@pytest.fixture
def images() -> list[PartImage]:
    return [latents(number) for number in range(5)]


@pytest.fixture
def stored(workspace: Workspace, images: list[PartImage]) -> LatentSet:
    """A set of two parts, three images and two, with the results that made it and read it."""
    made = LatentSet(workspace, KEY)
    made.write_part("0", images[:3])
    made.write_part("1", images[3:])
    record_results(workspace, made, images)
    return made


def record_results(workspace: Workspace, made: LatentSet, images: list[PartImage]) -> None:
    """ingest, tables, quantize and finetune, as far as the commands read them."""
    rows = [{"digest": name} for name in sorted(image.digest for image in images)]
    manifest = workspace.blobs.put(canonical_json({"images": rows}), ".json")
    codec, tables, axes = "c" * 64, "d" * 64, {"lmbda": 0.013, "quantizer": "tcq8"}
    content = made.content_digest(row["digest"] for row in rows)
    note = {"set": made.key, "images": len(rows)}
    reads = {"codec": codec, "tables": tables, "images": "e" * 64}
    image_set = {"kind": "images", "digest": "e" * 64, "blob": manifest, "note": {}}
    table_set = {"kind": "tables", "digest": tables, "note": {}}
    latent_set = {"kind": "latents", "digest": content, "note": note}
    result(workspace, "ingest", {"images": "train"}, {}, {"images": image_set})
    result(workspace, "tables", {"quantizer": "tcq8"}, {}, {"tables": table_set}, {"kind": "tcq"})
    result(workspace, "quantize", axes, reads, {"latents": latent_set})
    result(workspace, "finetune", {**axes, "arm": "paper", "seed": 0}, {"latents": content}, {})


def result(
    workspace: Workspace,
    stage: str,
    axes: dict[str, Any],
    reads: dict[str, str],
    outputs: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> None:
    key = f"{len(stage):064x}"
    record = {
        "attempt": "a",
        "stage": stage,
        "key": key,
        "experiment": "small",
        "axes": axes,
        "instance": " ".join([stage, *(f"{name}={value}" for name, value in axes.items())]),
        "ingredients": {"settings": settings or {}},
        "reads": reads,
        "outputs": outputs,
        "ended": "2026-01-01T00:00:00.000+00:00",
    }
    workspace.records.create(f"results/{stage}/{key}", record)


def file_of(workspace: Workspace, record: Any, name: str = "nonzero/c/0/0") -> Path:
    return Path(workspace.path(f"{record['group']}/{name}"))


def make_older(workspace: Workspace, prefix: str, days: float) -> None:
    """As if nobody had touched what lies there for so long."""
    then = time.time() - days * DAY_S
    for path in [Path(workspace.path(prefix)), *Path(workspace.path(prefix)).rglob("*")]:
        os.utime(path, (then, then))


def leave_group(workspace: Workspace, record: Any, days: float) -> Path:
    """What a killed task leaves: a group with some objects, one of them half written, and no record."""
    folder = Path(workspace.path(f"latents/{KEY}/2-{'0' * 16}.0-killed"))
    (folder / "indices").mkdir(parents=True)
    (folder / "zarr.json").write_bytes(file_of(workspace, record, "zarr.json").read_bytes())
    (folder / "indices" / "zarr.json#123").write_bytes(bytes(1000))  # hidden from obstore
    make_older(workspace, f"latents/{KEY}/{folder.name}", days)
    return folder


def tree(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


# ls and show


def test_ls_gives_known_numbers(
    workspace: Workspace, stored: LatentSet, images: list[PartImage], told: Told
) -> None:
    code, words = told("ls")
    raw = sum(image.indices.size + image.hyper_indices.size for image in images)  # all fit int8
    size = sum(workspace.usage(record["group"]).size for record in stored.parts().values())
    bits = sum(image.bits_y + image.bits_z for image in images)
    row = next(line for line in words.splitlines() if line.startswith(KEY[:8]))
    cells = [KEY[:8], "c" * 8, "0.013", "tcq8 (tcq)", "5", "2"]
    cells += [decimal(raw), decimal(size), decimal(round(bits / 8)), f"{size / (bits / 8):.3f}"]
    assert re.split(r"\s{2,}", row.strip()) == [*cells, "small", "1 finetune"]
    assert code == 0


def test_sizes_count_the_dtype_at_rest(workspace: Workspace, images: list[PartImage]) -> None:
    wide = replace(images[0], indices=np.full_like(images[0].indices, 300))
    stored = LatentSet(workspace, KEY)
    record = stored.write_part("0", [wide])
    found = entry(workspace, KEY, [])
    expected = 2 * wide.indices.size + wide.hyper_indices.size
    assert found.total == Sizes(expected, record["totals"]["bytes"], wide.bits_y + wide.bits_z)


def test_sets_without_results_and_no_sets(workspace: Workspace, images: list[PartImage], told: Told) -> None:
    assert told("ls") == (
        0,
        f"{workspace.root}: no latent set yet; `retrellis quantize` makes one\n",
    )
    LatentSet(workspace, KEY).write_part("0", images)
    row = told("ls")[1].splitlines()[-1]
    assert row.split("  ")[0] == KEY[:8]
    assert row.rstrip().endswith("no result  no result")
    assert "made by    no result: unfinished, or the result was moved away" in told("show", KEY[:3])[1]


def test_show_names_results_both_ways_and_parts(
    workspace: Workspace, stored: LatentSet, images: list[PartImage], told: Told
) -> None:
    first, second = stored.parts()
    stored.retire(second, "a bad disk")
    code, words = told("show", KEY[:5], "--images")
    assert code == 0
    for line in (
        f"set        {KEY}",
        "λ          0.013",
        "quantizer  tcq8 (tcq)",
        "images     3, in 1 part(s)",
        "made by    quantize lmbda=0.013 quantizer=tcq8 (00000000), experiment small, ended 2026-01-01T00:00:00; "
        "5 images, 2 of them missing",
        "read by    finetune lmbda=0.013 quantizer=tcq8 arm=paper seed=0 (00000000), experiment small, "
        "ended 2026-01-01T00:00:00",
        f"host       {stored.record(first)['host']}",
        f"versions   numpy {np.__version__} python {sys.version.split()[0]} zarr {zarr.__version__}",
    ):
        assert line in words.splitlines()
    assert re.search(rf"^{first}  +3  ", words, re.MULTILINE)
    assert re.search(rf"^{second}  \S+  a bad disk", words, re.MULTILINE)
    image = images[0]
    shape = " × ".join(map(str, image.indices.shape))
    assert re.search(
        rf"^{image.digest}  {first}  {image.width} × {image.height} +{shape}", words, re.MULTILINE
    )
    assert images[4].digest not in words


def test_a_set_is_found_by_its_first_digits(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    assert find_set(workspace, KEY) == KEY
    assert told("show", "77") == (
        1,
        f"retrellis: expected one latent set whose key begins with '77', found none among {KEY[:8]}\n",
    )
    LatentSet(workspace, OTHER).write_part("0", [latents(0)])
    code, words = told("show", "ab")
    assert code == 1
    assert words.endswith(f"begins with 'ab', found 2: {OTHER[:8]}, {KEY[:8]}; give more digits\n")


# verify


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "longer", "bit flip"])
def test_every_damaged_object_is_named(
    workspace: Workspace, stored: LatentSet, told: Told, kind: str
) -> None:
    part, record = next(iter(stored.parts().items()))
    expected = []
    for row in record["objects"]:
        path = file_of(workspace, record, row["name"])
        whole = path.read_bytes()
        path.unlink() if kind == "missing" else path.write_bytes(damaged(whole, kind))
        found = "no such object" if kind == "missing" else rf"{len(path.read_bytes()):,} bytes of SHA-256 \w+"
        expected.append(
            rf"bad part {part}: {path}: expected {len(whole):,} bytes of SHA-256 {row['sha256']}, found {found}"
        )
    if kind == "missing":  # not one object is left: that is one fault
        whole = rf"{len(expected)} objects, {record['totals']['bytes']:,} bytes"
        group = workspace.path(record["group"])
        expected = [rf"bad part {part}: {group}: expected {whole}, found no object at all"]
    before = tree(workspace.root)
    code, words = told("verify", KEY[:4])
    lines = words.splitlines()
    assert code == 1
    for line, pattern in zip(lines, expected, strict=False):
        assert re.fullmatch(pattern, line)
    assert lines[len(expected)].startswith(f"set {KEY[:8]}: 1 of 2 part(s) as recorded, 2 image(s), ")
    assert lines[len(expected)].endswith("; 1 bad")
    assert lines[-1].strip().endswith(f"or: retrellis latents verify {KEY[:8]} --repair")
    assert tree(workspace.root) == before


def test_one_missing_object_is_named(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    _, record = stored.parts().items()
    path = file_of(workspace, record[1], "larger/c/0")
    path.unlink()
    code, words = told("verify")
    assert code == 1
    assert re.search(
        rf"bad part {record[0]}: {path}: expected \d+ bytes of .*, found no such object\n", words
    )


def test_an_object_that_cannot_be_read_hides_no_other(
    workspace: Workspace, stored: LatentSet, told: Told
) -> None:
    record = next(iter(stored.parts().values()))
    path, other = file_of(workspace, record), file_of(workspace, record, "zarr.json")
    path.unlink()
    path.symlink_to(path)  # an error of its own, and not that of a missing file
    other.write_bytes(b"")
    code, words = told("verify")
    assert code == 1
    assert re.search(rf"{path}: expected .*, found what cannot be read \(.+\)\n", words)
    assert re.search(rf"{other}: expected .*, found 0 bytes", words)


def test_whole_objects_of_other_content_are_named(
    workspace: Workspace, images: list[PartImage], told: Told
) -> None:
    """The record agrees with its objects, but not with what they hold."""
    record = dict(LatentSet(workspace, KEY).write_part("0", images[:2]))
    name = f"records/latents/{KEY}/parts/wide/{record['part']}.json"
    place = workspace.path(record["group"])

    def found(**change: Any) -> str:
        workspace.put(name, canonical_json({**record, **change}))
        code, words = told("verify")
        assert code == 1
        return words

    other = [{**record["images"][0], "content": "0" * 64}, record["images"][1]]
    content = content_digest(images[0])
    assert (
        f"bad part {record['part']}: {place}: expected content {'0' * 64} of image {images[0].digest}, "
        f"found content {content}\n" in found(images=other)
    )
    assert f"expected image {images[1].digest} in row 0, found image {images[0].digest}" in found(
        images=record["images"][::-1]
    )
    assert "expected 1 images, found 2" in found(images=record["images"][:1])
    objects = [row for row in record["objects"] if not row["name"].startswith("sizes/")]
    assert f"{place}: expected a Zarr group that decodes, found KeyError" in found(objects=objects)


def test_whole_sets_are_whole(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    before = tree(workspace.root)
    size = decimal(sum(record["totals"]["bytes"] for record in stored.parts().values()))
    expected = f"set {KEY[:8]}: 2 of 2 part(s) as recorded, 5 image(s), {size}\n"
    assert told("verify") == told("verify", KEY, "--repair") == (0, expected)
    assert tree(workspace.root) == before


def test_leftovers_are_named_but_not_bad(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    folder = leave_group(workspace, next(iter(stored.parts().values())), days=2)
    code, words = told("verify")
    assert code == 0
    assert re.search(
        rf"leftover {folder}: expected a record that names it, found none \([\d.]+ kB, 2.0 days old\)", words
    )


def test_a_torn_record_is_bad_and_can_be_withdrawn(
    workspace: Workspace, stored: LatentSet, told: Told
) -> None:
    part = stored.part_names()[0]
    file = Path(workspace.path(f"records/latents/{KEY}/parts/wide/{part}.json"))
    file.write_bytes(file.read_bytes()[:40])
    code, words = told("verify")
    assert code == 1
    assert f"bad part {part}: {file}: expected a part's record, found what cannot be read (record" in words
    assert "not looked for leftovers: record" in words
    assert told("gc", "--delete", "--grace-days", "0")[0] == 1  # who knows what it names
    assert told("verify", "--repair")[0] == 1
    assert list(LatentSet(workspace, KEY).parts()) == stored.part_names()
    file.unlink()
    assert told("verify")[0] == 0


def test_repair_withdraws_bad_parts_alone(
    workspace: Workspace, stored: LatentSet, images: list[PartImage], told: Told
) -> None:
    bad, good = stored.parts()
    path = file_of(workspace, stored.record(bad))
    path.write_bytes(damaged(path.read_bytes(), "bit flip"))
    code, words = told("verify", "--repair")
    assert code == 1
    assert f"retired {bad}; its images count as missing, its data stays until `gc`" in words
    assert "3 image(s) of `quantize lmbda=0.013 quantizer=tcq8` are missing, such as" in words
    assert "run its experiment again (small: retrellis run" in words
    now = LatentSet(workspace, KEY)
    assert now.part_names() == [good]
    assert now.retired()[bad]["reason"].startswith("nonzero/c/0/0: expected ")
    now.write_part("0", images[:3])
    code, words = told("verify")
    assert (code, "missing" in words) == (0, False)
    assert_equal(now.read(images[0].digest), images[0])


def test_latents_computed_again_to_other_indices_are_told(
    workspace: Workspace, stored: LatentSet, images: list[PartImage], told: Told
) -> None:
    expected = stored.content_digest(image.digest for image in images)
    stored.retire(stored.part_names()[0], "a test")
    stored.write_part("0", [replace(images[0], indices=-images[0].indices), *images[1:3]])
    found = stored.content_digest(image.digest for image in images)
    code, words = told("verify")
    assert code == 1
    file = workspace.path(f"records/results/quantize/{8:064x}.json")
    assert (
        f"  `quantize lmbda=0.013 quantizer=tcq8` has changed: expected latents {expected[:8]}, found "
        f"{found[:8]}. Move {file} away and run its experiment again (small: " in words
    )
    assert f"5 images, expected latents {expected[:8]}, found {found[:8]}\n" in told("show", KEY)[1]
    Path(file).unlink()
    assert told("verify")[0] == 0


def test_retire(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    part = stored.part_names()[0]
    code, words = told("retire", KEY[:6], part, "--reason", "computed on a bad GPU")
    assert code == 0
    assert words.startswith(f"retired part {part} of set {KEY[:8]}\n  3 image(s) of `quantize ")
    assert LatentSet(workspace, KEY).retired()[part]["reason"] == "computed on a bad GPU"
    code, words = told("retire", KEY[:6], part, "--reason", "again")
    assert code == 1
    assert f"expected a recorded part '{part}' to retire, found 1 other(s), such as" in words
    assert "`retrellis latents show abababab` lists them" in words
    assert told("retire", KEY, part, "--reason", " ")[0] == 2
    assert told("retire", KEY, part)[0] == 2


# gc


def test_gc_touches_nothing_that_is_referenced(workspace: Workspace, stored: LatentSet, told: Told) -> None:
    make_older(workspace, "", 1000)
    before = tree(workspace.root)
    code, words = told("gc", "--delete", "--grace-days", "0", "--older-than", "0")
    assert code == 0
    assert re.search(rf"^keep set {KEY[:8]}: .* old; used by quantize .*tcq8, finetune .*arm=paper", words)
    assert words.endswith("deleted 0 item(s), 0 bytes\n")
    assert tree(workspace.root) == before


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


# with the rest of the program


def test_torch_ray_and_mlflow_stay_away(workspace: Workspace, stored: LatentSet) -> None:
    code = (
        "import sys\nfrom jobs import cli\n"
        "for words in (['ls'], ['show', 'ab'], ['verify'], ['gc']):\n"
        f"    sys.argv = ['retrellis', 'latents', *words, '--workspace', {workspace.root!r}]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("ray_address")
def test_a_repaired_set_is_completed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result of `quantize` is there already; all the same its missing images are computed, and they alone."""
    lab = Lab.new(tmp_path / "lab")
    settings = ("train.steps=2", "train.warmup=0", "arms.paper.steps=1")
    only = {"quantizer": "urq", "arm": "paper"}
    lab.run(*settings, stage="finetune", only=only)
    content, workspace = lab.content(), lab.workspace
    stored = LatentSet(workspace, lab.record("quantize")["outputs"]["latents"]["note"]["set"])
    names = sorted(stored.images())
    half = stored.part_names()[0]
    lost = len(stored.record(half)["images"])
    path = file_of(workspace, stored.record(half))
    path.write_bytes(damaged(path.read_bytes(), "bit flip"))
    instance = "quantize lmbda=0.013 quantizer=urq"
    assert f"reuse   {instance}" in lab.plan(*settings)

    command = ["retrellis", "latents", "verify", "--repair", "--workspace", lab.root]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert f"{lost} image(s) of `{instance}` are missing" in capsys.readouterr().out
    assert f"compute {instance}" in lab.plan(*settings)
    printed = lab.run(*settings, stage="finetune", only=only)
    assert f"{instance}: {lost} of {len(names)} images" in printed
    assert f"done: {instance}: a record of it was there first" in printed
    assert "done: finetune" not in printed  # the same latents as before: what was made of them still holds
    assert lab.content() == content
    monkeypatch.setattr(sys, "argv", [*command[:3], *command[4:]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
