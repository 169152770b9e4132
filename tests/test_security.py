"""What strangers can do to us: by Ray's ports, by the pages we serve, by files that hold code or lead elsewhere."""

from __future__ import annotations

import ast
import inspect
import io
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
import ray._private.node
import torch
from ray.exceptions import AuthenticationError

from jobs import access, experiment
from jobs.experiment import ExperimentError
from jobs.import_codec import read_codec
from storage.images import ImageError, ImageStore, pixel_digest
from storage.keys import canonical_json
from storage.lineage import ui_command
from storage.memmap import RaggedArrays
from storage.parts import decode
from storage.workspace import Workspace

ROOT = Path(__file__).parents[1]
SOURCES = [file for package in ("pipeline", "storage", "jobs") for file in (ROOT / package).rglob("*.py")]
METRICS_PORT = 44227  # of Ray's dashboard
LOOPBACK = {"127.0.0.1", "::1"}


@dataclass(frozen=True)
class Code:
    """What an attacker pickles: reading it makes a file."""

    mark: str

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.mkdir, (self.mark,))


# Ray


def test_ray_wants_a_token_and_its_dashboard_listens_on_loopback(ray_address: str) -> None:
    access.require_token(ray_address)
    dashboards = [
        p
        for p in psutil.Process().children(recursive=True)
        if "dashboard.py" in (command := " ".join(p.cmdline())) and ray_address in command
    ]
    assert dashboards  # Ray runs a part of it even where none is wanted
    listening = [s for p in dashboards for s in p.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
    # Its numbers for Prometheus, which it begins to give some seconds after its start, are open to all: docs/cluster.md
    assert {socket.laddr.ip for socket in listening if socket.laddr.port != METRICS_PORT} <= LOOPBACK


def test_a_driver_without_the_token_is_told_where_it_belongs() -> None:
    with (
        pytest.raises(
            access.NoAccess, match=r"expected the cluster's token in ~/.ray/auth_token, found none"
        ),
        access.explained("192.0.2.10:6379"),
    ):
        raise AuthenticationError("")


def test_a_ray_that_does_not_start_on_a_busy_machine_is_no_riddle() -> None:
    (said,) = re.findall(
        r'"(The current node timed out during startup\.)', inspect.getsource(ray._private.node)
    )
    with (
        pytest.raises(
            access.NotStarted,
            match=rf"found: {said} The machine's load is .* same command .*session_latest/logs$",
        ),
        access.explained("local"),
    ):
        raise Exception(said)  # as Ray does, after 30 s
    with pytest.raises(RuntimeError, match="of another kind"), access.explained("local"):
        raise RuntimeError("of another kind")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of somebody who has not used Ray yet."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_is_made_where_ray_would_make_one_that_all_can_read(home: Path) -> None:
    token = home / ".ray/auth_token"
    access.prepare("192.0.2.10:6379", insecure=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not token.exists()  # a new one would not be the cluster's
    access.prepare("local", insecure=False)
    assert token.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert list(token.parent.iterdir()) == [token]


def test_a_token_that_others_can_read_is_closed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = home / "mounted"
    token.write_text("secret")
    token.chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    access.prepare("local", insecure=False)
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "secret"
    assert not (home / ".ray").exists()


# Pages


def test_pages_are_served_to_this_machine_alone() -> None:
    command, _ = ui_command("/workspace", 5000)
    assert command[command.index("--host") + 1] in LOOPBACK
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*.yaml"),
        *ROOT.glob("deploy/*.yaml"),
    ]
    for file in texts:
        text = file.read_text()
        for option, host in re.findall(r"(--(?:dashboard-)?host)[= ](\S+)", text):
            assert host in LOOPBACK, f"{file.name}: {option} {host}"
        for line in re.findall(r"^\s*(?:- )?ray start .*--head.*", text, re.MULTILINE):
            assert "--dashboard-host=127.0.0.1" in line, f"{file.name}: {line}"


# Files that hold code


PICKLERS = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def _calls(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Dotted name, constant keywords and line of every call in a source file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            constants = {
                word.arg: word.value.value
                for word in node.keywords
                if word.arg and isinstance(word.value, ast.Constant)
            }
            yield ast.unparse(node.func), constants, node.lineno


def test_no_source_unpickles_unpacks_or_evaluates() -> None:
    assert len(SOURCES) > 100
    for file in SOURCES:
        for name, words, line in _calls(file):
            where, (module, _, function) = f"{file}:{line}: {name}", name.rpartition(".")
            if name in ("torch.load", "torch.jit.load", "torch.hub.load"):
                assert words.get("weights_only") is True, where
            if name in ("np.load", "numpy.load"):
                assert words.get("allow_pickle") is False, where
            if function == "YAML":
                assert words.get("typ") == "safe", where
            assert not (module in PICKLERS and function in ("load", "loads", "Unpickler")), where
            assert function not in ("extract", "extractall", "unpack_archive"), where
            assert name not in ("eval", "exec", "yaml.load", "WebDataset", "webdataset.WebDataset"), where


def test_a_checkpoint_that_would_run_code_runs_none(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    state = {"g_a.0.weight": Code(str(mark))}
    data = io.BytesIO()
    torch.save(state, data)
    for hostile in (data.getvalue(), pickle.dumps(state, protocol=2)):
        with pytest.raises(ValueError, match="read without running code from it"):
            read_codec(hostile)
    assert not mark.exists()
    pickle.loads(pickle.dumps(state))
    assert mark.exists()  # it would have


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir"])
def test_an_experiment_file_makes_no_objects(tag: str, tmp_path: Path) -> None:
    file, mark = tmp_path / "hostile.yaml", tmp_path / "ran"
    file.write_text(f"name: {tag} ['{mark}']\n")
    with pytest.raises(ExperimentError, match="could not determine a constructor"):
        experiment.load(str(file))
    assert not mark.exists()


def test_an_array_of_objects_is_not_read(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = io.BytesIO()
    np.save(data, np.array([Code(str(mark))], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "index.npz", "w") as index:
        for name in ("offsets.npy", "shapes.npy", "dtype.npy"):
            index.writestr(name, data.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        RaggedArrays(tmp_path)
    assert not mark.exists()


def test_a_latent_part_of_zarr_2_is_not_read_whose_codecs_unpickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMCODECS_ALLOW_UNSAFE_PICKLE_DECODE", "1")  # not even then
    mark = tmp_path / "ran"
    array = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "compressor": None,
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
        "fill_value": None,
        "order": "C",
    }
    objects = {".zgroup": canonical_json({"zarr_format": 2})}
    for name in ("indices", "offsets", "shapes", "digests"):
        objects |= {f"{name}/.zarray": canonical_json(array), f"{name}/0": pickle.dumps(Code(str(mark)))}
    with pytest.raises(ValueError, match="expected a part of layout 2, found None"):
        decode(objects)
    assert not mark.exists()


# Files that lead elsewhere


@pytest.mark.parametrize(
    "member",
    ["code.pyd", "code.pickle", "code.pth", "../escaped.png", "/escaped.png", "link.png", "hard.png"],
)
def test_a_shard_is_never_unpacked_and_nothing_in_it_is_more_than_bytes(member: str, tmp_path: Path) -> None:
    workspace, mark = Workspace.open(str(tmp_path / "workspace")), tmp_path / "ran"
    outside = tmp_path / "outside.png"
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(outside)
    name = pixel_digest(np.zeros((8, 8, 3), np.uint8))
    data = pickle.dumps(Code(str(mark)))
    entry = tarfile.TarInfo(member)
    entry.type = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE}.get(member, tarfile.REGTYPE)
    entry.linkname = str(outside)
    entry.size = len(data) if entry.type == tarfile.REGTYPE else 0
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        tar.addfile(entry, io.BytesIO(data))
        (position,) = [found.offset_data for found in tar.getmembers()]
    workspace.put("images/hostile.tar", shard.getvalue())
    before = _files(tmp_path)
    told = _unreadable(workspace, name, "images/hostile.tar", position, len(data))
    assert "expected pixels of that digest, found" in told
    assert not mark.exists()
    assert _files(tmp_path) == before | {"workspace/records/images/hostile.json"}


@pytest.mark.parametrize("place", ["../outside.png", "images/../../outside.png", "{outside}"])
def test_a_record_leads_to_nothing_outside_its_workspace(place: str, tmp_path: Path) -> None:
    workspace, outside = Workspace.open(str(tmp_path / "workspace")), tmp_path / "outside.png"
    pixels = np.zeros((8, 8, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(outside)
    place = place.format(outside=outside)
    told = _unreadable(workspace, pixel_digest(pixels), place, 0, outside.stat().st_size)
    assert "cannot be read from shard" in told


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _unreadable(workspace: Workspace, name: str, place: str, position: int, size: int) -> str:
    """What is told of an image that a hostile record names."""
    entry = {"digest": name, "height": 8, "width": 8, "offset": position, "size": size}
    about = {"object": place, "bytes": 0, "sha256": None, "images": [entry], "sources": []}
    workspace.records.create("images/hostile", {"version": 1, "attempt": "0", "created_ns": 0, **about})
    with pytest.raises(ImageError) as failed:
        ImageStore(workspace).read(name)
    return str(failed.value)
