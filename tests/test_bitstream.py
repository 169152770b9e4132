"""Files: images to bytes and back, what is refused, and what tampering can do (nothing)."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile_files import (
    CODERS,
    mutated,
    photograph,
    repaired,
    small_codec,
    small_coder,
    stated_size,
    with_header,
    with_metadata,
    with_setting,
)
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from pipeline.bitstream import BitstreamError, Header, ImageCoder, codec_file, container, parse
from pipeline.coding import code, decode_latent, synthesise
from pipeline.quantizer_kinds import LMBDA_Q_MAX
from pipeline.quantizers import settings
from pipeline.quantizers.lloyd import midpoint_tables

KINDS = [("tcq", "state"), ("tcq", "quantizer"), ("urq", ""), ("rdoq", "")]


@pytest.fixture(scope="module")
def file() -> bytes:
    """One that others tamper with."""
    return small_coder().encode(photograph(100, 150))


# Images


@pytest.mark.parametrize(("kind", "context"), KINDS)
def test_a_file_holds_what_the_encoder_chose(kind: str, context: str) -> None:
    coder, pixels = small_coder(kind, context), photograph(100, 150)
    coded = code(coder.codec, coder.tables, pixels)
    data = coder.encode_indices(coded, 100, 150)
    assert data == coder.encode(pixels)
    found = ImageCoder.from_bytes(coder.to_bytes()).decode_indices(data)
    assert np.array_equal(found.indices, coded.indices)
    assert np.array_equal(found.hyper_indices, coded.hyper_indices)
    assert found.hyper_indices.dtype == np.int16
    assert np.array_equal(found.latent, coded.latent)
    ours = decode_latent(coder.codec, coder.tables, coded.indices, coded.hyper_indices)
    assert np.array_equal(coder.decode(data), synthesise(coder.codec, ours, 100, 150))
    assert found.header == Header(bytes.fromhex(coder.digest)[:8], 100, 150, *map(len, parse(data)[1:]))
    assert np.abs(coded.indices).max() > coder.tables.alphabet.min() or kind != "urq"
    # 3 coders of 5 bytes, of which they use more than 3, a word each for rounding, and the header
    estimate = (coded.bits_y + coded.bits_z) / 8
    assert estimate < len(data) < 1.003 * estimate + 64


@given(height=st.integers(1, 140), width=st.integers(1, 140))
@effort(deadline=None, max_examples=15)
def test_any_size_comes_back_in_that_size(height: int, width: int) -> None:
    coder = small_coder()
    decoded = coder.decode(coder.encode(photograph(height, width)))
    assert decoded.shape == (height, width, 3)
    assert decoded.dtype == np.uint8


def test_pixels_that_are_none_are_refused() -> None:
    for pixels in (photograph(4, 4)[..., 0], photograph(4, 4).astype(np.float32), photograph(0, 4)):
        with pytest.raises(ValueError, match=r"expected pixels as uint8 \(H, W, 3\), found "):
            small_coder().encode(pixels)


def test_an_image_that_no_decoder_would_take_is_not_encoded() -> None:
    coder = ImageCoder(small_codec(), small_coder().tables, max_pixels=2 * 64 * 64)
    assert coder.decode(coder.encode(photograph(64, 65))).shape == (64, 65, 3)
    with pytest.raises(
        BitstreamError,
        match=r"66 × 65 pixels, padded to 128 × 128, are more than the limit of 8192; .*raise max_pixels",
    ):
        coder.encode(photograph(65, 66))


def test_indices_that_no_file_can_carry_are_refused() -> None:
    coder, coded = small_coder(), code(small_codec(), small_coder().tables, photograph(70, 40))

    def told(height: int = 70, **changes: object) -> str:
        with pytest.raises(ValueError, match=r"expected .* found ") as error:
            coder.encode_indices(replace(coded, **changes), height, 40)
        return str(error.value)

    assert told(height=200) == (
        "expected hyper indices (8, 4, 1) and indices (12, 16, 4), found (8, 2, 1) and (12, 8, 4)"
    )
    assert told(indices=coded.indices + 40_000).startswith("indices: expected |k| ≤ 32766, found ")
    assert told(indices=coded.indices.astype(np.int16)) == "indices: expected int32, found int16"
    assert told(sigma_index=coded.sigma_index | 64).startswith("σ indices: expected at most 63, found ")
    hyper_indices = np.full_like(coded.hyper_indices, -(1 << 15))
    assert told(hyper_indices=hyper_indices) == "hyper indices: expected |n| ≤ 4095, found -32768 to -32768"


# The header


def test_header_of_a_tiny_file_is_fixed() -> None:
    """Golden bytes: a change of them is another format version."""
    data = container.build(bytes(range(8)), 1, 300, b"hyper", b"latent")
    assert data.hex() == GOLDEN
    header, hyper, latent = parse(data)
    assert header == Header(bytes(range(8)), 1, 300, 5, 6)
    assert (header.bytes, header.file_bytes) == (21, len(data))
    assert (hyper, latent) == (b"hyper", b"latent")
    assert header.bpp == 8 * 32 / 300


GOLDEN = "52544c016a3671f6000102030405060701ac02050668797065726c6174656e74"


def test_header_is_at_most_32_bytes() -> None:
    most = (1 << 28) - 1
    assert Header(bytes(8), most, most, most, most).bytes == 32
    with pytest.raises(ValueError, match="width: expected less than 268435456, found 268435456"):
        container.build(bytes(8), 1, 1 << 28, b"", b"")


def test_messages_about_files(file: bytes) -> None:
    def told(data: bytes) -> str:
        with pytest.raises(BitstreamError) as error:
            small_coder().decode(data)
        return str(error.value)

    size = len(file)
    assert told(b"") == "not a Retrellis file: expected it to begin with b'RTL', found b''"
    assert told(b"\x89PNG\r\n") == "not a Retrellis file: expected it to begin with b'RTL', found b'\\x89PNG'"
    newer, older = (told(file[:3] + bytes([version]) + file[4:]) for version in (2, 0))
    assert newer == "expected format version 1, found 2: decode it with a newer release"
    assert older == "expected format version 1, found 0: it is damaged"
    assert told(file[:18]) == "truncated: expected a header of up to 32 bytes, found 18 bytes"
    assert told(file[:-7]).startswith(
        f"expected {size} bytes by its header, found {size - 7}: truncated, or its header is damaged"
    )
    assert f"found {size + 1}: followed by other bytes, or its header" in told(file + b"x")
    changed = bytearray(file)
    changed[40] ^= 1
    assert told(bytes(changed)).endswith(": damaged, get another copy")
    assert told(bytes(changed)).startswith(
        f"expected checksum {int.from_bytes(file[4:8], 'little'):08x}, found "
    )
    assert told(repaired(bytes(changed))).startswith("hyper stream: expected ")
    changed = bytearray(file)
    changed[-2] ^= 1
    assert told(repaired(bytes(changed))).startswith("latent stream: expected ")
    assert told(repaired(bytes(changed))).endswith("; the file is damaged, get another copy")
    assert told(with_header(file, height=0)) == "expected sides of at least 1, found 150 × 0 pixels"
    long, padded = b"\x80\x80\x80\x80\x01", b"\x80\x00"
    for number, message in (
        (long, "damaged header: expected numbers below 268435456, found a longer one"),
        (padded, "damaged header: expected numbers in as few bytes as they need"),
    ):
        assert told(repaired(file[:16] + number + file[17:])) == message


def test_a_file_of_another_codec_names_both(file: bytes) -> None:
    other = small_coder(seed=1)
    with pytest.raises(BitstreamError) as error:
        other.decode(file)
    assert str(error.value) == (
        f"made by another codec: expected {other.digest[:16]}, found {small_coder().digest[:16]}; "
        "decode it with the codec file whose SHA-256 begins so"
    )


# The codec file


def test_codec_file_is_a_function_of_codec_and_tables() -> None:
    coder = small_coder()
    data = coder.to_bytes()
    again = ImageCoder.from_bytes(data)
    assert again.to_bytes() == data
    assert again.codec.digests() == coder.codec.digests()
    assert again.tables.digest == coder.tables.digest
    digests = {small_coder(*kind).digest for kind in KINDS} | {small_coder(seed=1).digest}
    assert len(digests) == 5


def test_a_slim_codec_file_becomes_whole_again() -> None:
    data = small_coder().to_bytes()
    slim = codec_file.slim(data)
    assert len(slim) < 0.9 * len(data)
    assert codec_file.whole(slim) == data
    assert codec_file.whole(data) == data
    assert codec_file.whole(b"something else") == b"something else"
    partly = safetensors.torch.load(data)
    del partly["integer.means.bias"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    with pytest.raises(ValueError, match=r"integer\.means\.bias: expected .*; the checkpoint is incomplete"):
        codec_file.split(safetensors.torch.save(partly, header["__metadata__"]))


def test_other_files_are_no_codec_files() -> None:
    data = small_coder().to_bytes()
    with pytest.raises(
        ValueError, match=r"not a codec file: .* found 5 other bytes; `retrellis export CODEC "
    ):
        ImageCoder.from_bytes(b"hello")
    with pytest.raises(
        ValueError, match=r"not a codec file: .* found a codec without tables; `retrellis exp"
    ):
        ImageCoder.from_bytes(small_codec().to_bytes())
    with pytest.raises(ValueError, match=r"not a codec file: .* other bytes"):
        ImageCoder.from_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"not a codec file: .* other bytes"):
        ImageCoder.from_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    newer = data.replace(b'\\"version\\": 1}', b'\\"version\\": 9}', 1)
    with pytest.raises(
        ValueError, match="expected a codec file of version 1, found 9: use a matching release"
    ):
        ImageCoder.from_bytes(newer)
    lacking = data.replace(b'\\\\\\"settings\\\\\\"', b'\\\\\\"settinks\\\\\\"', 1)
    with pytest.raises(ValueError, match=r"tables: expected the settings \['context', .*, found None"):
        ImageCoder.from_bytes(lacking)
    length = int.from_bytes(data[:8], "little")
    renamed = data[: 8 + length].replace(b"tables.alphabet", b"tables.alphabit") + data[8 + length :]
    with pytest.raises(ValueError, match=r"tables: expected the arrays \['alphabet'"):
        ImageCoder.from_bytes(renamed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", [], r"quantizer kind: expected a name, found \[\]"),
        ("kind", {}, r"quantizer kind: expected a name, found \{\}"),
        ("kind", "vq", "quantizer kind: expected one of urq, .*, found 'vq'"),
        ("kind", "urq", "kind 'urq' takes no `trellis`, found vvc8"),
        ("trellis", None, "quantizer context state: expected a trellis of at most 8 states"),
        ("trellis", [], r"quantizer trellis: expected a name or null, found \[\]"),
        ("lmbda_q", 10**400, r"quantizer lmbda_q .*: expected 0 to 1000000.0, found 1000+\.\.\.0+$"),
        ("lmbda_q", 1e308, "quantizer lmbda_q .*: expected 0 to 1000000.0, found 1e[+]308"),
        ("lmbda_q", True, "quantizer lmbda_q: expected a number, found True"),
        ("step", True, "quantizer step: expected a number, found True"),
        ("step", "1", "quantizer step: expected a number, found '1'"),
        ("context", [], r"quantizer context: expected a name, found \[\]"),
        ("offset", 0.5, "quantizer offset: expected a list of numbers, found 0.5"),
        ("offset", [False], "quantizer offset: expected numbers, found False"),
        ("offset", [0.3], "kind 'tcq' takes no `offset`"),
    ],
)
def test_codec_files_with_impossible_settings_are_refused(name: str, value: object, message: str) -> None:
    """When they are read, not when the first image is encoded."""
    with pytest.raises(ValueError, match=message):
        ImageCoder.from_bytes(with_setting(small_coder().to_bytes(), name, value))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("tables", "[" * 100_000, r"tables: expected version and settings in JSON, found '\[\[\["),
        ("tables", "[]", r"tables: expected version and settings in JSON, found '\[\]'"),
        ("tables", '{"version": 2.0}', "tables: expected format version 2, found 2.0"),
        ("codec", "[" * 100_000, "not a codec checkpoint: "),
        ("version", True, "expected a codec file of version 1, found True"),
    ],
)
def test_codec_files_with_other_metadata_are_refused(part: str, value: object, message: str) -> None:
    data = with_metadata(small_coder().to_bytes(), lambda metadata: metadata.update({part: value}))
    with pytest.raises(ValueError, match=message):
        ImageCoder.from_bytes(data)


@pytest.mark.parametrize(("kind", "step"), [("tcq", 64.0), ("tcq", 0.05), ("rdoq", 64.0), ("rdoq", 0.05)])
def test_the_largest_weight_of_a_bit_still_encodes(kind: str, step: float) -> None:
    chosen = settings(kind, step=step, lmbda_q=LMBDA_Q_MAX)
    coder, pixels = ImageCoder(small_codec(), midpoint_tables(chosen)), photograph(70, 40)
    coded = code(coder.codec, coder.tables, pixels)
    found = coder.decode_indices(coder.encode_indices(coded, 70, 40))
    assert np.array_equal(found.latent, coded.latent)


# Tampering


@pytest.mark.parametrize(("number", "name"), enumerate(CODERS))
def test_tampered_files_give_an_error_or_an_image_of_the_stated_size(number: int, name: str) -> None:
    coder = CODERS[name]()
    file = coder.encode(photograph(100, 150))
    for seed in range(96 * number, 96 * (number + 1)):
        kind, data = mutated(file, seed)
        with suppress(BitstreamError):
            assert coder.decode(data).shape == (*stated_size(data), 3), kind


@pytest.mark.parametrize(("height", "width"), [(1 << 27, 1), (1 << 20, 1 << 20), (8192, 16384 + 64)])
def test_giant_dimensions_take_no_memory(file: bytes, height: int, width: int) -> None:
    tracemalloc.start()
    with pytest.raises(BitstreamError, match=r"are more than the limit of 134217728; .*raise max_pixels"):
        small_coder().decode(with_header(file, height=height, width=width))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_dimensions_within_the_limit_allocate_no_latents_before_the_hyper_stream_is_whole(
    file: bytes,
) -> None:
    """2^27 pixels have 6 million latents a plane of M = 12, 25 MB; their hyper indices take 2 MB, twice over."""
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="hyper stream: expected"):
        small_coder().decode(with_header(file, height=8192, width=16384))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_every_position_of_a_flipped_byte_is_noticed(file: bytes) -> None:
    """With the checksum as it was: each byte of a file counts."""
    for place in range(len(file)):
        changed = bytearray(file)
        changed[place] ^= 0x55
        with pytest.raises(BitstreamError):
            parse(bytes(changed))


def test_specification_names_the_magic_and_the_version() -> None:
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    assert "`RTL`" in text
    assert f"version {container.VERSION}" in text
