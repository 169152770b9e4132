"""Keys, records and the workspace: the one primitive that everything else stands on."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from enum import IntEnum
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StorageFull, StoreError
from storage.keys import canonical_json, digest
from storage.objects import Objects
from storage.records import RecordError, Records
from storage.workspace import Workspace, WorkspaceError, WorkspaceVersionError

RACES = 200
PROCESSES = 3
THREADS = 6
_shared: dict[str, Barrier] = {}  # set in the processes that race

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_canonical_json_reads_back_and_is_its_own_canonical_form(value: object) -> None:
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": (1, 2.5, None), "a": "λ"}) == b'{"a":"\\u03bb","b":[1,2.5,null]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    assert len({canonical_json(value) for value in (1, 1.0, "1", True, [1], None, 0, -0.0, 0.0, "")}) == 10


def test_golden_digests() -> None:
    """These name what users have in their workspaces: if one changes, all is computed again."""
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    settings = {
        "lmbda": 0.0067,
        "steps": 60_000,
        "trellis": "vvc8",
        "parts": ["g_s"],
        "bias": None,
        "amp": True,
    }
    assert digest(settings) == "6bacee6cb774ef17a5e6b8fbdfb03333ac36ff1d3f5775829ca834cd7a480e2d"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"loss": [1.0, float("nan")]}, ValueError, r"finite number at \$\.loss\[1\], found nan"),
        (float("-inf"), ValueError, "found -inf"),
        ({"a": {1: 2}}, TypeError, r"strings at \$\.a, found 1"),
        ({"n": np.int64(3)}, TypeError, r"at \$\.n, found int64: convert"),
        ([b"raw"], TypeError, r"\$\[0\], found bytes"),
        ({"s": {1, 2}}, TypeError, "found set"),
    ],
)
def test_canonical_json_refuses(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        canonical_json(value)


def test_canonical_json_writes_enumerations_and_numpy_floats_as_their_values() -> None:
    level = IntEnum("level", "low high")
    assert canonical_json([level(2), np.float64(0.5)]) == b"[2,0.5]"


def test_record_is_created_once_and_known_again_by_its_attempt(objects: Objects) -> None:
    records = Records(objects)
    body = {"attempt": "one", "value": [1, 2.5, "ü"]}
    assert records.get("results/train/k") is None
    assert records.create("results/train/k", body) is True
    assert records.create("results/train/k", body) is True
    assert records.create("results/train/k", {"attempt": "two"}) is False
    assert records.get("results/train/k") == body
    records.create("results/tables/k", {"attempt": "three"})
    assert records.list("results") == ["results/tables/k", "results/train/k"]
    assert records.load("results/train") == {"results/train/k": body}
    assert records.list("nothing") == []
    with pytest.raises(ValueError, match=r"to have a field 'attempt', found \['version'\]"):
        records.create("results/train/l", {"version": 1})


class LosesAnswers(Objects):
    """Does what it is told, and then (or before) the connection breaks."""

    done = True

    def create(self, name: str, data: bytes) -> bool:
        if self.done:
            super().create(name, data)
        raise StoreError("connection reset")


def test_lost_answer(tmp_path: Path) -> None:
    objects = LosesAnswers(str(tmp_path))
    records = Records(objects)
    assert records.create("a", {"attempt": "mine"}) is True
    assert records.create("a", {"attempt": "other"}) is False
    objects.done = False
    with pytest.raises(StoreError, match="connection reset"):
        records.create("b", {"attempt": "mine"})


@pytest.mark.parametrize(
    "data", [b"", b'{"attempt": "x", "va', b"\xff\xfe{}", b"[1]", b'{"version": 1}', b"\0" * 9]
)
def test_broken_record_is_named(objects: Objects, data: bytes) -> None:
    objects.put("records/results/train/k.json", data)
    records = Records(objects)
    message = f"record 'results/train/k' cannot be read: expected a JSON object, found {len(data)} bytes.*move it away"
    with pytest.raises(RecordError, match=message):
        records.load("results")
    with pytest.raises(RecordError, match=message):
        records.create("results/train/k", {"attempt": "x"})


def test_of_racing_threads_exactly_one_wins(objects: Objects) -> None:
    records, attempts = Records(objects), [f"t{number}" for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for race in range(10):
            won = list(pool.map(lambda a, r=race: records.create(f"race/{r}", {"attempt": a}), attempts))
            (winner,) = [attempt for attempt, first in zip(attempts, won, strict=True) if first]
            assert records.get(f"race/{race}") == {"attempt": winner}


def test_records_that_are_known_are_not_read_again(objects: Objects) -> None:
    records, known = Records(objects), {}
    records.create("a/1", {"attempt": "one"})
    assert records.load("a", known) == known == {"a/1": {"attempt": "one"}}
    objects.put("records/a/1.json", b"what nobody may do")
    records.create("a/2", {"attempt": "two"})
    assert records.load("a", known) == {"a/1": {"attempt": "one"}, "a/2": {"attempt": "two"}}
    objects.remove("records/a/1.json")
    assert list(records.load("a", known)) == ["a/2"]


def test_of_racing_processes_exactly_one_wins(tmp_path: Path) -> None:
    Workspace.open(str(tmp_path))
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn, initializer=_share, initargs=(start,)) as pool:
        tables = list(pool.map(_race, [str(tmp_path)] * PROCESSES, [f"p{n}" for n in range(PROCESSES)]))
    winners = Workspace.open(str(tmp_path)).records.load("race")
    assert len(winners) == RACES
    for name, body in winners.items():
        assert [table["attempt"] for table in tables if table["won"][name]] == [body["attempt"]]


def _share(start: Barrier) -> None:
    _shared["start"] = start


def _race(root: str, attempt: str) -> dict[str, Any]:
    records = Workspace.open(root).records
    _shared["start"].wait(60)
    return {
        "attempt": attempt,
        "won": {f"race/{n}": records.create(f"race/{n}", {"attempt": attempt}) for n in range(RACES)},
    }


def test_workspace_is_made_found_and_pickled(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path / "deep" / "workspace"))
    assert json.loads((tmp_path / "deep" / "workspace" / "workspace.json").read_text()) == {"version": 1}
    again = pickle.loads(pickle.dumps(Workspace.open(workspace.root, create=False)))
    assert again.root == workspace.root
    assert again.path("a/b") == str(tmp_path / "deep" / "workspace" / "a" / "b")


def test_workspace_that_is_not_there(tmp_path: Path) -> None:
    message = "no workspace at .*: expected a file workspace.json there. Name another place"
    with pytest.raises(WorkspaceError, match=message):
        Workspace.open(str(tmp_path / "none"), create=False)
    with pytest.raises(WorkspaceError, match=message):
        Workspace.open(str(tmp_path), create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "found"), [(b'{"version": 7}', "7"), (b'{"ver', "b'{\"ver'"), (b"[]", r"b'\[\]'")]
)
def test_workspace_of_another_version(tmp_path: Path, data: bytes, found: str) -> None:
    (tmp_path / "workspace.json").write_bytes(data)
    with pytest.raises(
        WorkspaceVersionError, match=f"expected version 1, found {found} in workspace.json. Use the"
    ):
        Workspace.open(str(tmp_path))


def test_full_disk_names_the_record_and_keeps_the_rest(small_disk: Path) -> None:
    records = Workspace.open(str(small_disk)).records
    records.create("before", {"attempt": "a"})
    with pytest.raises(
        StorageFull, match=r"disk full: expected room for 600,\d+ bytes of .*/big.json, .*goes on"
    ):
        records.create("big", {"attempt": "a", "value": "x" * 600_000})
    assert records.create("after", {"attempt": "a"})
    assert records.list("") == ["after", "before"]
    assert not list(small_disk.rglob("*#*"))
