"""Latent sets: content in is content out, parts count by their records, no damage, kill or full disk goes unseen."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.latents
from storage.buckets import buckets
from storage.errors import StorageFull
from storage.keys import sha256
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage, content_digest, decode, encode
from storage.workspace import Workspace

KEY = "ab" * 32
BUCKET_BITS = 5
GOLDEN = "55c914e2b830367b69aa7576016db387087a668a2915311a958352ecb387d42b"  # of latents(0)


def latents(number: int, scale: float = 2.0, side: int = 5) -> PartImage:
    """An image's latents, a function of its number."""
    rng = np.random.default_rng(number)
    shape, hyper_shape = (6, side + number % 3, side), (4, 2, 2 + number % 2)
    return PartImage(
        digest=sha256(b"%d" % number),
        height=16 * shape[1] - 3,
        width=16 * shape[2],
        indices=np.rint(rng.laplace(0, scale, shape)).astype(np.int32),
        hyper_indices=np.rint(rng.normal(0, 3, hyper_shape)).astype(np.int32),
        bits_y=float(rng.uniform(1, 100)),
        bits_z=1 / 3,
        squared_error=0.1 + number,
    )


def assert_equal(found: PartImage, expected: PartImage) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.hyper_indices, expected.hyper_indices)
    for name in ("digest", "height", "width", "bits_y", "bits_z", "squared_error"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.fixture
def workspace(place: str) -> Workspace:
    return Workspace.open(place)


def test_part_comes_back(workspace: Workspace) -> None:
    images = [latents(number) for number in range(7)]
    record = LatentSet(workspace, KEY).write_part("3", images, {"device": "cpu"})
    stored = LatentSet(workspace, KEY)
    for found, expected in zip(stored.read_part(record["part"]), images, strict=True):
        assert_equal(found, expected)
        assert found.indices.dtype == np.int8
    assert_equal(stored.read(images[4].digest), images[4])
    assert stored.parts() == {record["part"]: record}
    assert record["note"] == {"device": "cpu"}
    assert record["totals"]["bits_y"] == sum(image.bits_y for image in images)
    assert record["totals"]["bytes"] == sum(
        len(workspace.get(name)) for name in workspace.list(record["group"])
    )
    assert {f"{record['group']}/{entry['name']}" for entry in record["objects"]} == set(
        workspace.list(record["group"])
    )


def test_a_few_lines_of_plain_zarr_read_all_images_of_a_part(tmp_path: Path) -> None:
    """Those that `storage.latents` shows."""
    assert storage.latents.__doc__
    lines = [line[4:] for line in storage.latents.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    workspace = Workspace.open(str(tmp_path))
    images = [latents(number) for number in range(4)]
    record = LatentSet(workspace, KEY).write_part("0", images)
    seen: dict[str, Any] = {"zarr": zarr, "np": np, "workspace": workspace, "record": record}
    exec("\n".join(lines), seen)
    end = 0
    for i, image in enumerate(images):
        (height, width), (h, w), _ = seen["part"]["sizes"][i]
        start, end = end, end + h * w
        np.testing.assert_array_equal(seen["k"][:, start:end].reshape(-1, h, w), image.indices)
        assert bytes(seen["part"]["digests"][i]).hex() == image.digest
        assert (height, width) == (image.height, image.width)


def test_the_group_at_rest(workspace: Workspace) -> None:
    """Format 3, standard codecs with a checksum, and fill values that make what is missing not fit the rest."""
    record = LatentSet(workspace, KEY).write_part("0", [latents(0)])
    for name, dtype, fill in (
        ("nonzero", "uint8", 255),
        ("larger", "uint8", 255),
        ("hyper_indices", "int8", -128),
    ):
        meta = json.loads(workspace.get(f"{record['group']}/{name}/zarr.json"))
        assert (meta["zarr_format"], meta["data_type"], meta["fill_value"]) == (3, dtype, fill)
        assert meta["codecs"][-1] == {"name": "zstd", "configuration": {"level": 13, "checksum": True}}


def test_a_part_of_another_layout_is_refused() -> None:
    objects = encode([latents(0)])
    objects["zarr.json"] = objects["zarr.json"].replace(b'"retrellis_part": 2', b'"retrellis_part": 1')
    with pytest.raises(
        ValueError, match="expected a part of layout 2, found 1: another version of retrellis"
    ):
        decode(objects)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from([1, 127, 128, 129, 32767]),
    st.sampled_from([np.int16, np.int32, np.int64]),
    st.integers(0, 2**32),
)
def test_any_shapes_and_values_come_back(shapes: Sequence[Any], peak: int, dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [
        replace(
            latents(number),
            indices=rng.integers(-peak, peak, (3, *shape), endpoint=True, dtype=dtype)
            * rng.integers(2, size=(3, *shape), dtype=dtype),
            hyper_indices=np.full((2, *shape), -peak, dtype),
        )
        for number, shape in enumerate(shapes)
    ]
    for image, (name, indices, hyper_indices) in zip(images, decode(encode(images)), strict=True):
        assert name == image.digest
        np.testing.assert_array_equal(indices, image.indices)
        np.testing.assert_array_equal(hyper_indices, image.hyper_indices)
        assert hyper_indices.dtype == (np.int8 if peak <= 127 else np.int16)


def test_many_chunks_come_back_and_equal_images_give_equal_bytes() -> None:
    images = [latents(number, scale=40, side=900) for number in range(2)]
    objects = encode(images)
    assert {"nonzero/c/1/0", "magnitudes/c/2", "negative/c/1", "hyper_indices/c/0/0"} <= objects.keys()
    for image, (_, indices, _) in zip(images, decode(objects), strict=True):
        np.testing.assert_array_equal(indices, image.indices)
    assert encode(images) == objects


def test_content_digest_is_that_of_values_and_shapes() -> None:
    image = latents(0)
    assert content_digest(image) == GOLDEN
    assert content_digest(replace(image, indices=np.asfortranarray(image.indices).astype(np.int8))) == GOLDEN
    changed = image.indices.copy()
    changed[0, 0, 0] += 1
    others = [
        replace(image, indices=changed),
        replace(image, indices=image.indices.reshape(6, 1, -1)),
        replace(image, hyper_indices=-image.hyper_indices),
    ]
    assert len({content_digest(other) for other in [image, *others]}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.full((1, 1, 1), -32768)}, "within ±32767, found 32768: use a larger step"),
        ({"hyper_indices": np.full((1, 1, 1), 40_000)}, "within ±32767, found 40000"),
        ({"indices": np.zeros((1, 1, 1))}, r"signed integers \(C, h, w\), found float64"),
        ({"indices": np.zeros((1, 1), np.int32)}, r"found int32 \(1, 1\)"),
        ({"indices": np.zeros((1, 0, 1), np.int32)}, "found int32"),
        (
            {"indices": np.zeros((5, 1, 1), np.int32)},
            r"expected 6 channels as in the first image, found \(5, 1, 1\)",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(workspace: Workspace, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentSet(workspace, KEY).write_part("0", [latents(0), replace(latents(1), **change)])
    assert workspace.list("latents") == []


def test_parts_have_each_image_once(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="each once, found none"):
        LatentSet(workspace, KEY).write_part("0", [])
    with pytest.raises(ValueError, match=f"found {latents(3).digest} twice"):
        LatentSet(workspace, KEY).write_part("0", [latents(1), latents(3), latents(3)])


def test_missing_and_content_follow_the_records(workspace: Workspace) -> None:
    images = [latents(number) for number in range(6)]
    names = [image.digest for image in images]
    stored = LatentSet(workspace, KEY)
    assert stored.missing(names) == names
    stored.write_part("0", images[:2])
    LatentSet(workspace, KEY).write_part("1", images[2:4])
    assert stored.missing(reversed(names)) == [names[5], names[4]]
    with pytest.raises(LatentError, match="latents of 6 images, 2 are missing, such as"):
        stored.content_digest(names)
    stored.write_part("1", images[4:])
    other = LatentSet(workspace, "cd" * 32)
    other.write_part("f", images[::-1])
    assert other.content_digest(names) == stored.content_digest([*names, names[0]])
    assert other.content_digest(names[:5]) != stored.content_digest(names)


def test_an_image_in_two_parts_is_read_from_the_first_by_name(workspace: Workspace) -> None:
    stored = LatentSet(workspace, KEY)
    newer = replace(latents(1), indices=latents(2).indices)
    stored.write_part("b", [latents(1)])
    stored.write_part("a", [newer, latents(0)])
    assert stored.images()[newer.digest].content == content_digest(newer)
    assert_equal(stored.read(newer.digest), newer)


def test_many_images_are_read_in_the_order_asked_for(workspace: Workspace) -> None:
    images = [latents(number) for number in range(6)]
    stored = LatentSet(workspace, KEY)
    for first in (0, 2, 4):
        stored.write_part("0", images[first : first + 2])
    order = [images[number] for number in (5, 0, 4, 4, 1)]
    for found, expected in zip(stored.read_many([image.digest for image in order]), order, strict=True):
        assert_equal(found, expected)
    with pytest.raises(LatentError, match="expected image beef in a part, found none"):
        list(stored.read_many([images[0].digest, "beef"]))


def test_the_loser_of_a_race_adopts_the_winner_and_drops_its_data(workspace: Workspace) -> None:
    images = [latents(0), latents(1)]
    winner = LatentSet(workspace, KEY).write_part("0", images)
    loser = LatentSet(workspace, KEY).write_part("0", [replace(images[1], bits_y=7.0), images[0]])
    assert loser == winner
    assert {name.split("/")[2] for name in workspace.list(f"latents/{KEY}")} == {
        winner["group"].split("/")[2]
    }


def test_a_retired_part_is_written_anew(workspace: Workspace) -> None:
    stored = LatentSet(workspace, KEY)
    first = stored.write_part("0", [latents(0)])
    stored.retire(first["part"], "flipped bit")
    assert stored.missing([latents(0).digest]) == [latents(0).digest]
    with pytest.raises(LatentError, match=f"recorded part '{first['part']}', found none"):
        stored.read_part(first["part"])
    with pytest.raises(LatentError, match="expected a recorded part 'x' to retire"):
        stored.retire("x", "typing error")
    with pytest.raises(LatentError, match="expected image beef in a part, found none"):
        stored.read("beef")
    second = LatentSet(workspace, KEY).write_part("0", [latents(0)])
    assert list(stored.parts()) == [second["part"]] != [first["part"]]
    assert_equal(stored.read(latents(0).digest), latents(0))


def damaged(data: bytes, kind: str) -> bytes:
    """An object's bytes after something happened to them."""
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return {"empty": b"", "truncated": data[:-1], "longer": data + b"\0", "bit flip": flipped}[kind]


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "longer", "bit flip"])
def test_damage_of_every_object_is_noticed_and_named(tmp_path: Path, kind: str) -> None:
    workspace = Workspace.open(str(tmp_path))
    stored = LatentSet(workspace, KEY)
    record = stored.write_part("0", [latents(0), latents(1)])
    for entry in record["objects"]:
        name = f"{record['group']}/{entry['name']}"
        whole = workspace.get(name)
        workspace.remove(name) if kind == "missing" else workspace.put(name, damaged(whole, kind))
        found = "no such object" if kind == "missing" else r"[\d,]+ bytes of SHA-256"
        expected = f"expected {entry['size']:,} bytes of SHA-256 {entry['sha256']}, found {found}"
        with pytest.raises(
            LatentError,
            match=f"part {record['part']} is damaged at {workspace.path(name)}: {expected}.*retire",
        ):
            stored.read(latents(0).digest)
        workspace.put(name, whole)
    assert_equal(stored.read(latents(0).digest), latents(0))


@given(st.sets(st.binary(min_size=32, max_size=32).map(bytes.hex)), st.integers(0, 32))
def test_buckets_share_out_by_leading_bits_in_digest_order(names: set[str], bits: int) -> None:
    shared = buckets([*names, *names], bits)
    assert [name for bucket in sorted(shared) for name in shared[bucket]] == sorted(names)
    for bucket, members in shared.items():
        assert len(bucket) == bits
        assert {f"{int(name, 16):0256b}"[:bits] for name in members} == {bucket}


def test_bucket_bits_have_a_range() -> None:
    with pytest.raises(ValueError, match="expected 0 to 32 bits for the buckets, found 33"):
        buckets([], 33)


def write_missing(root: str, images: int) -> None:
    """What a quantize task does: write the parts that its set does not have."""
    stored = LatentSet(Workspace.open(root), KEY)
    by_name = {latents(number).digest: number for number in range(images)}
    for bucket, names in buckets(stored.missing(by_name), BUCKET_BITS).items():
        stored.write_part(bucket, [latents(by_name[name], side=40) for name in names])


def files_in(root: str) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def test_kill_9_at_any_moment_and_again(tmp_path: Path) -> None:
    root, images, kills, random = str(tmp_path / "killed"), 60, 5, Random(2)
    stored = LatentSet(Workspace.open(root), KEY)
    for _ in range(kills):
        writer = multiprocessing.get_context("spawn").Process(target=write_missing, args=(root, images))
        until = files_in(root) + random.randrange(1, 40)
        writer.start()
        while files_in(root) < until and writer.is_alive():
            time.sleep(0.001)
        writer.kill()
        writer.join()
        for part in stored.parts():
            stored.read_part(part)

    started = {path.name for path in Path(root, "latents", KEY).iterdir()}
    finished = {record["group"].rpartition("/")[2] for record in stored.parts().values()}
    assert finished < started, "no kill fell into the writing of a part"
    write_missing(root, images)
    undisturbed = LatentSet(Workspace.open(str(tmp_path / "undisturbed")), KEY)
    write_missing(str(tmp_path / "undisturbed"), images)
    names = [latents(number).digest for number in range(images)]
    assert stored.content_digest(names) == undisturbed.content_digest(names)
    for part in stored.parts():
        stored.read_part(part)


def test_full_disk_and_again(small_disk: Path, tmp_path: Path) -> None:
    images = [latents(number, scale=30, side=50) for number in range(4)]
    names = [image.digest for image in images]
    stored = LatentSet(Workspace.open(str(small_disk)), KEY)

    def write() -> None:
        for name in stored.missing(names):
            stored.write_part("0", [images[names.index(name)]])

    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    with pytest.raises(
        StorageFull, match=rf"expected room for [\d,]+ bytes of {small_disk}/latents/.*goes on"
    ):
        write()
    finished = stored.parts()
    assert 0 < len(finished) < len(images)
    assert len(list((small_disk / "latents" / KEY).iterdir())) == len(finished)
    ballast.unlink()
    write()
    assert finished.items() <= stored.parts().items()
    undisturbed = LatentSet(Workspace.open(str(tmp_path / "undisturbed")), KEY)
    undisturbed.write_part("1", images)
    assert stored.content_digest(names) == undisturbed.content_digest(names)
    assert not list(small_disk.rglob("*#*"))
