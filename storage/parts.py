"""What a part of a latent set holds, and its form as one Zarr v3 group: standard codecs, integers only.

Images lie side by side, channel by channel, each in raster order: (C, P), where P counts the positions of all. Of an
index only what is needed is kept, in this order of places, so that general compressors come near to an entropy coder:

nonzero         (C, ceil(P / 8)) uint8: a bit for each index, set if it is not 0 (NumPy's packbits, row by row)
larger          a bit for each of those, packed: its magnitude is 2 or more
negative        a bit for each of those, packed: its sign
magnitudes      of the larger ones, less 2: uint8 where all indices fit int8, else uint16
hyper_indices   (N, P'), int8 where they fit, else int16
sizes           (B, 3, 2): height and width of each image, in pixels, in positions of `nonzero` and of `hyper_indices`
digests         (B, 32) uint8: SHA-256 of the images' pixels
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Zstd
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from storage.keys import canonical_json

LAYOUT = 2
CHUNK_BYTES = 1 << 18  # zstd has other, better parameters up to this size
ZSTD_LEVEL = 13  # one percent more than 15 in two thirds of the time (benchmarks/latent_layouts.txt)
ARRAYS = ("nonzero", "larger", "negative", "magnitudes", "hyper_indices", "sizes", "digests")
AT_ONCE = 1 << 17  # indices that are put in their places at once, so that caches hold them

_ZSTD = Zstd()

Integers = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no one truth of equality
class PartImage:
    """One image's quantized latents.

    Attributes:
        digest: SHA-256 of its canonical pixels, 64 hex digits.
        height: of the image, in pixels; `width` likewise.
        indices: shape (C, h, w), integers within ±32767.
        hyper_indices: shape (N, h', w'), integers within ±32767.
        bits_y: rate of `indices`, in bits; `bits_z` that of `hyper_indices`.
        squared_error: Σ(ŷ − y)² over all latents.
    """

    digest: str
    height: int
    width: int
    indices: Integers
    hyper_indices: Integers
    bits_y: float
    bits_z: float
    squared_error: float


def content_digest(image: PartImage) -> str:
    """SHA-256 over shapes and values of an image's integers, whatever their dtype and the part they lie in."""
    hasher = hashlib.sha256()
    for array in (image.indices, image.hyper_indices):
        hasher.update(canonical_json(list(array.shape)))
        hasher.update(np.ascontiguousarray(array, "<i2").data)
    return hasher.hexdigest()


def encode(images: Sequence[PartImage]) -> dict[str, bytes]:
    """The objects of a Zarr group by name, relative to the group; the same bytes for the same images.

    Raises:
        ValueError: an array has another number of dimensions or channels, or a value beyond ±32767.
    """
    digests = [image.digest for image in images]
    indices = _side_by_side([image.indices for image in images], digests)
    hyper_indices = _side_by_side([image.hyper_indices for image in images], digests)
    sizes = [((i.height, i.width), i.indices.shape[1:], i.hyper_indices.shape[1:]) for i in images]
    objects: dict[str, Buffer] = {}
    with zarr.config.set({"json_indent": None}):
        group = zarr.create_group(MemoryStore(objects), attributes={"retrellis_part": LAYOUT})
        for name, array in _planes(indices).items():
            _add(group, name, array)
        _add(group, "hyper_indices", hyper_indices)
        _add(group, "sizes", np.array(sizes, np.int32))
        _add(group, "digests", np.array([list(bytes.fromhex(digest)) for digest in digests], np.uint8))
    return {name: buffer.to_bytes() for name, buffer in sorted(objects.items())}


def decode(objects: Mapping[str, bytes]) -> list[tuple[str, Integers, Integers]]:
    """Back from the objects of a group, all present and verified: (digest, indices, hyper indices) of each image.

    Raises:
        ValueError: the group has another layout than this version's.
    """
    group = json.loads(objects.get("zarr.json", b"{}"))
    if (found := group.get("attributes", {}).get("retrellis_part")) != LAYOUT:
        raise ValueError(
            f"expected a part of layout {LAYOUT}, found {found}: another version of retrellis has made it"
        )
    arrays = {name: _array(objects, name) for name in ARRAYS}
    names = [bytes(row).hex() for row in arrays["digests"]]
    sizes = arrays["sizes"]
    indices = _apart(_integers(arrays, int(sizes[:, 1].prod(axis=1).sum())), sizes[:, 1])
    hyper_indices = _apart(arrays["hyper_indices"], sizes[:, 2])
    return list(zip(names, indices, hyper_indices, strict=True))


def integer_bytes(arrays: Sequence[Integers]) -> int:
    """What these arrays take as int8 if all fit, else as int16, in bytes."""
    largest = max(_peak(array) for array in arrays)
    return sum(array.size for array in arrays) * _dtype(largest).itemsize


