"""Canonical pixels: any usable image file becomes RGB, 8 bits, upright, over white.

Samples are taken as sRGB: colour profiles are not applied. Of animations and multi-page files the first frame counts.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
# Below Pillow's own limit against decompression bombs (about 2**27.4), so that ours is the one that speaks.
MAX_PIXELS = 2**27
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
ORIENTATION_TAG = 0x0112
TIFF_BITS_TAG, TIFF_PHOTOMETRIC_TAG = 258, 262
BLACK_IS_ZERO = 1
STRIP_ROWS = 256
# Pillow reduces 16-bit colour to its high bytes. Read with the opposite byte order it gives the low bytes.
# LA has no such twin, but its four bytes a pixel can be read as they are.
NATIVE_TWIN = "16B" if sys.byteorder == "little" else "16L"
LOW_BYTES = {
    f"{mode};{order}": f"{mode};{twin}"
    for mode in ("RGB", "RGBA")
    for order, twin in (("16B", "16L"), ("16L", "16B"), ("16N", NATIVE_TWIN))
}
LA_16, LA_16_BYTES = "LA;16B", "RGBA"
# What Pillow's decoders raise on damaged data.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


class UnusableImage(Exception):
    """A file that gives no pixels.

    Attributes:
        reason: why, in words for the user.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def canonical_pixels(data: bytes, scale: float = 1.0, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image file to RGB8.

    EXIF orientation is applied, transparency goes over white, grey is repeated, 16 bits v become 8 as
    (255 v + 32767) // 65535, after any transparency. CMYK, floating point and 32-bit samples are refused, since
    without a profile or range their colours are a guess.

    Args:
        data: a PNG, JPEG, WebP or TIFF file.
        scale: Lanczos-resize both sides by this factor, in (0, 1]; sides are rounded, at least 1.
        max_pixels: refuse, before decoding, what has more.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UnusableImage: no image of these formats, damaged, truncated, too large, or of an unsupported mode.
        ValueError: a scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise ValueError(f"expected a scale in (0, 1], found {scale}")
    with _reasons():
        image = _open(data, max_pixels)
        samples = _samples(image, data)
        pixels = _upright(_to_rgb8(samples), image.getexif().get(ORIENTATION_TAG, 1))
    if scale == 1:
        return np.ascontiguousarray(pixels)
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS)
    return np.array(resized)


def centre_crop(pixels_HWC: Pixels, side: int, multiple: int) -> Pixels:
    """The middle of an image: at most `side` pixels high and wide, and multiples of `multiple` where it is that large.

    Latents of such a crop need no padding. Not those of the whole image, and near enough to choose settings by.
    """
    window = []
    for length in pixels_HWC.shape[:2]:
        kept = min(length, side)
        kept -= kept % multiple if kept >= multiple else 0
        first = (length - kept) // 2
        window.append(slice(first, first + kept))
    return np.ascontiguousarray(pixels_HWC[tuple(window)])


@contextmanager
def _reasons() -> Iterator[None]:
    """Say in words what Pillow found wrong."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnusableImage("not a PNG, JPEG, WebP or TIFF image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableImage(f"too many pixels: {error}") from error
    except DECODE_ERRORS as error:
        raise UnusableImage(f"truncated or damaged: {error}") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only, and check size and mode."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise UnusableImage(f"{image.width} × {image.height} pixels are more than the limit of {max_pixels}")
    return image


def _samples(image: Image.Image, data: bytes) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """All samples at the file's precision: (H, W, 1, 3 or 4), uint8 or uint16; the last of four is alpha."""
    rawmode = _rawmode(image)
    if image.mode.startswith("I;16") or ";16" in rawmode:
        if "transparency" in image.info:
            raise UnusableImage(
                "16-bit images with a transparent colour are not supported: use an alpha channel"
            )
        return _grey16(image) if image.mode.startswith("I;16") else _colour16(image, data, rawmode)
    if image.mode not in EIGHT_BIT_MODES:
        raise UnusableImage(f"{image.mode} images are not supported: convert to 8 or 16 bit RGB")
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _rawmode(image: Image.Image) -> str:
    """How the file's samples are packed, in Pillow's terms; empty where the format does not say (WebP)."""
    tiles = getattr(image, "tile", [])
    if not tiles:
        return ""
    args = tiles[0].args
    return str(args[0] if isinstance(args, tuple) else args)


def _grey16(image: Image.Image) -> npt.NDArray[np.uint16]:
    tags = getattr(image, "tag_v2", {TIFF_BITS_TAG: (16,), TIFF_PHOTOMETRIC_TAG: BLACK_IS_ZERO})
    if tags.get(TIFF_BITS_TAG) != (16,) or tags.get(TIFF_PHOTOMETRIC_TAG) != BLACK_IS_ZERO:
        raise UnusableImage(
            "grey TIFF of more than 8 bits: expected 16, with black as zero; convert it to PNG"
        )
    image.load()
    return np.asarray(image).astype(np.uint16)[..., None]


def _colour16(image: Image.Image, data: bytes, rawmode: str) -> npt.NDArray[np.uint16]:
    """Decode twice, for the high and for the low bytes."""
    if rawmode == LA_16:
        sample_bytes = _decode(data, LA_16_BYTES)
        grey_alpha = _join(sample_bytes[..., 0::2], sample_bytes[..., 1::2])
        return grey_alpha[..., [0, 0, 0, 1]]
    if rawmode not in LOW_BYTES:
        raise UnusableImage(
            f"16-bit samples packed as {rawmode} are not supported: convert to 16 bit RGB PNG"
        )
    image.load()
    return _join(np.asarray(image), _decode(data, LOW_BYTES[rawmode]))


def _join(high: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    joined: npt.NDArray[np.uint16] = np.left_shift(high, 8, dtype=np.uint16) | low
    return joined


def _decode(data: bytes, rawmode: str) -> npt.NDArray[np.uint8]:
    """Decode again, with the samples unpacked in another way."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    assert isinstance(image, ImageFile.ImageFile)
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)


def _to_rgb8(samples: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> Pixels:
    """Blend over white and round to 8 bits: (H, W, 1, 3 or 4) -> uint8 (H, W, 3)."""
    height, width, channels = samples.shape
    if samples.dtype == np.uint8 and channels == 3:
        return samples.astype(np.uint8, copy=False)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, STRIP_ROWS):  # in strips: the integers below take 8 bytes a sample
        strip = samples[top : top + STRIP_ROWS].astype(np.int64)
        most = int(np.iinfo(samples.dtype).max)
        alpha = strip[..., 3:] if channels == 4 else most
        blended = strip[..., :3] * alpha + most * (most - alpha)
        pixels[top : top + STRIP_ROWS] = (255 * blended + most * most // 2) // (most * most)
    return pixels


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the camera's EXIF orientation, 1 … 8; anything else counts as upright."""
    turned = {3: 2, 4: 2, 5: -1, 6: -1, 7: 1, 8: 1}.get(orientation, 0)
    mirrored = orientation in (2, 4, 5, 7)
    upright = np.rot90(pixels, turned)
    return upright[:, ::-1] if mirrored else upright
