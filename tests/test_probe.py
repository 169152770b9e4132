"""A run on a cluster begins only if it asks for a token, and every node has the driver's code and the workspace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from laboratory import Lab
from ray.cluster_utils import Cluster as Nodes

from jobs.probe import _differences, _looker, look_at_nodes
from storage.workspace import Workspace

ROOT = Path(__file__).parents[1]
LOOK_FROM_ELSEWHERE = """
import sys
from jobs.probe import _looker
seen = _looker()(sys.argv[1], "probe/none", "a note")
print(seen["code"], seen["workspace"], sep="\\n")
"""


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster that asks for no token: a head, and a node whose Zarr is of another version."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    other = tmp_path / "other" / "zarr-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 9.9\n")
    size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Nodes(initialize_head=True, head_node_args=size)
    cluster.add_node(**size, env_vars={"PYTHONPATH": str(other.parent)})
    yield cluster
    cluster.shutdown()


def test_a_cluster_without_token_is_refused_and_then_a_node_of_another_version(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, address = Lab.new(tmp_path / "lab"), nodes.address
    refused = lab.start("run", lab.file, address=address)
    assert refused.finish() == 1
    assert refused.text.splitlines()[-1] == (
        f"retrellis: Ray at {address}: expected that it refuses a call without token, found OK. Whoever reaches its "
        "ports can run any code as its user. Start it with a token (docs/cluster.md), or, in a network whose every "
        "user you trust, add --insecure"
    )
    running = lab.start("run", lab.file, "--insecure", address=address)
    assert running.finish() == 1
    told = running.text.splitlines()
    first = next(
        number for number, line in enumerate(told) if line.startswith("retrellis: nodes of the cluster")
    )
    (difference,) = told[first + 1 :]  # of two nodes, one differs, in this alone
    assert "): zarr: expected 3." in difference
    assert difference.endswith(f", found 9.9 in {tmp_path}/other")
    assert not lab.records("attempts")
    assert not lab.workspace.list("probe")


def test_nodes_that_are_fit_are_counted(ray_address: str, tmp_path: Path) -> None:
    assert look_at_nodes(ray, Workspace.open(str(tmp_path / "workspace"))) == 1


def test_what_a_node_may_find(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path / "workspace"))
    workspace.put("probe/here", b"a note")
    expected = _looker()(workspace.root, "probe/here", "a note")
    assert expected["workspace"] == ("the driver's note", workspace.root)
    assert list(_differences(expected, expected)) == []
    elsewhere = _looker()(f"{tmp_path}/nowhere", "probe/here", "a note")
    (told,) = _differences(expected, elsewhere)
    assert told == (
        f"workspace: expected the driver's note, found WorkspaceError: no workspace at {tmp_path}/nowhere: expected "
        f"a file workspace.json there in {tmp_path}/nowhere"
    )
    other = _looker()(workspace.root, "probe/here", "another driver's")
    assert list(_differences(expected, other)) == [
        f"workspace: expected the driver's note, found another note in {workspace.root}"
    ]
    (told,) = _differences(expected, "WorkerCrashedError: …")
    assert told == "WorkerCrashedError: …"


def test_a_copy_of_the_code_that_is_not_up_to_date_is_told_from_this(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path / "workspace"))
    expected = _looker()(workspace.root, "probe/none", "a note")
    for package in ("pipeline", "storage", "jobs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def there() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", LOOK_FROM_ELSEWHERE, workspace.root],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    same = (expected["code"][0], str(tmp_path))
    assert there()[0] == str(same)
    with (tmp_path / "jobs/train.py").open("a") as file:
        file.write("# old\n")
    code, note = there()
    assert code != str(same)
    assert code.endswith(f"'{tmp_path}')")
    assert "FileNotFoundError" in note  # a workspace, but not this driver's word in it
