"""The commands encode, decode, info and export: what they write, what they say, and that one failure stops no other."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hostile_files import padded, photograph, small_codec, small_coder
from laboratory import COMMAND, Lab
from rich.console import Console

from jobs import cli, files_cli
from jobs.import_codec import read_codec
from pipeline.bitstream import ImageCoder, parse

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def retrellis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: exit code, what it prints, what it complains of."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        console = Console(file=io.StringIO(), width=400, soft_wrap=True)
        monkeypatch.setattr(files_cli, "console", console)
        monkeypatch.setattr(sys, "argv", ["retrellis", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(console.file, io.StringIO)
        return int(end.value.code or 0), console.file.getvalue(), capsys.readouterr().err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs, one of them grey, something else, and a codec file."""
    PIL.Image.fromarray(photograph(40, 70)).save(tmp_path / "a.png")
    PIL.Image.fromarray(photograph(70, 40)).convert("L").save(tmp_path / "grey.jpg")
    (tmp_path / "text.png").write_bytes(b"not an image")
    (tmp_path / "codec.safetensors").write_bytes(small_coder("urq").to_bytes())
    return tmp_path


def test_files_there_and_back(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    (folder / "out").mkdir()
    code, said, wrong = retrellis("encode", folder / "a.png", folder / "grey.jpg", *codec)
    assert (code, wrong) == (0, "")
    size = (folder / "a.rtl").stat().st_size
    assert said.splitlines()[0] == (
        f"{folder}/a.png -> {folder}/a.rtl: 70 × 40 pixels, {size:,} bytes, {size * 8 / 2800:.4f} bpp"
    )
    code, said, wrong = retrellis(
        "decode", folder / "a.rtl", folder / "grey.rtl", "-o", folder / "out", *codec
    )
    assert (code, wrong, len(said.splitlines())) == (0, "", 2)
    decoded = np.array(PIL.Image.open(folder / "out" / "grey.png"))
    expected = small_coder("urq").decode((folder / "grey.rtl").read_bytes())
    assert decoded.shape == (70, 40, 3)
    assert np.array_equal(decoded, expected)


def test_another_process_decodes_the_same(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    retrellis("encode", folder / "grey.jpg", *codec)
    command = [COMMAND, "decode", folder / "grey.rtl", "-o", folder / "there.png", *codec]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    here = small_coder("urq").decode((folder / "grey.rtl").read_bytes())
    assert np.abs(np.array(PIL.Image.open(folder / "there.png")).astype(int) - here).max() <= 1


def test_info(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    retrellis("encode", folder / "a.png", "-o", folder / "b.rtl", *codec)
    data = (folder / "b.rtl").read_bytes()
    header, hyper, latent = parse(data)
    code, said, _ = retrellis("info", folder / "b.rtl")
    assert (code, said) == (
        0,
        f"{folder}/b.rtl: 70 × 40 pixels, {len(data):,} bytes, {len(data) * 8 / 2800:.4f} bpp\n"
        f"  format version 1, codec {small_coder('urq').digest[:16]}\n"
        f"  header {header.bytes}, hyper stream {len(hyper):,}, latent stream {len(latent):,} bytes\n",
    )
    assert retrellis("info", folder / "b.rtl", *codec)[1] == said + "  whole, and of this codec\n"
    (folder / "other").write_bytes(small_coder("rdoq").to_bytes())
    code, said, wrong = retrellis("info", folder / "b.rtl", "--codec", folder / "other")
    assert (code, said) == (1, "")
    assert wrong.startswith(f"retrellis: {folder}/b.rtl: made by another codec: expected ")


def test_one_failure_stops_no_other(folder: Path, retrellis: Command) -> None:
    names = ("text.png", "missing.png", "a.png")
    code, said, wrong = retrellis(
        "encode", *(folder / name for name in names), "--codec", folder / "codec.safetensors"
    )
    assert (code, len(said.splitlines())) == (1, 1)
    assert wrong.splitlines() == [
        f"retrellis: {folder}/text.png: not a PNG, JPEG, WebP or TIFF image",
        f"retrellis: {folder}/missing.png: No such file or directory",
    ]
    assert (folder / "a.rtl").is_file()
    (folder / "b.rtl").write_bytes(b"RTL\x01")
    code, said, wrong = retrellis(
        "decode", folder / "b.rtl", folder / "a.rtl", "--force", "--codec", folder / "codec.safetensors"
    )
    assert (code, len(said.splitlines())) == (1, 1)
    assert wrong.startswith(f"retrellis: {folder}/b.rtl: truncated: expected a header of up to 32 bytes")


def test_nothing_is_replaced_unasked(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    (folder / "a.rtl").write_bytes(b"mine")
    code, _, wrong = retrellis("encode", folder / "a.png", *codec)
    assert (code, (folder / "a.rtl").read_bytes()) == (1, b"mine")
    assert wrong == (
        f"retrellis: {folder}/a.png: {folder}/a.rtl exists; give --force to replace it, or another name by -o\n"
    )
    assert retrellis("encode", folder / "a.png", "--force", *codec)[0] == 0
    original = (folder / "a.png").read_bytes()
    assert retrellis("decode", folder / "a.rtl", *codec)[0] == 1
    assert (folder / "a.png").read_bytes() == original
    PIL.Image.fromarray(photograph(9, 9)).save(folder / "a.webp")
    code, said, wrong = retrellis("encode", folder / "a.webp", folder / "a.png", "--force", *codec)
    assert (code, len(said.splitlines())) == (1, 1)
    assert f"a.png: another of these files gives {folder}/a.rtl too" in wrong
    (folder / "c.png").write_bytes((folder / "a.rtl").read_bytes())
    assert (
        "its result would have the same name" in retrellis("decode", folder / "c.png", "--force", *codec)[2]
    )


def test_places_that_cannot_be_meant(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    one, two = folder / "a.png", folder / "grey.jpg"
    assert retrellis("encode", one, two, "-o", folder / "no", *codec)[2] == (
        f"retrellis: -o {folder}/no: expected a folder that there is, for 2 files\n"
    )
    assert (
        f"expected a folder {folder}/no for its result"
        in (retrellis("encode", one, "-o", folder / "no" / "a.rtl", *codec)[2])
    )
    assert not (folder / "no").exists()
    assert retrellis("decode", one, "-o", folder / "x.jpg", *codec)[2] == (
        f"retrellis: -o {folder}/x.jpg: expected a name that ends in .png; decoded images are PNG\n"
    )


def test_other_paths_to_one_place_are_that_place(folder: Path, retrellis: Command) -> None:
    (folder / "out").mkdir()
    PIL.Image.fromarray(photograph(9, 9)).save(folder / "a.webp")
    roundabout = folder / "out" / ".." / "a.webp"
    codec = ("--codec", folder / "codec.safetensors")
    code, said, wrong = retrellis("encode", folder / "a.png", roundabout, "--force", *codec)
    assert (code, len(said.splitlines())) == (1, 1)
    assert f"another of these files gives {roundabout.with_suffix('.rtl')} too" in wrong


def test_folders_and_devices_are_no_files(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    assert retrellis("encode", folder, *codec)[2] == f"retrellis: {folder}: Is a directory\n"
    assert retrellis("info", folder)[2] == f"retrellis: {folder}: Is a directory\n"
    assert retrellis("encode", ".", *codec)[2] == (
        "retrellis: expected files, found the folder .; name the files in it\n"
    )
    assert retrellis("info", "/dev/null")[2].startswith("retrellis: /dev/null: not a Retrellis file")
    assert retrellis("info", "/dev/zero")[2] == (
        "retrellis: /dev/zero: expected at most 536,870,942 bytes, found more\n"
    )


def test_an_error_about_another_path_names_it(folder: Path, retrellis: Command) -> None:
    long = folder / f"{'a' * 250}.rtl"
    wrong = retrellis("encode", folder / "a.png", "-o", long, "--codec", folder / "codec.safetensors")[2]
    assert wrong.startswith(f"retrellis: {folder}/a.png: {long}#")
    assert wrong.endswith(": File name too long\n")


def test_names_that_are_no_text(folder: Path, retrellis: Command) -> None:
    odd = folder / "b\udcff.png"
    odd.write_bytes((folder / "a.png").read_bytes())
    code, said, wrong = retrellis("encode", odd, "--codec", folder / "codec.safetensors")
    assert (code, wrong) == (0, "")
    assert said.startswith(f"{folder}/b\\udcff.png -> {folder}/b\\udcff.rtl: 70 × 40 pixels")
    assert odd.with_suffix(".rtl").is_file()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 512)])
def test_narrow_images(folder: Path, retrellis: Command, height: int, width: int) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    PIL.Image.fromarray(photograph(height, width)).save(folder / "n.png")
    assert retrellis("encode", folder / "n.png", *codec)[0] == 0
    assert retrellis("decode", folder / "n.rtl", "-o", folder / "back.png", *codec)[0] == 0
    assert PIL.Image.open(folder / "back.png").size == (width, height)


LITTLE_MEMORY = """
import resource, pipeline.bitstream, pipeline.pixels
from jobs.cli import main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (600 << 20),) * 2)
main()
"""


def test_an_image_too_large_for_the_memory_stops_no_other(folder: Path) -> None:
    PIL.Image.new("RGB", (8000, 5000)).save(folder / "large.png")
    (folder / "out").mkdir()
    arguments = [folder / "large.png", folder / "a.png", "-o", folder / "out"]
    ended = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, "encode", *arguments, "--codec", folder / "codec.safetensors"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr == f"retrellis: {folder}/large.png: not enough memory for its pixels\n"
    assert ended.returncode == 1
    assert (folder / "out" / "a.rtl").is_file()


def test_codecs_that_are_none(folder: Path, retrellis: Command) -> None:
    (folder / "plain.safetensors").write_bytes(small_codec().to_bytes())
    code, _, wrong = retrellis("info", folder / "a.png", "--codec", folder / "plain.safetensors")
    assert code == 1
    assert "plain.safetensors: not a codec file: expected codec and tables in one, found a codec" in wrong
    wrong = retrellis("info", folder / "a.png", "--codec", folder / "missing")[2]
    assert wrong.endswith(
        "missing: expected a codec file, a digest's first digits or quality-1 … quality-5, found no such file\n"
    )
    assert retrellis("info", folder / "a.png", "--codec", folder)[2].endswith("quality-5, found a folder\n")


def test_a_codec_file_with_a_padded_header(folder: Path, retrellis: Command) -> None:
    (folder / "padded.safetensors").write_bytes(padded((folder / "codec.safetensors").read_bytes()))
    codec = ("--codec", folder / "padded.safetensors")
    assert retrellis("encode", folder / "a.png", "-o", folder / "p.rtl", *codec)[0] == 0
    assert "whole, and of this codec" in retrellis("info", folder / "p.rtl", *codec)[1]
    assert retrellis("decode", folder / "p.rtl", *codec)[0] == 0
    wrong = retrellis("info", folder / "p.rtl", "--codec", folder / "codec.safetensors")[2]
    assert "made by another codec" in wrong


def test_large_images_are_refused_until_they_are_asked_for(folder: Path, retrellis: Command) -> None:
    codec = ("--codec", folder / "codec.safetensors")
    code, _, wrong = retrellis("encode", folder / "a.png", *codec, "--max-pixels", "4096")
    assert code == 1
    assert "70 × 40 pixels, padded to 128 × 64, are more than the limit of 4096; " in wrong
    assert retrellis("encode", folder / "a.png", *codec, "--max-pixels", "8192")[0] == 0


def test_a_codec_of_a_workspace(reference: Lab, folder: Path, retrellis: Command) -> None:
    """Found among what was evaluated; its codec file gives the same bytes elsewhere."""
    there = ("--workspace", reference.root)
    record = reference.record("evaluate", quantizer="tcq4", arm="paper")
    digest = record["reads"]["codec"]
    base = reference.record("evaluate", quantizer="tcq4", arm="base")["reads"]["codec"]
    exported = folder / "paper.safetensors"
    assert retrellis("export", digest[:12], exported, *there)[:2] == (0, f"wrote {exported}\n")
    coder = ImageCoder.from_bytes(exported.read_bytes())
    assert (coder.codec.digests().codec, coder.tables.digest) == (digest, record["reads"]["tables"])
    encode = ("encode", folder / "a.png", "--force", "--codec")
    retrellis(*encode, digest[:12], *there)
    data = (folder / "a.rtl").read_bytes()
    retrellis(*encode, exported)
    assert (folder / "a.rtl").read_bytes() == data
    code, _, wrong = retrellis(*encode, base[:12], *there)
    assert code == 1
    assert f"expected one evaluated codec whose digest begins with {base[:12]}, found 2 in " in wrong
    assert f"{base[:12]} with quantizer tcq4" in wrong
    assert retrellis(*encode, base[:12], "--quantizer", "urq", *there)[0] == 0
    assert "with quantizer none, found 0 in" in retrellis(*encode, base, "--quantizer", "none", *there)[2]
    assert "there are: none;" in retrellis(*encode, "123456789", *there)[2]
    retrellis("export", digest[:12], folder / "paper.pth", *there)
    assert read_codec((folder / "paper.pth").read_bytes()).network.N == 8


def test_a_quantizer_that_two_experiments_name_differently(
    reference: Lab, folder: Path, retrellis: Command
) -> None:
    """One codec, the same tables, two names: either finds them, and without a name they are one choice."""
    lab = reference.copy(folder / "workspace")
    record = lab.record("evaluate", quantizer="tcq4", arm="paper")
    renamed = {**record, "axes": {**record["axes"], "quantizer": "eight"}}
    results = folder / "workspace" / "records" / "results" / "evaluate"
    (results / f"{'0' * 64}.json").write_text(json.dumps(renamed))
    export = ("export", record["reads"]["codec"][:12], folder / "out.safetensors", "--workspace", lab.root)
    for name in ("tcq4", "eight"):
        assert retrellis(*export, "--quantizer", name)[0] == 0
    assert retrellis(*export)[0] == 0
    assert "with quantizer eight or tcq4;" in retrellis(*export, "--quantizer", "other")[2]


def test_without_a_codec_one_that_comes_along_is_taken(folder: Path, retrellis: Command) -> None:
    code, _, wrong = retrellis("encode", folder / "a.png", "--quality", 1)
    assert (code, wrong) == (0, "")
    code, _, wrong = retrellis("encode", folder / "grey.jpg")
    assert (code, wrong) == (0, "")
    code, said, _ = retrellis("info", folder / "a.rtl", folder / "grey.rtl")
    assert code == 0
    assert "quality 1 of those that come with Retrellis" in said
    assert "quality 3 of those that come with Retrellis" in said
    code, said, wrong = retrellis("decode", folder / "a.rtl", folder / "grey.rtl", "--force")
    assert (code, wrong) == (0, "")
    assert PIL.Image.open(folder / "grey.png").size == (40, 70)


def test_a_file_of_another_codec_is_named_and_stops_no_other(folder: Path, retrellis: Command) -> None:
    retrellis("encode", folder / "a.png", "--codec", folder / "codec.safetensors")
    retrellis("encode", folder / "grey.jpg", "--quality", 2)
    code, said, wrong = retrellis("decode", folder / "a.rtl", folder / "grey.rtl", "-o", folder, "--force")
    identity = parse((folder / "a.rtl").read_bytes())[0].codec.hex()
    assert code == 1
    assert wrong == (
        f"retrellis: {folder}/a.rtl: encoded by the codec {identity}, none that comes with Retrellis: "
        "name it by --codec\n"
    )
    assert "grey.rtl -> " in said


def test_codec_and_quality_exclude_each_other(folder: Path, retrellis: Command) -> None:
    code, _, wrong = retrellis(
        "encode", folder / "a.png", "--codec", folder / "codec.safetensors", "--quality", 2
    )
    assert code == 2
    assert "expected --codec or --quality, found both" in wrong


def test_effort_needs_a_trade(folder: Path, retrellis: Command) -> None:
    effort = ("encode", folder / "a.png", "--force", "--effort", 1)
    assert retrellis(*effort, "--quality", 2)[0] == retrellis(*effort, "--codec", "quality-2")[0] == 0
    codec = ("--codec", folder / "codec.safetensors")
    code, _, wrong = retrellis(*effort, *codec)
    assert code == 1
    assert (
        "--effort with --codec: expected --lmbda, the λ that the codec was trained for, found none" in wrong
    )
    assert retrellis(*effort, *codec, "--lmbda", "0.01")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantizer", "urq"), "--quantizer urq: expected --codec with it, found none"),
        (("--workspace", "w"), "--workspace w: expected --codec with it, found none"),
        (("--lmbda", "0.1"), "--lmbda is the trade of --effort: expected both, found no --effort"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(
    folder: Path, retrellis: Command, options: tuple[str, ...], message: str
) -> None:
    code, _, wrong = retrellis("encode", folder / "a.png", *options)
    assert code == 2
    assert message in wrong
