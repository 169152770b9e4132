"""Ray, as far as this project needs it: one connection, bounded fan-out, streamed messages, retries of lost workers.

Nothing is connected until the first task is submitted, so a run that reuses everything never starts Ray. Tasks get
the name of the workspace and digests; pixels, latents and weights never pass through the driver.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from jobs.connection import connect
from jobs.head import Head, HeadLost
from jobs.probe import look_at_nodes
from jobs.shares import Share, fit_together, places, require_feasible
from storage.workspace import Workspace

Item = TypeVar("Item")
Message = TypeVar("Message")
Result = TypeVar("Result")
OnWait = Callable[[], None]

LOST_WORKER_RETRIES = 3
LOOK_EVERY_S = 1.0  # after the head, while tasks are waited for
OUT_OF_MEMORY = (
    f"its node ran out of memory each of {LOST_WORKER_RETRIES + 1} times. Let fewer tasks run there at once, by a "
    "larger `num_cpus` of this stage under `resources`, or let each hold less: images of fewer pixels (their `scale` "
    "or `max_pixels`), in trainings a smaller `batch` or `crop`. Or end what else takes the node's memory"
)
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class GroupLost(RuntimeError):
    """A worker of several that share a training was lost, and with it all of them."""


class TaskFailed(RuntimeError):
    """A task raised, or its worker was lost too often; carries the worker's traceback.

    Attributes:
        cause: what it raised; None where its worker was lost.
        blames_input: whether what it worked on may be at fault: not where its node, or memory, was missing.
    """

    def __init__(self, message: str, cause: BaseException | None = None, blames_input: bool = False) -> None:
        super().__init__(message)
        self.cause, self.blames_input = cause, blames_input

    def as_one_of(self, what: str) -> TaskFailed:
        """This failure as the example of many; `what` says of how many."""
        failure = TaskFailed(f"{what}, such as: {self}", self.cause, self.blames_input)
        for note in getattr(self, "__notes__", ()):
            failure.add_note(note)
        return failure


class Withdrawn(RuntimeError):
    """Who asked for a task wants no more of it."""


class Interrupted(RuntimeError):
    """The run was stopped while a task was waited for."""


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
        self._head: Head | None = None
        self._is_ours = False
        self._interrupted = False
        self._worked = threading.local()  # each stage instance is driven by one thread
        self._pending: set[Any] = set()  # references that some thread waits for
        self._groups: dict[Share, threading.Semaphore] = {}

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

    def fits(self, shares: list[Share]) -> bool:
        """Whether one task of each share can run at the same time; not where nobody knows, as without a head."""
        with contextlib.suppress(Exception):
            return self._ray is not None and fit_together(self._ray, shares)
        return False

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
            HeadLost: the cluster's head does not answer.
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
                for ready in self._wait(list(running)):
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
        self,
        function: Callable[..., Iterator[Message]],
        args: tuple[Any, ...],
        share: Share,
        on_wait: OnWait = lambda: None,
    ) -> Iterator[Message]:
        """One task that yields messages, as it yields them. A task whose worker is lost starts again:
        what it has finished it must find by itself (a checkpoint). With several workers it runs on all of them,
        and the messages are those of the first (see `jobs.group`).

        Args:
            on_wait: called now and then; what it raises ends the task, and passes through.

        Raises:
            TaskFailed, InfeasibleResources, Interrupted, HeadLost: as `map`.
        """
        self._start(share)
        once = self._stream_once if share.workers == 1 else self._stream_group
        for attempt in range(LOST_WORKER_RETRIES + 1):
            try:
                yield from once(function, args, share, on_wait)
                return
            except (HeadLost, Withdrawn):
                raise
            except Exception as error:
                self._check_interrupted()
                if attempt == LOST_WORKER_RETRIES or not _worker_lost(error):
                    raise _failure(error) from None

    def _stream_once(
        self, function: Callable[..., Iterator[Message]], args: tuple[Any, ...], share: Share, on_wait: OnWait
    ) -> Iterator[Message]:
        remote = self._remote(generate, function, share, num_returns="streaming")
        references = self._submit(remote, function, share, args)
        try:
            while (reference := next(self._wait([references], on_wait)[0], None)) is not None:
                seconds, message = self._ray.get(reference)
                self._count(seconds)
                yield message
        except Withdrawn:
            with contextlib.suppress(Exception):
                self._ray.cancel(references, force=True)
            raise
        finally:
            self._pending.discard(references)

    def _stream_group(
        self, function: Callable[..., Iterator[Message]], args: tuple[Any, ...], share: Share, on_wait: OnWait
    ) -> Iterator[Message]:
        """As `_stream_once`, on several workers. A group is asked to end, not killed: see `jobs.group`."""
        from jobs import group

        def check() -> None:
            self._check()
            on_wait()

        with self._room(share):
            messages = group.open_queue()
            remote = self._remote(group.lead, function, Share(num_cpus=0))
            with self._lock:
                self._check_interrupted()
                lead = remote.remote(function, share, (args, messages))
            try:
                for seconds, message in group.receive(messages, lead, check):
                    self._count(seconds * share.workers)
                    yield message
            except HeadLost:
                raise  # nobody is there to be asked for an end
            except BaseException:
                group.end(messages, lead)
                raise
            group.end(messages, lead)

    def _room(self, share: Share) -> threading.Semaphore:
        """For as many groups as fit at once: one that waits holds some processes already."""
        with self._lock:
            fitting = places(self._ray, share) // share.workers
            return self._groups.setdefault(share, threading.Semaphore(fitting))

    def _wait(self, references: list[Any], on_wait: OnWait = lambda: None) -> list[Any]:
        """Those of these references that are ready, one at least; of thousands, to ask for each alone takes long."""
        while True:
            self._check()
            on_wait()
            ready, _ = self._ray.wait(references, num_returns=1, timeout=LOOK_EVERY_S)
            if ready and len(references) > 1:
                ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
            if ready:
                return list(ready)

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
                with contextlib.suppress(Exception):
                    self._ray.cancel(reference, force=True)

    def stop(self) -> None:
        """End the embedded Ray, or leave the cluster."""
        with self._lock:
            if self._is_ours:
                self._ray.shutdown()
            self._ray, self._head, self._is_ours = None, None, False

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
            reference = remote.remote(function, share, args)
            self._pending.add(reference)
        return reference

    def _check(self) -> None:
        """While something is waited for: nobody has interrupted, and the head is there.

        A task on a host that cannot be reached is not cancelled for long, so its end says nothing of an interruption.
        """
        assert self._head
        self._check_interrupted()
        self._head.look()

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise Interrupted("interrupted; what finished is kept") from None

    def _start(self, share: Share, stage: str = "STAGE") -> Any:
        with self._lock:
            if self._ray is None:
                self._ray, self._is_ours = connect(self.address, self._insecure)
                self._head = Head(self._ray.get_runtime_context().gcs_address)
            ray, head = self._ray, self._head
        assert head
        head.wait()
        require_feasible(ray, share, stage)
        return ray


def _call(function: Callable[..., Result], share: Share, args: tuple[Any, ...]) -> tuple[float, Result]:
    """Runs in the worker; gives the seconds it took, too."""
    set_threads(share.threads)
    clock = time.monotonic()
    result = function(*args)
    return time.monotonic() - clock, result


def generate(
    function: Callable[..., Iterator[Message]], share: Share, args: tuple[Any, ...]
) -> Generator[tuple[float, Message], None, None]:
    """Runs in the worker; gives the seconds since the message before, too."""
    set_threads(share.threads)
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
        GroupLost,
    )
    return isinstance(error, lost)


def _failure(error: BaseException) -> TaskFailed:
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        of_memory = isinstance(cause, MemoryError) or "can't allocate memory" in str(cause)  # torch's words
        failure = TaskFailed(f"{type(cause).__name__}: {cause}", cause, blames_input=not of_memory)
        failure.add_note(ANSI_COLOUR.sub("", str(error)))  # holds the worker's traceback
        return failure
    if isinstance(error, exceptions.OutOfMemoryError):
        failure = TaskFailed(f"OutOfMemoryError: {OUT_OF_MEMORY}")
        failure.add_note(str(error).partition("\nObject store memory usage")[0])  # which node, and its limit
        return failure
    crashed = isinstance(error, exceptions.WorkerCrashedError)
    return TaskFailed(f"{type(error).__name__}: {error}", blames_input=crashed)
