"""A small codec whose files have everything in them, and files of it that someone has tampered with."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
import torch

from pipeline.bitstream import Header, ImageCoder, container
from pipeline.bitstream.codec_file import METADATA_KEY
from pipeline.codec.artifact import Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.quantizers import settings
from pipeline.quantizers.lloyd import midpoint_tables

N, M = 8, 12
Generator = np.random.Generator


def small_codec(seed: int = 0) -> Codec:
    """Untrained, but loud: two thirds of its indices are not 0, its σ levels vary, some indices escape."""
    network = MeanScaleHyperprior(N, M).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        network.g_a[-1].weight *= 64
        network.h_a[-1].weight *= 16
        network.h_s[-1].bias[:M] = torch.linspace(0.2, 8, M)
    return Codec.from_network(network)


@cache
def small_coder(
    kind: str = "tcq", context: str = "state", seed: int = 0, trellis: str | None = None
) -> ImageCoder:
    """Its coder."""
    chosen = settings(kind, trellis, context=context) if kind == "tcq" else settings(kind)
    return ImageCoder(small_codec(seed), midpoint_tables(chosen))


CODERS: dict[str, Callable[[], ImageCoder]] = {
    **{kind: partial(small_coder, kind) for kind in ("urq", "deadzone", "rdoq")},
    "tcq, vvc8 by quantizer": partial(small_coder, context="quantizer"),
    "tcq, vvc8 by state": small_coder,
    "tcq, ungerboeck32": partial(small_coder, context="quantizer", trellis="ungerboeck32"),
}
"""One of each kind, and of the ways a trellis selects tables."""


def photograph(height: int, width: int) -> npt.NDArray[np.uint8]:
    """The upper left corner of one; beyond its 512 pixels it is mirrored."""
    image = skimage.data.astronaut()
    beyond = [(0, max(0, wanted - side)) for wanted, side in zip((height, width), image.shape, strict=False)]
    return np.ascontiguousarray(np.pad(image, [*beyond, (0, 0)], "symmetric")[:height, :width])


def padded(codec_file: bytes) -> bytes:
    """The same with blanks behind its header, as safetensors allows: other bytes that mean the same."""
    end = 8 + int.from_bytes(codec_file[:8], "little")
    return (end - 8 + 64).to_bytes(8, "little") + codec_file[8:end] + b" " * 64 + codec_file[end:]


def with_metadata(codec_file: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The same arrays behind metadata that have been tampered with.

    Args:
        change: given the metadata's value; what is JSON in a string there is a string.
    """
    end = 8 + int.from_bytes(codec_file[:8], "little")
    header = json.loads(codec_file[8:end])
    metadata = json.loads(header["__metadata__"][METADATA_KEY])
    change(metadata)
    header["__metadata__"][METADATA_KEY] = json.dumps(metadata)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + codec_file[end:]


def with_setting(codec_file: bytes, name: str, value: object) -> bytes:
    """The same with another value for a setting of its quantizer."""

    def change(metadata: dict[str, Any]) -> None:
        tables = json.loads(metadata["tables"])
        tables["settings"][name] = value
        metadata["tables"] = json.dumps(tables)

    return with_metadata(codec_file, change)


def repaired(data: bytes) -> bytes:
    """The same with a checksum that fits."""
    return data[:4] + zlib.crc32(data[8:], zlib.crc32(data[:4])).to_bytes(4, "little") + data[8:]


def with_header(data: bytes, **fields: int) -> bytes:
    """The same streams behind a header that says something else, checksum repaired."""
    return repaired(_with_header(data, **fields))


def _with_header(data: bytes, **fields: int) -> bytes:
    header, hyper, latent = container.parse(data)
    said = replace(header, **fields)
    numbers = (said.height, said.width, said.hyper_bytes, said.latent_bytes)
    varints = b"".join(map(container.varint, numbers))
    return data[:8] + said.codec + varints + hyper + latent


def _flip(data: bytes, rng: Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(8 * len(data), size=rng.integers(1, 9)):
        changed[place >> 3] ^= 1 << (place & 7)
    return bytes(changed)


def _truncate(data: bytes, rng: Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _insert(data: bytes, rng: Generator) -> bytes:
    place = rng.integers(len(data) + 1)
    return data[:place] + rng.bytes(int(rng.integers(1, 40))) + data[place:]


def _remove(data: bytes, rng: Generator) -> bytes:
    place = rng.integers(len(data))
    return data[:place] + data[place + rng.integers(1, 40) :]


def _lie_about_lengths(data: bytes, rng: Generator) -> bytes:
    """Move bytes from one stream to the other, or claim any length at all."""
    header, _, _ = container.parse(data)
    if rng.random() < 0.5:
        moved = int(rng.integers(-header.hyper_bytes, header.latent_bytes))
        lengths = header.hyper_bytes + moved, header.latent_bytes - moved
    else:
        lengths = _any_number(rng), _any_number(rng)
    return _with_header(data, hyper_bytes=lengths[0], latent_bytes=lengths[1])


def _lie_about_size(data: bytes, rng: Generator) -> bytes:
    """By little, which the streams may fit, or by any number at all."""
    header, _, _ = container.parse(data)
    if rng.random() < 0.5:
        return _with_header(data, height=header.height + int(rng.integers(40)))
    return _with_header(data, height=_any_number(rng), width=_any_number(rng))


def _other_version(data: bytes, rng: Generator) -> bytes:
    return data[:3] + rng.bytes(1) + data[4:]


def _noise(data: bytes, rng: Generator) -> bytes:
    """A true header, random streams."""
    header = container.parse(data)[0]
    return data[: header.bytes] + rng.bytes(len(data) - header.bytes)


def _any_number(rng: Generator) -> int:
    return int(2 ** rng.uniform(0, 28)) - int(rng.random() < 0.1)


MUTATIONS: dict[str, Callable[[bytes, Generator], bytes]] = {
    "flipped bits": _flip,
    "truncated": _truncate,
    "bytes inserted": _insert,
    "bytes removed": _remove,
    "lengths lie": _lie_about_lengths,
    "size lies": _lie_about_size,
    "another version": _other_version,
    "random streams": _noise,
}


def mutated(data: bytes, seed: int) -> tuple[str, bytes]:
    """A tampered file and what was done to it; every second seed gives one whose checksum fits."""
    rng = np.random.default_rng(seed)
    kind = list(MUTATIONS)[(seed >> 1) % len(MUTATIONS)]
    changed = MUTATIONS[kind](data, rng)
    if seed & 1:
        return f"{kind}, checksum repaired", repaired(changed) if len(changed) >= 8 else changed
    return kind, changed


def stated_size(data: bytes) -> tuple[int, int]:
    """Height and width as a file's header has them."""
    header: Header = container.parse(data)[0]
    return header.height, header.width
