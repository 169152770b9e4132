"""Ray, as far as this project needs it: one connection, bounded fan-out, streamed messages, retries of lost workers.

Nothing is connected until the first task is submitted, so a run that reuses everything never starts Ray. Tasks get
the name of the workspace and digests; pixels, latents and weights never pass through the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jobs import access
from jobs.probe import look_at_nodes
from storage.workspace import Workspace

Item = TypeVar("Item")
Message = TypeVar("Message")
Result = TypeVar("Result")

OBJECT_STORE_BYTES = 200 * 2**20  # embedded: only names and numbers travel
KEPT_BYTES = 4 * 2**30  # of freed memory, by a worker while it lives
LOST_WORKER_RETRIES = 3
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
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class InfeasibleResources(ValueError):
    """A stage asks for more than any node has; Ray would wait for ever."""


class TaskFailed(RuntimeError):
    """A task raised, or its worker was lost too often; carries the worker's traceback.

    Attributes:
        cause: what it raised; None where its worker was lost.
    """

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.cause = cause

    def as_one_of(self, what: str) -> TaskFailed:
        """This failure as the example of many; `what` says of how many."""
        failure = TaskFailed(f"{what}, such as: {self}", self.cause)
        for note in getattr(self, "__notes__", ()):
            failure.add_note(note)
        return failure


class Interrupted(RuntimeError):
    """The run was stopped while a task was waited for."""


@dataclass(frozen=True)
class Share:
    """What one task of a stage occupies, and how many are in flight."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    in_flight: int = 64


def set_threads(count: int) -> None:
    """Make torch and Numba use `count` threads; a reused Ray worker keeps those of its last task."""
    import numba
    import torch

    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


class Cluster:
    """A lazy connection: an embedded Ray on this machine, or the cluster at `address` (or RAY_ADDRESS).

    A process that is connected to Ray already, such as a notebook, keeps its connection: it is used, and left open.
    """

    def __init__(self, address: str | None = None, insecure: bool = False) -> None:
        """`insecure` takes a cluster that asks for no token."""
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._insecure = insecure
        self._lock = threading.Lock()
        self._ray: Any = None
        self._is_ours = False
        self._interrupted = False
        self._worked = threading.local()  # each stage instance is driven by one thread
        self._pending: set[Any] = set()  # references that some thread waits for

    def require(self, shares: Mapping[str, Share]) -> None:
        """Connect, and look before any work begins whether each stage's tasks fit on a node.

        Raises:
            InfeasibleResources: names the first stage whose tasks do not.
        """
        for stage, share in shares.items():
            self._start(share, stage)

    def look_at_nodes(self, workspace: Workspace) -> int:
        """After `require`: how many nodes of a cluster are fit for a run. An embedded Ray is: 0.

        Raises:
            UnfitNodes: some are not; says why.
        """
        return 0 if self.address == "local" else look_at_nodes(self._ray, workspace)

    def run(self, function: Callable[..., Result], args: tuple[Any, ...], share: Share) -> Result:
        """One task; its result. Raises TaskFailed, InfeasibleResources."""
        return next(result for _, result in self.map(function, [args], share))

    def map(
        self, function: Callable[..., Result], items: Iterable[tuple[Any, ...]], share: Share
    ) -> Iterator[tuple[tuple[Any, ...], Result]]:
        """One task per item (its arguments), `share.in_flight` at once; pairs come as they finish.

        Raises:
            TaskFailed: after all other items have finished, when one failed; their results are kept.
            InfeasibleResources: before anything is submitted.
            Interrupted: `interrupt` was called.
        """
        failures: list[TaskFailed] = []
        for item, result in self.attempt(function, items, share):
            if isinstance(result, TaskFailed):
                failures.append(result)
            else:
                yield item, result
        if failures:
            raise failures[0]

    def attempt(
        self, function: Callable[..., Result], items: Iterable[tuple[Any, ...]], share: Share
    ) -> Iterator[tuple[tuple[Any, ...], Result | TaskFailed]]:
        """As `map`, but a task's failure comes in place of its result."""
        ray = self._start(share)
        remote = self._remote(_call, function, share)
        waiting = iter(items)
        running: dict[Any, tuple[tuple[Any, ...], int]] = {}
        try:
            while True:
                while len(running) < share.in_flight and (item := next(waiting, None)) is not None:
                    running[self._submit(remote, function, share, item)] = (item, 0)
                if not running:
                    break
                (ready,), _ = ray.wait(list(running), num_returns=1)
                item, losses = running.pop(ready)
                self._pending.discard(ready)
                try:
                    seconds, result = ray.get(ready)
                except Exception as error:
                    self._check_interrupted()
                    if _worker_lost(error) and losses < LOST_WORKER_RETRIES:
                        running[self._submit(remote, function, share, item)] = (item, losses + 1)
                    else:
                        yield item, _failure(error)
                else:
                    self._count(seconds)
                    yield item, result
        finally:  # who wants no more of it leaves nothing running
            for reference in running:
                self._pending.discard(reference)
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)

    def stream(
        self, function: Callable[..., Iterator[Message]], args: tuple[Any, ...], share: Share
    ) -> Iterator[Message]:
        """One task that yields messages, as it yields them. A task whose worker is lost starts again:
        what it has finished it must find by itself (a checkpoint).

        Raises:
            TaskFailed, InfeasibleResources, Interrupted: as `map`.
        """
        self._start(share)
        for attempt in range(LOST_WORKER_RETRIES + 1):
            try:
                yield from self._stream_once(function, args, share)
                return
            except Exception as error:
                self._check_interrupted()
                if attempt == LOST_WORKER_RETRIES or not _worker_lost(error):
                    raise _failure(error) from None

    def _stream_once(
        self, function: Callable[..., Iterator[Message]], args: tuple[Any, ...], share: Share
    ) -> Iterator[Message]:
        remote = self._remote(_generate, function, share, num_returns="streaming")
        references = self._submit(remote, function, share, args)
        try:
            for reference in references:
                seconds, message = self._ray.get(reference)
                self._count(seconds)
                yield message
        finally:
            self._pending.discard(references)

    def worked_s(self) -> float:
        """Seconds that workers have spent for this thread so far; waiting for a free one is not among them."""
        return getattr(self._worked, "seconds", 0.0)

    def _count(self, seconds: float) -> None:
        self._worked.seconds = self.worked_s() + seconds

    def interrupt(self) -> None:
        """Kill the tasks that are waited for: who waits for them gets Interrupted, as does who submits more."""
        with self._lock:
            self._interrupted = True
            for reference in list(self._pending):
                self._ray.cancel(reference, force=True)

    def stop(self) -> None:
        """End the embedded Ray, or leave the cluster."""
        with self._lock:
            if self._is_ours:
                self._ray.shutdown()
            self._ray, self._is_ours = None, False

    def _remote(
        self,
        wrapper: Callable[..., Any],
        function: Callable[..., Any],
        share: Share,
        num_returns: int | str = 1,
    ) -> Any:
        return self._ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus)(wrapper).options(
            name=function.__name__,  # what `ps` and the dashboard show of a worker
            max_retries=0,  # `map` and `stream` resubmit, so that there is one policy
            num_returns=num_returns,
        )

    def _submit(self, remote: Any, function: Callable[..., Any], share: Share, args: tuple[Any, ...]) -> Any:
        with self._lock:
            self._check_interrupted()
            reference = remote.remote(function, _threads(share), args)
            self._pending.add(reference)
        return reference

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise Interrupted("interrupted; what finished is kept") from None

    def _start(self, share: Share, stage: str = "STAGE") -> Any:
        with self._lock:
            if self._ray is None:
                self._ray, self._is_ours = _connect(self.address, self._insecure)
        _require_feasible(self._ray, share, stage)
        return self._ray


