"""Objects: what a store promises, be it a local folder or an S3 server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from storage.objects import Objects


def test_objects_are_written_whole_and_replaced(objects: Objects) -> None:
    large = bytes(range(256)) * (6 << 12)  # 6 MiB, which are sent in pieces
    objects.put("a/b", b"first")
    objects.put("a/b", b"second")
    objects.put("a/large", large)
    objects.put("a/empty", b"")
    assert objects.get("a/b") == b"second"
    assert objects.get("a/large") == large
    assert objects.get("a/empty") == b""
    assert Objects(objects.root).get("a/b") == b"second"


def test_an_object_is_created_once(objects: Objects) -> None:
    assert objects.create("a/b", b"first") is True
    assert objects.create("a/b", b"second") is False
    assert objects.get("a/b") == b"first"
    objects.remove("a/b")
    assert objects.create("a/b", b"third") is True


def test_ranges(objects: Objects) -> None:
    objects.put("a/b", b"second")
    objects.put("a/empty", b"")
    assert objects.get_range("a/b", 1, 3) == b"eco"
    assert objects.get_range("a/b", 4, 99) == b"nd"
    assert objects.get_range("a/b", 6, 1) == objects.get_range("a/b", 99, 1) == b""
    assert objects.get_range("a/empty", 0, 9) == b""


def test_what_is_not_there(objects: Objects) -> None:
    for ask in (objects.get, objects.modified_s, lambda name: objects.get_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match=f"{objects.root}/a/none: no such object"):
            ask("a/none")
    objects.remove("a/none")
    objects.delete("none")
    assert objects.list("none") == []
    assert objects.list_modified("none") == {}
    assert objects.folders("none") == ()
    assert (objects.usage("none").size, objects.usage("none").newest_s) == (0, 0.0)


def test_folders_hold_what_lies_below_them_alone(objects: Objects) -> None:
    before = time.time()
    for name in ("a/c/y", "a/b/x", "a/z", "ab"):
        objects.put(name, b"12345")
    assert objects.list("a") == ["a/b/x", "a/c/y", "a/z"]
    assert objects.folders("a") == ("b", "c")
    assert objects.usage("a").size == 15
    assert abs(objects.usage("a").newest_s - before) < 10
    assert objects.path("a/z") == f"{objects.root}/a/z"
    objects.delete("a/b")
    assert objects.list("a") == ["a/c/y", "a/z"]
    objects.delete("a")
    assert objects.list("") == ["ab"]


def test_one_clock_tells_when_objects_were_written(objects: Objects) -> None:
    objects.put("a/first", b"")
    objects.put("a/second", b"")
    times = objects.list_modified("a")
    assert list(times) == ["a/first", "a/second"]
    assert times["a/first"] <= times["a/second"]
    assert times["a/second"] == pytest.approx(objects.modified_s("a/second"), abs=1)


def test_several_are_asked_for_at_once_and_come_in_order(objects: Objects) -> None:
    names = [f"a/{number}" for number in range(40)]
    assert len(list(objects.each(lambda name: objects.put(name, name.encode()), names))) == 40
    assert list(objects.each(objects.get, names)) == [name.encode() for name in names]
    with pytest.raises(FileNotFoundError, match="a/none"):
        list(objects.each(objects.get, [*names, "a/none"]))


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/./b", "a/..", "a b", "a#1", "a\n"])
def test_object_names_that_stores_would_change_are_refused(objects: Objects, name: str) -> None:
    for write in (objects.put, objects.create):
        with pytest.raises(ValueError, match="expected an object name"):
            write(name, b"")


def test_a_killed_writers_leftover_is_not_listed_and_goes_with_its_folder(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.put("a/b", b"whole")
    (tmp_path / "a" / "b#123").write_bytes(b"to")
    assert objects.list("a") == ["a/b"]
    objects.delete("a")
    assert list(tmp_path.iterdir()) == []
