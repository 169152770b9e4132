"""What a user is told who made a mistake: one sentence that says what to do, an exit code, and nothing lost."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from laboratory import Lab, resize

from jobs import cli
from jobs.import_codec import read_codec
from pipeline.codec.compressai import export_state_dict
from pipeline.codec.hyperprior import MeanScaleHyperprior


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab.new(tmp_path / "lab")


def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit code and last words of a command."""
    monkeypatch.setattr(sys, "argv", ["retrellis", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


def test_a_workspace_of_another_version_is_left_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = Path(lab.root) / "workspace.json"
    mark.parent.mkdir()
    mark.write_text('{"version": 99}')
    code, words = told(monkeypatch, capsys, "run", lab.file, "--workspace", lab.root)
    assert code == 1
    assert words.startswith(
        f"retrellis: workspace {lab.root}: expected version 1, found 99 in workspace.json."
    )
    assert "name another workspace by --workspace" in words
    assert list(mark.parent.iterdir()) == [mark]


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_images_is_named(
    lab: Lab, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = lab.folder / folder
    if folder == "empty":
        place.mkdir()
    code, words = told(
        monkeypatch, capsys, "run", lab.file, "--workspace", lab.root, "--set", f"train.images={place}"
    )
    assert code == 1
    assert words.startswith(f"retrellis: {place}: expected a folder with images (")
    assert "found none in it or below" in words


def test_a_checkpoint_whose_shapes_do_not_fit_is_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = export_state_dict(MeanScaleHyperprior(8, 12))
    state["g_a.2.weight"] = state["g_a.2.weight"][:, :5]
    torch.save(state, lab.folder / "foreign.pth")
    code, words = told(
        monkeypatch,
        capsys,
        "import",
        f"{lab.folder}/foreign.pth",
        "--lmbda",
        "0.013",
        "--workspace",
        lab.root,
    )
    assert code == 1
    assert "g_a.2.weight" in words
    assert "(8, 8, 5, 5)" in words
    assert "(8, 5, 5, 5)" in words
    assert not lab.records("results")


@pytest.mark.parametrize("value", ["-1", "0", "inf", "nan"])
def test_a_codec_is_imported_for_a_lmbda_that_there_can_be(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, words = told(monkeypatch, capsys, "import", "any.pth", "--lmbda", value)
    assert code == 2
    assert words == (
        f"retrellis: Invalid value for '--lmbda': expected a finite number above 0, found {value}\n"
    )


def saved(value: object) -> bytes:
    """What torch.save writes."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a picture", r"not a checkpoint: .* found 9 bytes that begin with b'a pictur'"),
        (saved({})[:-30], r"damaged, or holds more than tensors"),
        (saved(torch.nn.Linear(1, 1)), r"save the network's state_dict\(\) alone"),
        (saved([1, 2]), r"found no mapping of names to tensors"),
        (saved({"epoch": 3}), r"found no mapping of names to tensors"),
    ],
    ids=["other", "cut", "pickle", "list", "numbers"],
)
def test_a_file_that_is_no_checkpoint_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_codec(data)


def test_export_writes_a_whole_file_or_says_why_not(
    lab: Lab, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = lab.folder / "foreign.pth", ["--workspace", lab.root]
    torch.save(export_state_dict(MeanScaleHyperprior(8, 12).initialise(torch.Generator())), source)
    assert told(monkeypatch, capsys, "import", str(source), "--lmbda", "0.013", *there) == (0, "")
    digest = lab.record("import")["outputs"]["codec"]["digest"]

    def export(file: Path) -> tuple[int, str]:
        return told(monkeypatch, capsys, "export", digest[:8], str(file), *there)

    nowhere = lab.folder / "no" / "y.pth"
    code, words = export(nowhere)
    assert (code, nowhere.parent.exists()) == (1, False)
    assert words == (
        f"retrellis: {nowhere}: expected a file's name in a folder that there is, "
        f"found no folder {nowhere.parent}\n"
    )
    assert export(lab.folder)[1].endswith("found a folder or device of that name\n")
    resize(small_disk, 64)
    code, words = export(small_disk / "y.pth")
    assert (code, list(small_disk.iterdir())) == (1, [])
    assert words.startswith("retrellis: disk full: expected room for ")
    resize(small_disk, 1 << 13)
    assert export(small_disk / "y.pth") == (0, "")
    assert read_codec((small_disk / "y.pth").read_bytes()).digests().codec == digest


def test_no_workspace_to_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, words = told(monkeypatch, capsys, "status", "--workspace", str(tmp_path / "none"))
    assert code == 1
    assert words.startswith(
        f"retrellis: no workspace at {tmp_path}/none: expected a file workspace.json there."
    )


def test_usage_errors_and_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, words = told(monkeypatch, capsys, "status", "--folow")
    assert code == 2
    assert words.startswith("retrellis: No such option: --folow")
    code, words = told(monkeypatch, capsys)
    assert (code, words.splitlines()[0]) == (2, "Usage: retrellis [OPTIONS] COMMAND [ARGS]...")
    assert told(monkeypatch, capsys, "run", "--help") == (0, "")


@pytest.mark.usefixtures("ray_address")
def test_a_folder_in_which_no_image_is_usable(lab: Lab) -> None:
    broken = lab.folder / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"not an image")
    (broken / "b.jpg").write_bytes(b"")
    with pytest.raises(Exception, match="no usable image among 2 files") as failed:
        lab.run(f"train.images={broken}", stage="train")
    assert f"{broken}/a.png: " in str(failed.value)
    assert "give another folder" in str(failed.value)
