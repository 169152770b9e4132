"""`retrellis latents`: what it says of known sets, every fault by name, and that nothing is deleted that is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from laboratory import Lab
from latent_sets import (
    KEY,
    OTHER,
    Told,
    file_of,
    leave_group,
    result,
    tree,
)
from rich.filesize import decimal
from test_latents import assert_equal, damaged, latents

from jobs import cli
from storage.inventory import Sizes, entry, find_set
from storage.keys import canonical_json
from storage.latents import LatentSet
from storage.parts import PartImage, content_digest
from storage.workspace import Workspace

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


def test_ls_and_show_tell_what_was_made_with_effort(
    workspace: Workspace, images: list[PartImage], told: Told
) -> None:
    axes = {"lmbda": 0.013, "quantizer": "tcq8", "effort": 5}
    note = {"set": KEY, "images": 1}
    made = {"latents": {"kind": "latents", "digest": "f" * 64, "note": note}}
    result(workspace, "quantize", axes, {"codec": "c" * 64, "tables": "d" * 64}, made, {"effort": 5})
    LatentSet(workspace, KEY).write_part("0", images[:1])
    assert "tcq8, effort 5" in told("ls")[1]
    assert "quantizer  tcq8, effort 5\n" in told("show", KEY)[1]


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
