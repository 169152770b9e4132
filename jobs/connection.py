"""The connection to Ray: one embedded in this process, or a cluster's, and what its workers inherit."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import access

OBJECT_STORE_BYTES = 200 * 2**20  # embedded: only names and numbers travel
KEPT_BYTES = 4 * 2**30  # of freed memory, by a worker while it lives
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about num_gpus=0
    # A task on a host whose network is gone fails after their sum; Ray's defaults let it wait for seven minutes.
    # More often than once a minute, and nodes that have other settings than the driver end the connection.
    "RAY_grpc_client_keepalive_time_ms": "60000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
}
"""What Ray itself is to know, unless the user has set it; `ray_cluster.yaml` has the same."""
WORKER_VARIABLES = {
    # Threads that spin for long cost two thirds on a busy machine, those that never do a tenth on an idle one.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "3000",
    # Tensors lie in huge pages that are kept for the next ones, not given back to the system and zeroed again
    # (benchmarks/training_step.txt). Only glibc reads it.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
    f":glibc.malloc.mmap_threshold={KEPT_BYTES}:glibc.malloc.trim_threshold={KEPT_BYTES}",
}
"""What workers inherit, unless the user has set it; `ray_cluster.yaml` has the same."""
PACKAGES = Path(__file__).resolve().parents[1]  # the folder that holds jobs/, pipeline/ and storage/


def connect(address: str, insecure: bool) -> tuple[Any, bool]:
    """Ray, and whether this call has connected it.

    Raises NoAccess, NotStarted, OpenCluster.

    When this process is killed, its embedded Ray ends within seconds, but for two idle agents that take a minute.
    """
    for name, value in RAY_VARIABLES.items():
        os.environ.setdefault(name, value)
    access.prepare(address, insecure)
    import ray

    if ray.is_initialized():
        return ray, False
    embedded: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    # Ray puts the current folder first on the workers' sys.path: a folder `jobs/` there would hide ours
    with (
        contextlib.chdir(PACKAGES),
        _workers_environment(),
        _handler_of_sigterm(),
        access.explained(address),
    ):
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(embedded if address == "local" else {}),
        )
    if address != "local" and not insecure:
        try:
            access.require_token(ray.get_runtime_context().gcs_address)
        except access.OpenCluster:
            ray.shutdown()
            raise
    return ray, True


@contextlib.contextmanager
def _workers_environment() -> Iterator[None]:
    """WORKER_VARIABLES where not set, for what is started inside: this process and its other children keep theirs."""
    added = {name: value for name, value in WORKER_VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _handler_of_sigterm() -> Iterator[None]:
    """The handler stays what it was: Ray puts its own there, which ends this process in the middle of anything."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
