"""The image store: shards are deterministic and readable by others, known files are known, damage is noticed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import WebDataset

from storage.errors import StorageFull
from storage.images import ImageError, ImageStore, Source, image_set_digest, pixel_digest
from storage.workspace import Workspace


def pictures(count: int, seed: int = 0, side: int = 9) -> dict[str, np.ndarray]:
    """Random pixels by digest, each of another size."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (side + n, side + 2 * n, 3), np.uint8) for n in range(count)]
    return {pixel_digest(image): image for image in images}


def sources(images: dict[str, np.ndarray], folder: str = "photos") -> list[Source]:
    return [
        Source(f"{folder}/{n}.png", 10 + n, 100 + n, {"scale": 0.5}, digest=d) for n, d in enumerate(images)
    ]


@pytest.fixture
def workspace(place: str) -> Workspace:
    return Workspace.open(place)


def test_golden_digests() -> None:
    """These name images in users' workspaces: if one changes, all is computed again."""
    assert (
        pixel_digest(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
        == "72b89391e2e204799c9365dbbf936cdd0bcaf45b3c61eadf6839e3e69b5cd03d"
    )
    assert (
        image_set_digest(["b", "a", "b"])
        == image_set_digest(["a", "b"])
        == "0473ef2dc0d324ab659d3580c1134e9d812035905c4781fdd6d529b0c6860e13"
    )


def test_pixel_digest_tells_shapes_apart_and_not_memory_orders() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    assert pixel_digest(np.asfortranarray(pixels)) == pixel_digest(pixels)
    assert pixel_digest(pixels.reshape(6, 4, 3)) != pixel_digest(pixels)
    for other in (pixels.astype(np.int16), pixels[..., 0], pixels[..., :2], pixels[:0]):
        with pytest.raises(ValueError, match=r"expected pixels uint8 \(H, W, 3\), found"):
            pixel_digest(other)


def test_images_come_back_and_a_user_reads_the_shard_with_plain_webdataset(
    workspace: Workspace, tmp_path: Path
) -> None:
    images = pictures(5)
    record = ImageStore(workspace).write_shard(images, sources(images))
    store = ImageStore(workspace)
    for name, pixels in images.items():
        np.testing.assert_array_equal(store.read(name), pixels)
        assert (store.index().images[name].height, store.index().images[name].width) == pixels.shape[:2]

    for found, pixels in zip(ImageStore(workspace).read_many(images), images.values(), strict=True):
        np.testing.assert_array_equal(found, pixels)
    (tmp_path / "shard.tar").write_bytes(workspace.get(record["object"]))
    dataset = WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False)
    theirs = {sample["__key__"]: np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in dataset}
    assert list(theirs) == list(images)
    for name, pixels in images.items():
        np.testing.assert_array_equal(theirs[name], pixels)


def test_known_images_are_not_stored_again_and_sources_are_aliases(workspace: Workspace) -> None:
    images = pictures(4)
    names = list(images)
    ImageStore(workspace).write_shard({name: images[name] for name in names[:2]}, sources(images)[:2])
    store = ImageStore(workspace)
    record = store.write_shard(images, sources(images, "copies"))
    assert [entry["digest"] for entry in record["images"]] == names[2:]
    nothing = store.write_shard({}, [replace(sources(images)[0], path="third.png")])
    assert (nothing["object"], nothing["images"], nothing["bytes"]) == (None, [], 0)
    assert len(workspace.list("images")) == 2
    assert len(store.index().sources) == 7
    assert store.index().sources["third.png", 10, 100, sources(images)[0].key[3]].digest == names[0]


def test_skipped_files_keep_their_reason_and_the_newest_record_counts(workspace: Workspace) -> None:
    images = pictures(1)
    good = sources(images)[0]
    bad = replace(good, digest=None, reason="truncated")
    for source, given in ((bad, {}), (good, images), (bad, {})):
        ImageStore(workspace).write_shard(given, [source])
        assert ImageStore(workspace).index().sources == {good.key: source}
    for other in (replace(good, settings={"scale": 1.0}), replace(good, mtime_ns=0), replace(good, size=0)):
        assert other.key not in ImageStore(workspace).index().sources


