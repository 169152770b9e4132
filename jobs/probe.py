"""The start probe: before work begins on a cluster, a small task on every node says what it would work with.

Code is installed on the nodes, not shipped with tasks. A node with other code or versions would compute other bits;
one that does not see the workspace would fail in the middle. Nodes that join later are not looked at.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from storage.workspace import Workspace

ANSWER_S = 120.0  # a busy node may take long to start a worker
Seen = Mapping[str, tuple[str, str]]  # what is looked at -> what was found, and where


class UnfitNodes(ValueError):
    """Nodes of the cluster differ from the driver, or do not see the workspace."""


def look_at_nodes(ray: Any, workspace: Workspace) -> int:
    """Compare every living node with this process; their number. One that dies meanwhile is none.

    Raises:
        UnfitNodes: names each node, what was expected, what was found, and the path.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name, note = f"probe/{uuid.uuid4()}", uuid.uuid4().hex
    workspace.put(name, note.encode())
    try:
        look = _looker()
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        asked = {}
        for key, node in _alive(ray).items():
            only = NodeAffinitySchedulingStrategy(key, soft=False)
            answer = task.options(name="probe", scheduling_strategy=only).remote(workspace.root, name, note)
            asked[answer] = key, f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        expected = look(workspace.root, name, note)
        looked = [
            (*where, _seen(ray, answer) if answer in answered else f"no answer within {ANSWER_S:g} s")
            for answer, where in asked.items()
        ]
        alive = _alive(ray)
        there = [(node, seen) for key, node, seen in looked if key in alive]
        wrong = [
            f"{node}: {difference}" for node, seen in there for difference in _differences(expected, seen)
        ]
    finally:
        workspace.remove(name)
    if wrong:
        raise UnfitNodes(
            "nodes of the cluster are not fit for this run, and nothing was computed. Install the same code and "
            "packages on every node (docs/cluster.md), and have the workspace where all see it under one path:"
            + "".join(f"\n  {line}" for line in wrong)
        )
    return len(there)


def _alive(ray: Any) -> dict[str, Any]:
    """Nodes that Ray takes to be alive, by their ids. It learns of a death by silence, some time after."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _seen(ray: Any, reference: Any) -> Seen | str:
    """What a node has found, or why it has found nothing."""
    try:
        seen: Seen = ray.get(reference)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
    return seen


def _differences(expected: Seen, seen: Seen | str) -> Iterator[str]:
    """What stands in the way on one node."""
    if isinstance(seen, str):
        yield seen
        return
    for what, (value, _) in expected.items():
        found, path = seen[what]
        if found != value:
            yield f"{what}: expected {value}, found {found} in {path}"


def _looker() -> Callable[[str, str, str], Seen]:
    """What runs on a node: a function inside a function travels by value, since the node may not have this file."""

    def look(root: str, name: str, note: str) -> Seen:
        import hashlib
        import platform
        import sys
        from importlib.metadata import PackageNotFoundError, distribution
        from importlib.util import find_spec
        from pathlib import Path

        def version(package: str) -> tuple[str, str]:
            try:
                found = distribution(package)
            except PackageNotFoundError:
                return "none", sys.prefix
            return found.version.partition("+")[0], str(found.locate_file(""))  # +cpu and +cu130 may differ

        def code() -> tuple[str, str]:
            """Digest of our sources; a version alone does not tell a copy that was not brought up to date."""
            hasher, folder = hashlib.sha256(), Path(sys.prefix)
            for package in ("pipeline", "storage", "jobs"):
                spec = find_spec(package)
                if spec is None or spec.origin is None:
                    return f"no package {package}", sys.prefix
                folder = Path(spec.origin).parent
                for file in sorted(folder.rglob("*.py")):
                    hasher.update(f"{package}/{file.relative_to(folder)}".encode() + file.read_bytes())
            return f"sources {hasher.hexdigest()[:12]}", str(folder.parent)

        def workspace() -> str:
            try:
                from storage.workspace import Workspace

                found = Workspace.open(root, create=False).get(name).decode()
            except Exception as error:  # whatever it is, the node cannot read there
                return f"{type(error).__name__}: {str(error).partition('. ')[0]}"
            return "the driver's note" if found == note else "another note"

        return {
            "code": code(),
            "python": (platform.python_version(), sys.executable),
            **{package: version(package) for package in ("retrellis", "torch", "numpy", "zarr", "ray")},
            "workspace": (workspace(), root),
        }

    return look
