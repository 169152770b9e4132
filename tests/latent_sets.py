"""A small latent set with the results around it, and `retrellis latents` on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_latents import latents

from jobs import cli
from storage.keys import canonical_json
from storage.latents import LatentSet
from storage.parts import PartImage
from storage.workspace import Workspace

KEY, OTHER = "ab" * 32, "ab1" + "c" * 61
DAY_S = 86_400.0
Told = Callable[..., tuple[int, str]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"))


@pytest.fixture
def told(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Exit code and all words of `retrellis latents …` on the workspace."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["retrellis", "latents", *arguments, "--workspace", workspace.root])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out + output.err

    return call


@pytest.fixture
def images() -> list[PartImage]:
    return [latents(number) for number in range(5)]


@pytest.fixture
def stored(workspace: Workspace, images: list[PartImage]) -> LatentSet:
    """A set of two parts, three images and two, with the results that made it and read it."""
    made = LatentSet(workspace, KEY)
    made.write_part("0", images[:3])
    made.write_part("1", images[3:])
    record_results(workspace, made, images)
    return made


def record_results(workspace: Workspace, made: LatentSet, images: list[PartImage]) -> None:
    """ingest, tables, quantize and finetune, as far as the commands read them."""
    rows = [{"digest": name} for name in sorted(image.digest for image in images)]
    manifest = workspace.blobs.put(canonical_json({"images": rows}), ".json")
    codec, tables, axes = "c" * 64, "d" * 64, {"lmbda": 0.013, "quantizer": "tcq8"}
    content = made.content_digest(row["digest"] for row in rows)
    note = {"set": made.key, "images": len(rows)}
    reads = {"codec": codec, "tables": tables, "images": "e" * 64}
    image_set = {"kind": "images", "digest": "e" * 64, "blob": manifest, "note": {}}
    table_set = {"kind": "tables", "digest": tables, "note": {}}
    latent_set = {"kind": "latents", "digest": content, "note": note}
    result(workspace, "ingest", {"images": "train"}, {}, {"images": image_set})
    result(workspace, "tables", {"quantizer": "tcq8"}, {}, {"tables": table_set}, {"kind": "tcq"})
    result(workspace, "quantize", axes, reads, {"latents": latent_set})
    result(workspace, "finetune", {**axes, "arm": "paper", "seed": 0}, {"latents": content}, {})


def result(
    workspace: Workspace,
    stage: str,
    axes: dict[str, Any],
    reads: dict[str, str],
    outputs: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> None:
    key = f"{len(stage):064x}"
    record = {
        "attempt": "a",
        "stage": stage,
        "key": key,
        "experiment": "small",
        "axes": axes,
        "instance": " ".join([stage, *(f"{name}={value}" for name, value in axes.items())]),
        "ingredients": {"settings": settings or {}},
        "reads": reads,
        "outputs": outputs,
        "ended": "2026-01-01T00:00:00.000+00:00",
    }
    workspace.records.create(f"results/{stage}/{key}", record)


def file_of(workspace: Workspace, record: Any, name: str = "nonzero/c/0/0") -> Path:
    return Path(workspace.path(f"{record['group']}/{name}"))


def make_older(workspace: Workspace, prefix: str, days: float) -> None:
    """As if nobody had touched what lies there for so long."""
    then = time.time() - days * DAY_S
    for path in [Path(workspace.path(prefix)), *Path(workspace.path(prefix)).rglob("*")]:
        os.utime(path, (then, then))


def leave_group(workspace: Workspace, record: Any, days: float) -> Path:
    """What a killed task leaves: a group with some objects, one of them half written, and no record."""
    folder = Path(workspace.path(f"latents/{KEY}/2-{'0' * 16}.0-killed"))
    (folder / "indices").mkdir(parents=True)
    (folder / "zarr.json").write_bytes(file_of(workspace, record, "zarr.json").read_bytes())
    (folder / "indices" / "zarr.json#123").write_bytes(bytes(1000))  # hidden from obstore
    make_older(workspace, f"latents/{KEY}/{folder.name}", days)
    return folder


def tree(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}
