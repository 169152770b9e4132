"""Ingest, its tasks called in this process: which files it finds, what it refuses and why, and what it remembers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from jobs import ingest
from jobs.experiment import Images
from jobs.ingest import EmptyFolder, File, Unreadable, list_files
from jobs.resources import Resources
from jobs.stage import Node, Outcome, Task
from storage.images import ImageStore
from storage.workspace import Workspace

UNREADABLE = "/proc/self/mem"  # an ordinary file, even for root, whose reading is an input/output error
NOBODY = 65534
SETTINGS = {"scale": 1.0, "max_pixels": 10_000}


class Here:
    """A cluster whose tasks are calls."""

    def __init__(self) -> None:
        self.items: list[tuple[Any, ...]] = []

    def map(
        self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]], share: object
    ) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for item in items:
            self.items.append(item)
            yield item, function(*item)


@dataclass
class Desk:
    """A folder of photographs, a workspace, and what ingest says of them."""

    folder: Path
    workspace: Workspace
    cluster: Here = field(default_factory=Here)
    said: list[str] = field(default_factory=list)

    def list(self, rehash: bool = False) -> list[File]:
        return list_files(Images(folders=[str(self.folder)]), rehash)

    def ingest(self, files: list[File]) -> Outcome:
        task = Task(
            node=Node("ingest", {}, SETTINGS, parameters={"files": files}),
            key="0" * 64,
            inputs={},
            workspace=self.workspace,
            cluster=self.cluster,  # type: ignore[arg-type]
            resources=Resources(),
            attempt="a",
            progress=lambda done, total, text: None,
            say=self.said.append,
        )
        return ingest.compute(task)

    def manifest(self, outcome: Outcome) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self.workspace.blobs.get(outcome.outputs["images"]["blob"]))
        return manifest

    def chunks(self) -> list[list[str]]:
        """The names of the files that each task was given."""
        return [[Path(file.path).name for file in files] for _, files, _ in self.cluster.items]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    (tmp_path / "photos").mkdir()
    return Desk(tmp_path / "photos", Workspace.open(str(tmp_path / "workspace")))


def png(seed: int, side: int = 24) -> bytes:
    """A PNG file of random pixels; its size is a function of `side` alone."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def paths(files: list[File], folder: Path) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in files]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do anything: be somebody else for a moment."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(was)


def test_files_without_pixels_are_listed_with_their_reasons(desk: Desk) -> None:
    (desk.folder / "good.png").write_bytes(png(0))
    (desk.folder / "truncated.png").write_bytes(png(1)[:700])
    (desk.folder / "empty.jpg").touch()
    (desk.folder / "words.tif").write_text("no image")
    (desk.folder / "large.png").write_bytes(png(2, side=101))
    outcome = desk.ingest(desk.list())
    manifest = desk.manifest(outcome)
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in manifest["skipped"]}
    assert [Path(row["source"]).name for row in manifest["images"]] == ["good.png"]
    assert reasons.keys() == {"truncated.png", "empty.jpg", "words.tif", "large.png"}
    assert reasons["truncated.png"].startswith("truncated or damaged: ")
    assert reasons["empty.jpg"] == reasons["words.tif"] == "not a PNG, JPEG, WebP or TIFF image"
    assert reasons["large.png"] == "101 × 101 pixels are more than the limit of 10000"
    assert sorted(desk.said) == sorted(
        f"skipped {desk.folder / n}: {reason}" for n, reason in reasons.items()
    )
    assert outcome.summary == {"images": 1, "skipped": 4, "new_files": 5}
    again = desk.ingest(desk.list())  # from the records: no file is opened
    assert (desk.manifest(again), again.summary["new_files"], len(desk.chunks())) == (manifest, 0, 1)


def test_a_folder_without_a_usable_image_is_an_error(desk: Desk) -> None:
    (desk.folder / "a.png").write_text("no image")
    (desk.folder / "b.png").touch()
    with pytest.raises(
        EmptyFolder, match=r"no usable image among 2 files \(.*a\.png: not a PNG.*\): give another"
    ):
        desk.ingest(desk.list())


def test_folders_without_a_candidate_are_named(desk: Desk) -> None:
    (desk.folder / "notes.txt").touch()
    for folder in (desk.folder, desk.folder / "missing"):
        with pytest.raises(
            EmptyFolder, match=rf"^{folder}: expected a folder with images \(.*\.png.*found none"
        ):
            list_files(Images(folders=[str(folder)]))