def test_a_source_without_an_outcome_is_refused(workspace: Workspace) -> None:
    images = pictures(1)
    with pytest.raises(ValueError, match=r"known image for photos/0\.png, found neither"):
        ImageStore(workspace).write_shard({}, sources(images))
    assert workspace.list("records") == []


def test_shards_are_equal_byte_for_byte(tmp_path: Path) -> None:
    images = pictures(3)
    records = []
    for name in ("one", "two"):
        workspace = Workspace.open(str(tmp_path / name))
        records.append(ImageStore(workspace).write_shard(images, sources(images, name)))
        assert workspace.get(records[-1]["object"]) == Workspace.open(str(tmp_path / "one")).get(
            records[0]["object"]
        )
    assert records[0]["object"] == records[1]["object"]


def test_unknown_image(workspace: Workspace) -> None:
    with pytest.raises(ImageError, match="image feed is unknown: expected a record"):
        ImageStore(workspace).read("feed")


def damage(data: bytes, entry: dict[str, Any], kind: str) -> bytes | None:
    """The shard with one image's bytes damaged; None deletes it."""
    start, size = entry["offset"], entry["size"]
    torn = {
        "missing": None,
        "empty": b"",
        "cut before": data[: start - 1],
        "cut inside": data[: start + size // 2],
    }
    if kind in torn:
        return torn[kind]
    if kind == "another image":
        stream = io.BytesIO()
        Image.new("RGB", (3, 3)).save(stream, "PNG")
        replacement = stream.getvalue().ljust(size, b"\0")
    else:
        flipped = start + (size // 2 if kind == "bit flip" else 0)
        return data[:flipped] + bytes([data[flipped] ^ 4]) + data[flipped + 1 :]
    return data[:start] + replacement + data[start + size :]


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "empty",
        "cut before",
        "cut inside",
        "another image",
        "bit flip",
        "bit flip in the signature",
    ],
)
def test_damage_is_noticed_and_named(workspace: Workspace, kind: str) -> None:
    images = pictures(3)
    record = ImageStore(workspace).write_shard(images, sources(images))
    shard, entry = record["object"], record["images"][1]
    broken = damage(workspace.get(shard), entry, kind)
    workspace.remove(shard) if broken is None else workspace.put(shard, broken)
    place = f"{workspace.path(shard)}, {entry['size']} bytes from"
    message = f"image {entry['digest']} cannot be read from shard {place} .*backup"
    with pytest.raises(ImageError, match=message):
        ImageStore(workspace).read(entry["digest"])


def test_only_an_images_own_bytes_are_read(workspace: Workspace) -> None:
    images = pictures(3)
    record = ImageStore(workspace).write_shard(images, sources(images))
    shard, entry = record["object"], record["images"][1]
    data = workspace.get(shard)
    workspace.put(shard, bytes(entry["offset"]) + data[entry["offset"] : entry["offset"] + entry["size"]])
    np.testing.assert_array_equal(ImageStore(workspace).read(entry["digest"]), images[entry["digest"]])


def test_pixels_beyond_pillows_limit_for_strangers_files(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(1)
    ImageStore(workspace).write_shard(images, sources(images))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    np.testing.assert_array_equal(ImageStore(workspace).read(*images), *images.values())


def test_full_disk_records_nothing(small_disk: Path) -> None:
    workspace = Workspace.open(str(small_disk))
    images = pictures(1, side=500)
    with pytest.raises(StorageFull, match=r"expected room for 7\d\d,\d{3} bytes of .*\.tar"):
        ImageStore(workspace).write_shard(images, sources(images))
    assert ImageStore(workspace).index().images == {}
    images = pictures(1, side=50)
    ImageStore(workspace).write_shard(images, sources(images))
    assert list(ImageStore(workspace).index().images) == list(images)