def _side_by_side(arrays: Sequence[Integers], digests: Sequence[str]) -> Integers:
    """(C, P) of arrays (C, h, w), in the narrower dtype that holds them without its minimum, the fill value."""
    channels = arrays[0].shape[:1]
    for array, digest in zip(arrays, digests, strict=True):
        if array.ndim != 3 or array.size == 0 or not np.issubdtype(array.dtype, np.signedinteger):
            raise ValueError(
                f"image {digest}: expected signed integers (C, h, w), found {array.dtype} {array.shape}"
            )
        if (peak := _peak(array)) > np.iinfo(np.int16).max:
            raise ValueError(
                f"image {digest}: expected indices within ±32767, found {peak}: use a larger step"
            )
        if array.shape[:1] != channels:
            raise ValueError(
                f"image {digest}: expected {channels[0]} channels as in the first image, found {array.shape}"
            )
    dtype = _dtype(max(_peak(array) for array in arrays))
    return np.concatenate([array.reshape(len(array), -1).astype(dtype) for array in arrays], axis=1)


def _apart(indices: Integers, sizes: npt.NDArray[np.int32]) -> Iterator[Integers]:
    """Each image's (C, h, w) of all images' (C, P)."""
    ends = np.cumsum(sizes.prod(axis=1))[:-1]
    for image, (height, width) in zip(np.split(indices, ends, axis=1), sizes, strict=True):
        yield image.reshape(-1, height, width)


def _planes(indices: Integers) -> dict[str, npt.NDArray[Any]]:
    """What is kept of indices (C, P)."""
    nonzero = indices != 0
    values = indices[nonzero]
    magnitudes = np.abs(values)
    larger = magnitudes > 1
    return {
        "nonzero": np.packbits(nonzero, axis=1),
        "larger": np.packbits(larger),
        "negative": np.packbits(values < 0),
        "magnitudes": (magnitudes[larger] - 2).astype(f"u{indices.itemsize}"),
    }


def _integers(planes: Mapping[str, npt.NDArray[Any]], positions: int) -> Integers:
    """Indices (C, P) of what was kept of them."""
    magnitudes = planes["magnitudes"]
    dtype = np.dtype(np.int8 if magnitudes.dtype == np.uint8 else np.int16)
    larger = np.unpackbits(planes["larger"])
    places = np.flatnonzero(larger.view(bool))
    values: Integers = larger.view(np.int8).astype(dtype, copy=False)
    values += 1
    values[places] = magnitudes.astype(dtype) + 2
    minus = np.unpackbits(planes["negative"]).view(np.int8)
    np.negative(minus, out=minus)
    values ^= minus  # the two's complement where it is -1
    values -= minus
    nonzero, begin = planes["nonzero"], 0
    indices = np.zeros((len(nonzero), positions), dtype)
    rows = max(1, AT_ONCE // positions)
    for first in range(0, len(nonzero), rows):
        bits = np.unpackbits(nonzero[first : first + rows], axis=1, count=positions)
        places = np.flatnonzero(bits.view(bool))  # four times as fast as to assign through the mask
        end = begin + len(places)
        indices[first : first + rows].reshape(-1)[places] = values[begin:end]
        begin = end
    return indices


def _array(objects: Mapping[str, bytes], name: str) -> npt.NDArray[Any]:
    """An array of a group, in chunks of whole rows; what Zarr itself reads, in a fifth of the time."""
    about = json.loads(objects[f"{name}/zarr.json"])
    shape, chunk = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    dtype = np.dtype(about["data_type"]).newbyteorder("<")
    tail = "/0" * (len(shape) - 1)
    chunks = [
        np.frombuffer(_ZSTD.decode(objects[f"{name}/c/{number}{tail}"]), dtype).reshape(chunk)
        for number in range(-(-shape[0] // chunk[0]))
    ]
    if len(chunks) == 1:
        return chunks[0][: shape[0]]
    return np.concatenate([np.empty((0, *chunk[1:]), dtype), *chunks])[: shape[0]]


def _peak(array: Integers) -> int:
    return max(int(array.max()), -int(array.min()))


def _dtype(peak: int) -> np.dtype[np.signedinteger[Any]]:
    return np.dtype(np.int8 if peak <= np.iinfo(np.int8).max else np.int16)


def _add(group: zarr.Group, name: str, data: npt.NDArray[Any]) -> None:
    """An array in chunks of whole rows. What is missing of bits reads as set, so that the count of values is wrong."""
    rows = max(1, CHUNK_BYTES // max(1, data[:1].nbytes))
    signed = np.issubdtype(data.dtype, np.signedinteger)
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(max(1, min(len(data), rows)), *data.shape[1:]),
        compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=True)],
        fill_value=int(np.iinfo(data.dtype).min if signed else np.iinfo(data.dtype).max),
        config={"write_empty_chunks": True},
    )
    array[...] = data