def _connect(address: str, insecure: bool) -> tuple[Any, bool]:
    """Ray, and whether this call has connected it.

    Raises NoAccess, OpenCluster.

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
    with contextlib.chdir(PACKAGES), _workers_environment(), access.explained(address):
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


def _require_feasible(ray: Any, share: Share, stage: str) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, wanted in (("CPU", share.num_cpus), ("GPU", share.num_gpus)):
        most = max((float(node.get(resource, 0)) for node in nodes), default=0.0)
        if wanted > most:
            option = f"resources.{stage}.num_{resource.lower()}s"
            raise InfeasibleResources(
                f"{option}: a task wants {wanted:g}, but no node has more than {most:g}: Ray would wait for ever. "
                f"Lower it, as in --set {option}={most:g}, or add a node"
            )


def _threads(share: Share) -> int:
    return max(1, int(share.num_cpus))


def _call(function: Callable[..., Result], threads: int, args: tuple[Any, ...]) -> tuple[float, Result]:
    """Runs in the worker; gives the seconds it took, too."""
    set_threads(threads)
    clock = time.monotonic()
    result = function(*args)
    return time.monotonic() - clock, result


def _generate(
    function: Callable[..., Iterator[Message]], threads: int, args: tuple[Any, ...]
) -> Generator[tuple[float, Message], None, None]:
    """Runs in the worker; gives the seconds since the message before, too."""
    set_threads(threads)
    clock = time.monotonic()
    for message in function(*args):
        yield time.monotonic() - clock, message
        clock = time.monotonic()


def _worker_lost(error: BaseException) -> bool:
    from ray import exceptions

    lost = (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.OutOfMemoryError,
    )
    return isinstance(error, lost)


def _failure(error: BaseException) -> TaskFailed:
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        failure = TaskFailed(f"{type(cause).__name__}: {cause}", cause)
        failure.add_note(ANSI_COLOUR.sub("", str(error)))  # holds the worker's traceback
        return failure
    return TaskFailed(f"{type(error).__name__}: {error}")
