"""A Ray cluster of several nodes on this machine, all of real processes, any of which can be killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Self

import psutil
from laboratory import patiently, workers_at
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster

# On a busy machine: workers that do not starve, nodes that are slow but not dead
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_agent_register_timeout_ms": "120000",
}


class Nodes:
    """A head without CPUs, to which drivers connect, and nodes of one CPU each, on which all tasks run.

    Attributes:
        address: what drivers connect to.
    """

    def __init__(self, count: int) -> None:
        os.environ |= PATIENT
        enable_token_auth_by_default()  # as an embedded Ray does
        ensure_token_if_auth_enabled()
        self._folder = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets want a short path
        self._before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self._folder  # where Cluster notes its address for whoever asks for any
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """One more node."""
        node = patiently(lambda: self._cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))
        self.nodes.append(node)

    def working(self, function: str) -> list[int]:
        """Positions in `nodes` of those that run a function just now."""
        return [i for i, node in enumerate(self.nodes) if workers_at(function, _raylet(node))]

    def workers(self, functions: str | Iterable[str]) -> list[psutil.Process]:
        """Processes that run a function (or one of several) just now, of all nodes."""
        return [worker for node in self.nodes for worker in workers_at(functions, _raylet(node))]

    def kill(self, position: int) -> None:
        """As a power cut does: all of a node's processes at once."""
        node = self.nodes.pop(position)
        kill_all(_raylet(node))
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """The machine with Ray's own bookkeeping, its drivers apart."""
        head = self._cluster.head_node
        for processes in head.all_processes.values():
            for each in processes:
                kill_all(each.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()
        if self._before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = self._before
        shutil.rmtree(self._folder, ignore_errors=True)


def _raylet(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    pid: int = raylet.process.pid
    return pid


def kill_all(pid: int) -> None:
    """kill -9 of a process and all below it."""
    process = psutil.Process(pid)
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
