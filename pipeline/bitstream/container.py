"""The file around the streams: at most 32 bytes of header, then the two streams. docs/format.md has the fields.

"RTL"  version  CRC-32  codec  height  width  hyper_bytes  latent_bytes  │ hyper stream │ latent stream
  3       1        4      8     1 … 4   1 … 4     1 … 4        1 … 4
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from pipeline.bitstream.rans import BitstreamError

MAGIC = b"RTL"
VERSION = 1
MAX_PIXELS = 1 << 27
DIGEST_BYTES = 8
_CRC = slice(4, 8)
_FIXED = 16
VARINT_BYTES = 4
_VARINT_LIMIT = 1 << 7 * VARINT_BYTES
_FIELDS = ("height", "width", "hyper_bytes", "latent_bytes")
MAX_BYTES = _FIXED + len(_FIELDS) * VARINT_BYTES + 2 * (_VARINT_LIMIT - 1)
"""Of a whole file."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        codec: the first 8 bytes of the codec file's SHA-256.
        height, width: of the image, pixels; at least 1.
        hyper_bytes, latent_bytes: lengths of the two streams. All four are below 2^28.
        version: of the format.
    """

    codec: bytes
    height: int
    width: int
    hyper_bytes: int
    latent_bytes: int
    version: int = VERSION

    @property
    def bytes(self) -> int:
        """Length of the header itself."""
        return _FIXED + sum(len(varint(getattr(self, name))) for name in _FIELDS)

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.bytes + self.hyper_bytes + self.latent_bytes

    @property
    def bpp(self) -> float:
        """Bits of the whole file per pixel of the image."""
        return 8 * self.file_bytes / (self.height * self.width)


def build(codec: bytes, height: int, width: int, hyper: bytes, latent: bytes) -> bytes:
    """A file.

    Raises:
        ValueError: a side or a stream of 2^28 or more; such files cannot be written.
    """
    values = dict(zip(_FIELDS, (height, width, len(hyper), len(latent)), strict=True))
    for name, value in values.items():
        if value >= _VARINT_LIMIT:
            raise ValueError(
                f"{name}: expected less than {_VARINT_LIMIT}, found {value}: encode smaller tiles"
            )
    body = codec + b"".join(map(varint, values.values())) + hyper + latent
    start = MAGIC + bytes([VERSION])
    return start + zlib.crc32(start + body).to_bytes(4, "little") + body


def parse(data: bytes) -> tuple[Header, bytes, bytes]:
    """Header, hyper stream and latent stream of a file, lengths and checksum verified; dimensions are not.

    Raises:
        BitstreamError: not such a file, of another version, truncated, too long, or damaged.
    """
    if len(data) < len(MAGIC) + 1 or not data.startswith(MAGIC):
        raise BitstreamError(f"not a Retrellis file: expected it to begin with {MAGIC!r}, found {data[:4]!r}")
    if data[3] != VERSION:
        advice = "decode it with a newer release" if data[3] > VERSION else "it is damaged"
        raise BitstreamError(f"expected format version {VERSION}, found {data[3]}: {advice}")
    values, at = [], _FIXED
    for _ in _FIELDS:
        value, at = _read_varint(data, at)
        values.append(value)
    header = Header(data[8:16], *values)
    if len(data) != header.file_bytes:
        kind = "truncated" if len(data) < header.file_bytes else "followed by other bytes"
        raise BitstreamError(
            f"expected {header.file_bytes} bytes by its header, found {len(data)}: {kind}, or its header is damaged"
        )
    expected = int.from_bytes(data[_CRC], "little")
    found = zlib.crc32(data[8:], zlib.crc32(data[:4]))
    if found != expected:
        raise BitstreamError(
            f"expected checksum {expected:08x}, found {found:08x}: damaged, get another copy"
        )
    if not header.height or not header.width:
        raise BitstreamError(f"expected sides of at least 1, found {header.width} × {header.height} pixels")
    middle = at + header.hyper_bytes
    return header, data[at:middle], data[middle:]


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    out = bytearray()
    while value >> 7:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(VARINT_BYTES):
        if at + index >= len(data):
            raise BitstreamError(f"truncated: expected a header of up to 32 bytes, found {len(data)} bytes")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if index and not byte:
                raise BitstreamError("damaged header: expected numbers in as few bytes as they need")
            return value, at + index + 1
    raise BitstreamError(f"damaged header: expected numbers below {_VARINT_LIMIT}, found a longer one")
