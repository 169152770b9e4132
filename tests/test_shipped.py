"""The codecs that come with the project: whole, of the λ they are said to be, and used where none is named."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile_files import photograph
from rich.console import Console

from jobs.experiment import ExperimentError, ForeignCodec
from jobs.files import coders, describe_files, export_codec_file, export_state_dict_file, shipped_coder
from jobs.graph import import_node
from jobs.import_codec import read_codec
from pipeline import shipped
from pipeline.bitstream import ImageCoder, parse
from pipeline.coding import code, synthesise
from pipeline.metrics import psnr_db


@pytest.mark.parametrize("finetuned", [False, True])
@pytest.mark.parametrize("quality", shipped.SHIPPED)
def test_each_is_whole_and_codes_a_picture(quality: int, finetuned: bool) -> None:
    coder = shipped_coder(quality, finetuned=finetuned)
    states = "ungerboeck256" if finetuned else "vvc8"
    assert (coder.codec.network.N, coder.tables.settings.trellis) == (64, states)
    pixels = photograph(64, 96)
    file = coder.encode(pixels)
    assert shipped.find(parse(file)[0].codec) == (quality, finetuned)
    assert np.abs(coder.decode(file).astype(int) - pixels).mean() < 30  # grey levels: a picture, not noise


@pytest.mark.parametrize("quality", shipped.SHIPPED)
def test_a_finetuned_one_has_the_same_latents_and_a_better_picture(quality: int) -> None:
    base, finetuned = (shipped_coder(quality, finetuned=kind) for kind in (False, True))
    assert (
        read_codec(shipped.path(quality).read_bytes()).digests() == base.codec.digests()
    )  # experiments' start
    pixels = photograph(192, 256)
    coded = code(finetuned.codec, finetuned.tables, pixels)
    before, after = (
        psnr_db(synthesise(coder.codec, coded.latent, *pixels.shape[:2]), pixels)
        for coder in (base, finetuned)
    )
    assert after > before + 0.1


def test_files_of_codecs_as_trained_are_decoded_and_told_apart(tmp_path: Path) -> None:
    pixels = photograph(64, 96)
    coder_of = coders(None, None, str(tmp_path))
    for finetuned, told in ((False, ", as trained\n"), (True, "Retrellis\n")):
        coder = shipped_coder(1, finetuned=finetuned)
        file = coder.encode(pixels)
        assert np.array_equal(coder_of(file).decode(file), coder.decode(file))
        (path := tmp_path / "photo.rtl").write_bytes(file)
        with (console := Console(width=200)).capture() as shown:
            assert describe_files([path], None, console) == 0
        assert told in shown.get()


def test_one_can_be_taken_elsewhere_as_a_file(tmp_path: Path) -> None:
    exported = export_codec_file(str(tmp_path), "quality-2", tmp_path / "codec.safetensors", None)
    coder = ImageCoder.from_bytes(exported.read_bytes())
    assert coder.digest == shipped.FINETUNED[2].digest
    foreign = export_state_dict_file(str(tmp_path), "quality-2", tmp_path / "codec.pth")
    assert read_codec(foreign.read_bytes()).digests() == coder.codec.digests()


def test_a_decoder_beside_another_codec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", shutil.copytree(shipped.FOLDER, tmp_path / "shipped"))
    shutil.copy(shipped.decoder_path(1), shipped.decoder_path(2))
    with pytest.raises(
        ValueError, match=r"decoder-2.*: expected the bytes [0-9a-f]{16}, found .*: install it again"
    ):
        shipped_coder(2)
    monkeypatch.setitem(
        shipped.FINETUNED, 2, shipped.FINETUNED[2]._replace(packed=shipped.FINETUNED[1].packed)
    )
    with pytest.raises(
        ValueError, match=r"quality 2 with the digest [0-9a-f]{16}, found .*: install it again"
    ):
        shipped_coder(2)
    shipped.decoder_path(2).unlink()
    with pytest.raises(ValueError, match=r"decoder-2.*No such file or directory.*: install it again"):
        shipped_coder(2)


def test_they_stand_in_the_order_of_their_rates() -> None:
    lmbdas = [codec.lmbda for codec in shipped.SHIPPED.values()]
    assert lmbdas == sorted(lmbdas)
    assert [codec.lmbda for codec in shipped.FINETUNED.values()] == lmbdas
    codecs = [*shipped.SHIPPED.values(), *shipped.FINETUNED.values()]
    assert len({codec.digest for codec in codecs}) == len(codecs) == 10


def test_a_quality_that_there_is_not() -> None:
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=rf"expected a quality from 1 to 5, found {wrong}"):
            shipped.path(wrong)
        with pytest.raises(ValueError, match=rf"expected a quality from 1 to 5, found {wrong}"):
            ForeignCodec(quality=wrong)
    assert shipped.find(bytes(8)) is None


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
