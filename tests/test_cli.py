"""What a user is told who made a mistake: one sentence that says what to do, an exit code, and nothing lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from laboratory import Lab

from jobs import cli
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
