"""Canonical pixels of every kind of file that people have, and words for those that cannot be used."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.pixels import UnusableImage, canonical_pixels

PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def noise(*shape: int, high: int = 256) -> npt.NDArray[Any]:
    return np.random.default_rng(7).integers(0, high, shape).astype(np.uint16 if high > 256 else np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(samples_HWC: npt.NDArray[np.uint16], *extra: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG, rows with the Sub filter, so that the decoder's idea of a pixel's width matters."""
    height, width, channels = samples_HWC.shape
    step = 2 * channels
    rows = []
    for row in samples_HWC:
        raw = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
        rows.append(b"\1" + (raw - np.append(np.zeros(step, np.uint8), raw[:-step])).tobytes())
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def tiff16(samples_HWC: npt.NDArray[np.uint16], order: str) -> bytes:
    """An uncompressed 16-bit RGB TIFF in byte order '<' or '>'."""
    height, width, _ = samples_HWC.shape
    data = samples_HWC.astype(f"{order}u2").tobytes()
    bits = struct.pack(f"{order}HHH", 16, 16, 16)
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        packed = (
            struct.pack(f"{order}H2x", value) if kind == 3 and count == 1 else struct.pack(f"{order}I", value)
        )
        directory += struct.pack(f"{order}HHI", tag, kind, count) + packed
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 14 + len(data))
    return start + bits + data + directory + b"\0\0\0\0"


def rounded(v: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    return (v.astype(np.int64) * 255 + 32767) // 65535


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_rgb_is_kept(kind: str, options: dict[str, str]) -> None:
    pixels = noise(9, 11, 3)
    assert np.array_equal(canonical_pixels(encoded(Image.fromarray(pixels), kind, **options)), pixels)


def test_webp_lossless_and_jpeg() -> None:
    pixels = noise(9, 11, 3)
    assert np.array_equal(canonical_pixels(encoded(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)
    data = encoded(Image.fromarray(pixels), "JPEG", quality=90)
    assert np.array_equal(canonical_pixels(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind: str, orientation: int) -> None:
    image = Image.fromarray(noise(16, 24, 3))
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, exif=exif.tobytes() if kind != "TIFF" else exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected is not None
    assert np.array_equal(canonical_pixels(data), np.asarray(expected))


def test_transparency_goes_over_white() -> None:
    pixels = noise(8, 8, 4)
    exact = pixels[..., :3] * (pixels[..., 3:] / 255) + 255 * (1 - pixels[..., 3:] / 255)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = canonical_pixels(encoded(Image.fromarray(pixels), kind, **options))
        assert np.abs(found - exact).max() <= 0.5 + 1e-9


def test_palette_grey_and_bilevel() -> None:
    palette = Image.fromarray(noise(8, 8, 3)).quantize(16)
    assert np.array_equal(canonical_pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    transparent = canonical_pixels(encoded(palette, transparency=3))
    assert (transparent[np.asarray(palette) == 3] == 255).all()
    grey = noise(8, 8)
    assert np.array_equal(canonical_pixels(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, -1))
    bilevel = Image.fromarray(grey > 128)
    assert set(np.unique(canonical_pixels(encoded(bilevel)))) == {0, 255}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_rounded_not_truncated(channels: int) -> None:
    samples = noise(37, 50, channels, high=65536)
    colours = samples[..., :1].repeat(3, -1) if channels < 3 else samples[..., :3]
    found = canonical_pixels(png16(samples))
    if channels in (1, 3):
        assert np.array_equal(found, rounded(colours))
        return
    alpha = samples[..., -1:] / 65535
    exact = 255 * (colours / 65535 * alpha + 1 - alpha)
    assert np.abs(found - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_is_rounded(order: str) -> None:
    samples = noise(5, 6, 3, high=65536)
    assert np.array_equal(canonical_pixels(tiff16(samples, order)), rounded(samples))
    grey = Image.fromarray(samples[..., 0])
    for compression in ("raw", "tiff_deflate"):
        found = canonical_pixels(encoded(grey, "TIFF", compression=compression))
        assert np.array_equal(found[..., 0], rounded(samples[..., 0]))


def test_scale_is_lanczos() -> None:
    image = Image.fromarray(noise(40, 60, 3))
    expected = np.asarray(image.resize((42, 28), Image.Resampling.LANCZOS))
    assert np.array_equal(canonical_pixels(encoded(image), scale=0.7), expected)
    assert canonical_pixels(encoded(image), scale=0.001).shape == (1, 1, 3)
    with pytest.raises(ValueError, match=r"expected a scale in \(0, 1\], found 1.5"):
        canonical_pixels(encoded(image), scale=1.5)


def test_first_frame_counts() -> None:
    frames = [Image.fromarray(noise(8, 8, 3)), Image.new("RGB", (8, 8))]
    for kind in ("PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.array_equal(canonical_pixels(data), np.asarray(frames[0]))


def test_reasons() -> None:
    png = encoded(Image.fromarray(noise(64, 64, 3)))
    jpeg = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    cases = [
        (b"", "not a PNG, JPEG, WebP or TIFF image"),
        (b"hello", "not a PNG, JPEG, WebP or TIFF image"),
        (encoded(Image.new("RGB", (4, 4)), "BMP"), "not a PNG, JPEG, WebP or TIFF image"),
        (png[: len(png) // 2], "truncated or damaged: "),
        (jpeg[: len(jpeg) // 2], "truncated or damaged: "),
        (encoded(Image.new("CMYK", (4, 4)), "JPEG"), "CMYK images are not supported"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "F images are not supported"),
        (encoded(Image.new("I", (4, 4)), "TIFF"), "I images are not supported"),
        (png16(noise(4, 4, 3, high=65536), (b"tRNS", b"\0" * 6)), "16-bit images with a transparent colour"),
    ]
    for data, reason in cases:
        with pytest.raises(UnusableImage) as caught:
            canonical_pixels(data)
        assert caught.value.reason.startswith(reason)


def test_size_is_checked_before_decoding() -> None:
    png = encoded(Image.new("RGB", (64, 64)))
    with pytest.raises(UnusableImage, match="64 × 64 pixels are more than the limit of 4095"):
        canonical_pixels(png, max_pixels=4095)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        png[:8]
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        + png[33:]
    )
    with pytest.raises(UnusableImage, match="too many pixels"):
        canonical_pixels(bomb)


FILES = [
    encoded(Image.fromarray(noise(24, 24, 3)), kind, **options)
    for kind, options in (
        ("PNG", {}),
        ("JPEG", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    )
] + [png16(noise(9, 9, 3, high=65536))]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FILES),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=3),
)
def test_damage_never_escapes(data: bytes, keep: float, changes: list[tuple[float, int]]) -> None:
    damaged = bytearray(data[: max(1, int(keep * len(data)))] if keep < 0.7 else data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    try:
        pixels = canonical_pixels(bytes(damaged), max_pixels=2**20)
    except UnusableImage:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
