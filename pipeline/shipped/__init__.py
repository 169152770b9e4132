"""The codecs that come with the project: five rates of the mean-scale hyperprior, N = 64, as trained and finetuned.

As trained each is a codec file, codec and tuned VVC-8 tables, slimmed and packed by xz; experiments start from it.
Finetuned it has another g_s and tables of 256 states, which alone lie here beside it; `encode` takes it.
docs/codecs.md says how they were trained; experiments/ship_codecs.py puts them here.
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
    """What is known of a codec before it is unpacked: its λ, the SHA-256 of its codec file, and of what lies packed."""

    lmbda: float
    digest: str
    packed: str


def _listed(name: str) -> dict[int, Shipped]:
    listed = json.loads((FOLDER / name).read_text())
    return {quality: Shipped(**entry) for quality, entry in enumerate(listed, 1)}


SHIPPED = _listed("digests.json")  # by quality, from 1 for the lowest rate
FINETUNED = _listed("decoders.json")


def path(quality: int) -> Path:
    """The packed file of a quality, as trained.

    Raises:
        ValueError: there is no such quality.
    """
    if quality not in SHIPPED:
        raise ValueError(f"expected a quality from 1 to {len(SHIPPED)}, found {quality}")
    return FOLDER / f"quality-{quality}.safetensors.xz"


def decoder_path(quality: int) -> Path:
    """The packed file of a quality's finetuned decoder. Raises as `path` does."""
    return path(quality).with_name(f"decoder-{quality}.safetensors.xz")


def codec_file(quality: int) -> bytes:
    """The slim codec file of a quality, as trained (see `pipeline.bitstream.codec_file`).

    Raises:
        ValueError: there is no such quality, or its file is damaged.
    """
    return _read(path(quality), SHIPPED[quality].packed)


def decoder_file(quality: int) -> bytes:
    """What `with_decoder` of `pipeline.bitstream.codec_file` makes of it the finetuned one. Raises as `codec_file`."""
    return _read(decoder_path(quality), FINETUNED[quality].packed)


def _read(file: Path, expected: str) -> bytes:
    try:
        packed = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{file}: expected what comes with Retrellis ({error.strerror}): install it again"
        ) from error
    found = hashlib.sha256(packed).hexdigest()
    if found != expected:
        raise ValueError(f"{file}: expected the bytes {expected[:16]}, found {found[:16]}: install it again")
    return unpack(packed)


def pack(data: bytes) -> bytes:
    """A slim codec file of bfloat16 weights, or a part of one, as an xz file."""
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


def named(codec: str) -> int | None:
    """The quality that `quality-1` … names, None for other words."""
    return {f"quality-{quality}": quality for quality in SHIPPED}.get(codec)


def find(identity: bytes) -> tuple[int, bool] | None:
    """Whose codec file's SHA-256 begins with these bytes, as an image file's header names it.

    Returns:
        the quality, and whether its decoder is the finetuned one; None where it is another's.
    """
    for finetuned, codecs in ((True, FINETUNED), (False, SHIPPED)):
        for quality, codec in codecs.items():
            if codec.digest.startswith(identity.hex()):
                return quality, finetuned
    return None
