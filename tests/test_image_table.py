"""A set's images by its records: as a dictionary has them, with and without a compacted table, whatever is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_latents import KEY, latents

import storage.latents
from storage.image_table import ImageTable, Row
from storage.keys import digest, digest_of_pairs
from storage.latents import LatentSet
from storage.parts import content_digest
from storage.workspace import Workspace

DIGESTS = st.integers(0, 5).map(lambda number: bytes([number] * 31 + [number % 3]).hex())  # some end in zeros
RECORDS = st.dictionaries(st.sampled_from("abcdefgh"), st.sets(DIGESTS, max_size=4), max_size=6)


def record(part: str, digests: Sequence[str]) -> dict[str, Any]:
    """As much of a part's record as a table reads."""
    images = [
        {
            "digest": name,
            "content": digest([part, name]),
            "height": 3,
            "width": 5,
            "shape": [2, 1, 7],
            "bits_y": float(ord(part)),
            "bits_z": 0.5,
            "squared_error": 0.25,
        }
        for name in digests
    ]
    return {"part": part, "images": images}


def again(table: ImageTable) -> ImageTable:
    return ImageTable.from_bytes(table.parts, bytes(table.to_bytes()))


@given(RECORDS, st.sets(st.sampled_from("abcdefgh")), st.lists(DIGESTS))
def test_a_table_is_the_dictionary_of_first_parts(
    parts: dict[str, set[str]], only: set[str], wanted: list[str]
) -> None:
    records = [record(part, sorted(digests)) for part, digests in parts.items()]
    half = len(records) // 2
    table = ImageTable().extended(records[:half]).extended(records[half:])
    for found, kept in (
        (table, parts),
        (again(table.only(only)), only & parts.keys()),
    ):
        expected: dict[str, Row] = {}
        for part in sorted(kept):
            for name in parts[part]:
                expected.setdefault(
                    name, Row(part, digest([part, name]), float(ord(part)), 0.5, 0.25, 15, 14)
                )
        assert list(found.items()) == sorted(expected.items())
        rows = found.find(wanted)
        assert [row >= 0 for row in rows] == [name in expected for name in wanted]
        there = [name for name in wanted if name in expected]
        assert found.total("bits_y", rows[rows >= 0]) == sum(expected[name].bits_y for name in there)
        assert list(found.contents(rows[rows >= 0])) == [(name, expected[name].content) for name in there]
        assert sorted(found.parts) == sorted(kept)


@given(st.lists(st.tuples(st.text(), st.text())))
def test_pairs_have_the_digest_of_their_list(pairs: list[tuple[str, str]]) -> None:
    assert digest_of_pairs(iter(pairs)) == digest(pairs)


@pytest.fixture
def compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentSet:
    """A set of which a table covers three parts of four; the fourth holds one of their images again."""
    monkeypatch.setattr(storage.latents, "COMPACT_FROM", 3)
    stored = LatentSet(Workspace.open(str(tmp_path)), KEY)
    for number in range(2):
        stored.write_part("0", [latents(number)])
    stored.compact()
    assert tables(stored) == []  # two are few
    stored.write_part("0", [latents(2)])
    stored.compact()
    stored.compact()
    assert len(tables(stored)) == 1
    stored.write_part("1", [latents(0), latents(3)])
    return stored


def tables(stored: LatentSet) -> list[Path]:
    return list(Path(stored.workspace.root, "latents", KEY).glob("table-*/*"))


def fresh(stored: LatentSet) -> LatentSet:
    return LatentSet(stored.workspace, KEY)


def test_a_compacted_set_is_the_set_of_its_records(
    compacted: LatentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [latents(number).digest for number in range(4)]
    with monkeypatch.context() as patch:
        read: list[str] = []
        body = LatentSet.record
        patch.setattr(LatentSet, "record", lambda self, part: read.append(part) or body(self, part))
        found = fresh(compacted).images()
        assert [part[0] for part in read] == ["1"]  # the others' records were not read
    (table,) = tables(compacted)
    whole = table.read_bytes()
    for change in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:108], b""):
        table.write_bytes(change)
        assert dict(fresh(compacted).images()) == dict(found)
    table.unlink()
    assert dict(fresh(compacted).images()) == dict(found)
    next(Path(compacted.workspace.root, "records/latents", KEY, "tables").iterdir()).write_bytes(b"")
    assert dict(fresh(compacted).images()) == dict(found)
    assert sorted(found) == sorted(names)


def test_a_withdrawn_part_does_not_come_back_from_a_table(compacted: LatentSet) -> None:
    for part in fresh(compacted).part_names("0"):
        compacted.retire(part, "a test")
    assert fresh(compacted).missing([latents(number).digest for number in range(4)]) == [
        latents(1).digest,
        latents(2).digest,
    ]


def test_a_newer_table_takes_the_place_of_the_older(compacted: LatentSet) -> None:
    (older,) = tables(compacted)
    for number in (4, 5):
        compacted.write_part("1", [latents(number)])
    compacted.compact()
    (newer,) = tables(compacted)
    assert newer != older
    assert len(fresh(compacted).images()) == 6


def test_who_knows_a_prefix_reads_no_other_record(compacted: LatentSet) -> None:
    names = [latents(number).digest for number in range(4)]
    one = fresh(compacted)
    compacted.write_part("10", [latents(7)])
    Path(
        one.workspace.root, "records/latents", KEY, "parts/wide", f"{one.part_names('0')[0]}.json"
    ).write_text("torn")
    assert one.missing([*names, latents(7).digest], "101") == [names[1], names[2]]
    assert len(one.part_names("1")) == len(one.part_names("10")) == 2
    assert len(one.part_names("0")) == 3


def test_narrow_buckets_lie_on_shelves(tmp_path: Path) -> None:
    stored = LatentSet(Workspace.open(str(tmp_path)), KEY)
    for prefix, number in (
        ("0", 1),
        ("0" * 11, 2),
        ("0" * 12, 3),
        ("0" * 20, 4),
        ("0" * 11 + "1", 5),
        ("1" * 20, 6),
    ):
        stored.write_part(prefix, [latents(number)])
    records = Path(tmp_path, "records/latents", KEY, "parts")
    assert sorted(path.name for path in records.iterdir()) == ["000", "001", "fff", "wide"]
    assert len(stored.images()) == 6
    torn = next((records / "fff").iterdir())
    torn.write_text("torn")
    names = [latents(number).digest for number in range(1, 7)]
    assert stored.missing(names, "0" * 14) == names[4:]
    assert stored.missing(names, "0" * 32) == names[4:]
    assert stored.missing(names, "0" * 11) == names[5:]


def test_a_part_made_again_under_its_name_is_not_taken_for_the_old_one(compacted: LatentSet) -> None:
    """Who moves a record away, as errors advise, gets a part of the same name."""
    part = fresh(compacted).images()[latents(1).digest].part
    Path(compacted.workspace.path(f"records/{compacted.record_name(part)}.json")).unlink()
    assert fresh(compacted).missing([latents(1).digest]) == [latents(1).digest]
    other = replace(latents(1), indices=-latents(1).indices)
    assert fresh(compacted).write_part("0", [other])["part"] == part
    assert fresh(compacted).images()[other.digest].content == content_digest(other)


def test_records_of_an_older_layout_are_no_parts(compacted: LatentSet) -> None:
    names = fresh(compacted).part_names()
    older = {"attempt": "a", "part": "3-older.0"}
    compacted.workspace.records.create(f"latents/{KEY}/parts/3-older.0", older)
    assert fresh(compacted).part_names() == names
