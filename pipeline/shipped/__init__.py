"""The codecs that come with the project: five rates of the mean-scale hyperprior, N = 64.

Each is a codec file, codec and tuned VVC-8 tables, slimmed and packed by xz. docs/codecs.md says how they were trained,
and experiments/ship_codecs.py puts them here.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
XZ_MAGIC = b"\xfd7zXZ\x00"
DEFAULT_QUALITY = 3
XZ_FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 1, "pb": 1}  # for numbers of two bytes
MAX_BYTES = 1 << 30  # of what is unpacked


class Shipped(NamedTuple):
    """What is known of a codec before it is unpacked: its λ, the SHA-256 of its codec file, and of that packed."""

    lmbda: float
    digest: str
    packed: str


def _listed() -> dict[int, Shipped]:
    listed = json.loads((FOLDER / "digests.json").read_text())
    return {quality: Shipped(**entry) for quality, entry in enumerate(listed, 1)}


SHIPPED = _listed()  # by quality, from 1 for the lowest rate


def path(quality: int) -> Path:
    """The packed file of a quality.

    Raises:
        ValueError: there is no such quality.
    """
    if quality not in SHIPPED:
        raise ValueError(f"expected a quality from 1 to {len(SHIPPED)}, found {quality}")
    return FOLDER / f"quality-{quality}.safetensors.xz"


def codec_file(quality: int) -> bytes:
    """The slim codec file of a quality (see `pipeline.bitstream.codec_file`).

    Raises:
        ValueError: there is no such quality, or its file is damaged.
    """
    file = path(quality)
    packed = file.read_bytes()
    found, expected = hashlib.sha256(packed).hexdigest(), SHIPPED[quality].packed
    if found != expected:
        raise ValueError(f"{file}: expected the bytes {expected[:16]}, found {found[:16]}: install it again")
    return unpack(packed)


def pack(data: bytes) -> bytes:
    """A slim codec file of bfloat16 weights as an xz file."""
    return lzma.compress(data, filters=[XZ_FILTER])


def unpack(data: bytes) -> bytes:
    """What an xz file holds; other bytes as they are. Raises ValueError."""
    if not data.startswith(XZ_MAGIC):
        return data
    decompressor = lzma.LZMADecompressor()
    try:
        unpacked = decompressor.decompress(data, MAX_BYTES)
    except lzma.LZMAError as error:
        raise ValueError(f"expected an .xz file, found {len(data):,} damaged bytes ({error})") from error
    if not decompressor.eof:
        what = "the end is missing" if decompressor.needs_input else f"more than {MAX_BYTES:,} bytes in it"
        raise ValueError(f"expected a whole .xz file, found {len(data):,} bytes: {what}")
    return unpacked


def quality_of(identity: bytes) -> int | None:
    """The quality whose codec file's SHA-256 begins with these bytes, as an image file's header names it."""
    return next((q for q, codec in SHIPPED.items() if codec.digest.startswith(identity.hex())), None)
