"""The codecs that come with the project: whole, of the λ they are said to be, and used where none is named."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from hostile_files import photograph

from jobs.experiment import ExperimentError, ForeignCodec
from jobs.graph import import_node
from jobs.import_codec import read_codec
from pipeline import shipped
from pipeline.bitstream import ImageCoder, parse


@pytest.mark.parametrize("quality", shipped.SHIPPED)
def test_each_is_whole_and_codes_a_picture(quality: int) -> None:
    data = shipped.codec_file(quality)
    coder = ImageCoder.from_bytes(data)
    assert (coder.codec.network.N, coder.tables.settings.trellis) == (64, "vvc8")
    assert read_codec(shipped.path(quality).read_bytes()).digests() == coder.codec.digests()
    pixels = photograph(64, 96)
    file = coder.encode(pixels)
    assert shipped.quality_of(parse(file)[0].codec) == quality
    assert np.abs(coder.decode(file).astype(int) - pixels).mean() < 30  # grey levels: a picture, not noise


def test_they_stand_in_the_order_of_their_rates() -> None:
    lmbdas = [codec.lmbda for codec in shipped.SHIPPED.values()]
    assert lmbdas == sorted(lmbdas)
    assert len({codec.digest for codec in shipped.SHIPPED.values()}) == len(lmbdas) == 5


def test_a_quality_that_there_is_not() -> None:
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=rf"expected a quality from 1 to 5, found {wrong}"):
            shipped.path(wrong)
        with pytest.raises(ValueError, match=rf"expected a quality from 1 to 5, found {wrong}"):
            ForeignCodec(quality=wrong)
    assert shipped.quality_of(bytes(8)) is None


def test_a_file_of_another_release_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shipped.path(2).read_bytes()
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    for wrong in (whole[:-1000], shipped.path(1).name.encode()):
        shipped.path(2).write_bytes(wrong)
        with pytest.raises(
            ValueError, match=r"quality-2.*: expected the bytes [0-9a-f]{16}, found .*: install it"
        ):
            shipped.codec_file(2)
        with pytest.raises(
            ExperimentError, match=r"quality-2.*: expected the codec that comes with this release"
        ):
            import_node(0.004, *ForeignCodec(quality=2).source)


def test_packed_bytes_are_unpacked_whole_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = lzma.compress(b"a codec" * 1000)
    assert shipped.unpack(packed) == b"a codec" * 1000
    assert shipped.unpack(b"not packed") == b"not packed"
    with pytest.raises(
        ValueError, match=r"expected a whole \.xz file, found [\d,]+ bytes: the end is missing"
    ):
        shipped.unpack(packed[:-20])
    with pytest.raises(ValueError, match=r"expected an \.xz file, found [\d,]+ damaged bytes"):
        shipped.unpack(packed[:40] + bytes(8) + packed[48:])
    monkeypatch.setattr(shipped, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"bytes: more than 100 bytes in it"):
        shipped.unpack(packed)


def test_a_quality_knows_its_lmbda() -> None:
    assert ForeignCodec(quality=4).trained_lmbda == shipped.SHIPPED[4].lmbda
    assert ForeignCodec(quality=4, lmbda=0.01).trained_lmbda == 0.01
    with pytest.raises(ValueError, match=r"expected the `lmbda` that this codec was trained for"):
        ForeignCodec(file="codec.pth")