def test_an_unreadable_file_is_told_and_never_recorded(desk: Desk) -> None:
    (desk.folder / "a.png").write_bytes(png(0))
    for number in range(6):
        (desk.folder / f"locked{number}.png").symlink_to(UNREADABLE)
    files = desk.list()
    expected = (
        r"cannot be read: \S*locked0\.png \(Input/output error\), .*locked4\.png \(.*\) and 1 more\. Make"
    )
    with pytest.raises(Unreadable, match=expected):
        desk.ingest(files)
    recorded = ImageStore(desk.workspace).index().sources
    assert [Path(path).name for path, *_ in recorded] == ["a.png"]  # finished, and kept
    for number in range(6):
        (desk.folder / f"locked{number}.png").unlink()
        (desk.folder / f"locked{number}.png").write_bytes(png(1 + number))
    outcome = desk.ingest(files)  # the same size and time as before: what changes a mode changes neither
    assert (outcome.summary["images"], outcome.summary["new_files"]) == (7, 6)


def test_a_task_of_unreadable_files_leaves_no_record(desk: Desk) -> None:
    (desk.folder / "locked.png").symlink_to(UNREADABLE)
    with pytest.raises(Unreadable, match=r"locked\.png \(Input/output error\)"):
        desk.ingest(desk.list())
    assert desk.workspace.records.list("images") == []


def test_rehash_names_a_file_that_it_cannot_read(desk: Desk) -> None:
    (desk.folder / "locked.png").symlink_to(UNREADABLE)
    with pytest.raises(Unreadable, match=r"cannot be read: \S*locked\.png \(Input/output error\)\. Make"):
        desk.list(rehash=True)


def test_linked_folders_are_followed_and_each_folder_is_visited_once(desk: Desk, tmp_path: Path) -> None:
    for name in ("photos/b", "photos/.hidden", "elsewhere/deep", "elsewhere/.hidden"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("photos/z", "photos/.z", "photos/b/x", "photos/.hidden/x"):
        (tmp_path / f"{name}.png").touch()
    for name in ("elsewhere/x", "elsewhere/deep/y", "elsewhere/.hidden/x"):
        (tmp_path / f"{name}.png").touch()
    links = {
        "photos/a": "photos/b",  # a second way: files keep the plain one
        "photos/b/up": "photos",  # a loop
        "photos/c": "elsewhere",
        "photos/d": "elsewhere",  # a third way
        "elsewhere/deep/up": "elsewhere",
        "photos/.secret": "elsewhere",
        "photos/nowhere": "missing",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert paths(desk.list(), desk.folder) == ["b/x.png", "c/deep/y.png", "c/x.png", "z.png"]


def test_the_listed_folder_may_be_a_link(desk: Desk, tmp_path: Path) -> None:
    (desk.folder / "a.png").touch()
    (tmp_path / "link").symlink_to(desk.folder)
    assert paths(list_files(Images(folders=[str(tmp_path / "link")])), tmp_path) == ["link/a.png"]


def test_a_folder_that_cannot_be_listed_is_named(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.folder / "a.png").touch()
    (desk.folder / "locked").mkdir(mode=0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # what lies above is not open to everybody
    with (
        as_nobody(),
        pytest.raises(Unreadable, match=r"cannot be read: photos/locked \(Permission denied\)\."),
    ):
        list_files(Images(folders=["photos"]))


def test_a_task_takes_so_many_files_and_so_many_bytes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, side in enumerate((8, 8, 8, 60, 8, 8)):
        (desk.folder / f"{number}.png").write_bytes(png(number, side))
    monkeypatch.setattr(ingest, "FILES_PER_SHARD", 2)
    monkeypatch.setattr(ingest, "BYTES_PER_SHARD", 2000)  # less than the large file has
    desk.ingest(desk.list())
    assert desk.chunks() == [["0.png", "1.png"], ["2.png"], ["3.png"], ["4.png", "5.png"]]


def test_rehash_names_files_whose_change_other_runs_do_not_see(desk: Desk) -> None:
    file = desk.folder / "a.png"
    (desk.folder / "b.png").write_bytes(png(5))
    file.write_bytes(png(0))
    before = desk.list()
    old = desk.ingest(before)
    time = file.stat().st_mtime_ns
    file.write_bytes(png(1))
    os.utime(file, ns=(time, time))
    assert desk.list() == before
    new = desk.ingest(desk.list(rehash=True))
    assert new.outputs["images"]["digest"] != old.outputs["images"]["digest"]
    (line,) = desk.said
    assert line.startswith(f"changed under the same path, size and time: {file}. `touch`")
    desk.ingest(desk.list(rehash=True))
    assert len(desk.said) == 1  # told once: nothing has changed since
