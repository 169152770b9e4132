"""What a part of a latent set holds, and its form as one Zarr v3 group: standard codecs, integers only.

indices, hyper_indices    the images' integers one after another, flat; int8 where they fit, else int16
offsets, hyper_offsets    (B + 1,): image i is indices[offsets[i]:offsets[i + 1]]
shapes, hyper_shapes      (B, 3): (C, H/16, W/16) and (N, H/64, W/64), rounded up as the codec pads
digests                   (B, 32) uint8: SHA-256 of the images' pixels
sizes                     (B, 2): height and width in pixels
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from storage.keys import canonical_json

# On Laplace-like latents of order-0 entropy 0.138 of raw: chunks of 2**18 at level 15 take 0.131 and 0.1 s a MB,
# level 19 takes 0.137 and twice the time, level 3 takes 0.183.
CHUNK = 1 << 18
ZSTD_LEVEL = 15

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
        note: JSON values a later stage wants to know without reading the latents, such as the squared error and
            the count of samples per σ level.
    """

    digest: str
    height: int
    width: int
    indices: Integers
    hyper_indices: Integers
    bits_y: float
    bits_z: float
    note: Mapping[str, Any] = field(default_factory=dict)


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
        ValueError: an array has another number of dimensions, or a value beyond ±32767.
    """
    objects: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(objects), attributes={"retrellis_part": 1})
    for prefix, arrays in (
        ("", [image.indices for image in images]),
        ("hyper_", [image.hyper_indices for image in images]),
    ):
        _add(group, f"{prefix}indices", _flat(arrays, [image.digest for image in images]))
        _add(group, f"{prefix}offsets", np.cumsum([0] + [array.size for array in arrays], dtype=np.int64))
        _add(group, f"{prefix}shapes", np.array([array.shape for array in arrays], np.int32))
    digests = b"".join(bytes.fromhex(image.digest) for image in images)
    _add(group, "digests", np.frombuffer(digests, np.uint8).reshape(-1, 32))
    _add(group, "sizes", np.array([(image.height, image.width) for image in images], np.int32))
    return {name: buffer.to_bytes() for name, buffer in sorted(objects.items())}


def decode(objects: Mapping[str, bytes]) -> list[tuple[str, Integers, Integers]]:
    """Back from the objects of a group, all present and verified: (digest, indices, hyper indices) of each image."""
    prototype = default_buffer_prototype()
    buffers = {name: prototype.buffer.from_bytes(data) for name, data in objects.items()}
    group = zarr.open_group(MemoryStore(buffers), mode="r", zarr_format=3)  # version 2 knows pickle
    arrays = {name: np.asarray(array[...]) for name, array in group.arrays()}
    return [
        (
            bytes(name).hex(),
            _image(arrays["indices"], arrays["offsets"], arrays["shapes"], row),
            _image(arrays["hyper_indices"], arrays["hyper_offsets"], arrays["hyper_shapes"], row),
        )
        for row, name in enumerate(arrays["digests"])
    ]


def _flat(arrays: Sequence[Integers], digests: Sequence[str]) -> Integers:
    """All values one after another, in the narrower dtype that holds them without its minimum, the fill value."""
    largest = 0
    for array, digest in zip(arrays, digests, strict=True):
        if array.ndim != 3 or array.size == 0 or not np.issubdtype(array.dtype, np.signedinteger):
            raise ValueError(
                f"image {digest}: expected signed integers (C, h, w), found {array.dtype} {array.shape}"
            )
        peak = max(int(array.max()), -int(array.min()))
        if peak > np.iinfo(np.int16).max:
            raise ValueError(
                f"image {digest}: expected indices within ±32767, found {peak}: use a larger step"
            )
        largest = max(largest, peak)
    dtype = np.int8 if largest <= np.iinfo(np.int8).max else np.int16
    return np.concatenate([array.ravel() for array in arrays]).astype(dtype)


def _add(group: zarr.Group, name: str, data: npt.NDArray[Any]) -> None:
    signed = np.issubdtype(data.dtype, np.signedinteger)
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(min(len(data), CHUNK), *data.shape[1:]),
        compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=True)],
        fill_value=int(np.iinfo(data.dtype).min) if signed else 0,
        config={"write_empty_chunks": True},
    )
    array[...] = data


def _image(flat: Integers, offsets: Integers, shapes: Integers, row: int) -> Integers:
    image: Integers = flat[offsets[row] : offsets[row + 1]].reshape(shapes[row])
    return image
