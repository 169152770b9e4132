"""Node-local copies: built once, never half, and views give back what was written."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import StorageFull
from storage.memmap import LocalCache, RaggedArrays, RaggedWriter


def write(directory: Path, arrays: Sequence[np.ndarray], dtype: str) -> RaggedArrays:
    with RaggedWriter(directory, dtype) as writer:
        for array in arrays:
            writer.append(array)
    return RaggedArrays(directory)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=5),
    st.sampled_from(["uint8", "float16", "int64"]),
)
def test_ragged_arrays_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: Sequence[Any], dtype: str
) -> None:
    rng = np.random.default_rng(0)
    written = [rng.integers(0, 200, shape).astype(dtype) for shape in shapes]
    found = write(tmp_path_factory.mktemp("ragged"), written, dtype)
    assert len(found) == len(written)
    for row, array in enumerate(written):
        np.testing.assert_array_equal(found[row], array)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))[row - len(written)], array)
        assert found[row].dtype == np.dtype(dtype)


def test_ragged_arrays_are_read_only_views_in_bounds(tmp_path: Path) -> None:
    found = write(tmp_path, [np.arange(6).reshape(2, 3), np.arange(4).reshape(1, 4)], "float16")
    assert [found[1].shape, found[1].dtype] == [(1, 4), np.float16]
    assert np.shares_memory(found[0], found[0])
    with pytest.raises(ValueError, match="read-only"):
        found[0][0, 0] = 1
    with pytest.raises(IndexError):
        found[2]


def test_ragged_writer_wants_equal_dimensions_and_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 2 dimensions as in the first array, found \(3,\)"):
        write(tmp_path, [np.zeros((2, 2)), np.zeros(3)], "uint8")
    with pytest.raises(FileNotFoundError, match=r"index\.npz"):
        RaggedArrays(tmp_path)


def test_a_directory_is_built_once(tmp_path: Path) -> None:
    calls = []

    def build(directory: Path) -> None:
        calls.append(directory)
        (directory / "folder").mkdir()
        (directory / "folder" / "data").write_text("built")

    cache = LocalCache(tmp_path / "cache")
    assert (cache.open_or_build("k", build) / "folder" / "data").read_text() == "built"
    assert cache.open_or_build("k", build) == tmp_path / "cache" / "k"
    assert cache.open_or_build("other", build) != cache.open_or_build("k", build)
    assert len(calls) == 2


def test_a_failed_build_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise RuntimeError("no latents")

    with pytest.raises(RuntimeError, match="no latents"):
        cache.open_or_build("k", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["k.lock"]
    assert list(cache.open_or_build("k", lambda directory: None).iterdir()) == []


def slow_build(directory: Path) -> None:
    (directory / f"by-{os.getpid()}").write_text("")
    time.sleep(0.2)


def never_ready(directory: Path) -> None:
    (directory / "half").write_text("")
    time.sleep(60)


def build_in(root: Path, build: Any) -> None:
    LocalCache(root).open_or_build("k", build)


def test_of_several_processes_one_builds_and_a_killed_ones_leftover_is_replaced(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    killed = spawn.Process(target=build_in, args=(tmp_path, never_ready))
    killed.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "k.building" / "half").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    others = [spawn.Process(target=build_in, args=(tmp_path, slow_build)) for _ in range(2)]
    for process in others:
        process.start()
    killed.kill()
    for process in [killed, *others]:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0]
    assert len(list((tmp_path / "k").iterdir())) == 1
    assert not (tmp_path / "k.building").exists()


def test_default_folder_is_told_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRELLIS_SCRATCH", str(tmp_path / "scratch"))
    assert LocalCache.default().open_or_build("k", lambda directory: None) == tmp_path / "scratch" / "k"
    monkeypatch.delenv("RETRELLIS_SCRATCH")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = LocalCache.default().open_or_build("k", lambda directory: None)
    assert found == tmp_path / f"retrellis-{os.getuid()}" / "k"


def test_full_disk_is_named_and_leaves_nothing(small_disk: Path) -> None:
    cache = LocalCache(small_disk)

    def build(directory: Path) -> None:
        write(directory, [np.ones((300, 500)) for _ in range(5)], "uint8")

    with pytest.raises(StorageFull, match=r"expected room for 150,000 bytes of .*/k\.building/data\.bin"):
        cache.open_or_build("k", build)
    assert [path.name for path in small_disk.iterdir()] == ["k.lock"]
    assert cache.open_or_build("k", lambda directory: None).is_dir()
