"""A training on several workers at once: Ray Train starts them, connected by torch.distributed, and ends them together.

    driver ──► lead, a task of no core ──► Ray Train's controller ──► workers 0 … N − 1, gloo or NCCL between them
       ▲                                                                  │
       └─────────────────────── queue of messages ◄── of worker 0 ────────┘

Ray Train carries neither messages nor checkpoints: worker 0 keeps checkpoints by itself, as a single worker does, and
puts its messages into a queue, in order. When a worker is lost, so is the group: `Cluster.stream` starts it again, and
it goes on from the newest checkpoint.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.cluster import GroupLost, generate
from jobs.shares import Share
from storage.memmap import LocalCache

if TYPE_CHECKING:
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

POLL_S = 0.5
END_S = 30.0
RAY_TRAIN_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),  # also how long an end goes unnoticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more; a node that goes is a lost worker
}
Timed = tuple[float, Any]  # seconds since the message before, and a message


def open_queue() -> Queue:
    """For messages of a group's first worker; it belongs to this process."""
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0})


def receive(messages: Queue, lead: Any, check: Callable[[], None]) -> Iterator[Timed]:
    """What the first worker puts, until `lead` has ended (a reference to that task).

    Args:
        check: called now and then; raises where this should stop.

    Raises:
        As `lead`.
    """
    import ray
    from ray.exceptions import RayActorError

    ended = False
    while not ended:
        check()
        ended = bool(ray.wait([lead], timeout=POLL_S)[0])
        try:
            yield from messages.get_nowait_batch(messages.qsize())
        except RayActorError as error:
            raise GroupLost(f"the queue of a group's messages was lost: {error}") from None
    ray.get(lead)


def end(messages: Queue, lead: Any) -> None:
    """End a group if it has not ended: by Ctrl-C, at which Ray Train ends all its processes; else by force."""
    import ray

    for force in (False, True):
        if not ray.wait([lead], timeout=0)[0]:
            ray.cancel(lead, force=force, recursive=False)
            ray.wait([lead], timeout=END_S)
    messages.shutdown(force=True)


def lead(function: Callable[..., Iterator[Any]], share: Share, args: tuple[tuple[Any, ...], Queue]) -> None:
    """Runs in a task that occupies no core: a function on each of `share.workers` workers.

    Args:
        args: those of the function, and the queue for what the first worker's yields.

    Raises:
        GroupLost: a worker has died.
        What the function raises, with the worker's traceback as a note.
    """
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    os.environ.update(RAY_TRAIN_VARIABLES)
    before = signal.getsignal(signal.SIGINT)
    try:
        _trainer(function, share, *args).fit()
    except WorkerGroupError as error:
        _raise_as_ours(error, share)
    except RayActorError as error:  # a process of Ray Train's own
        raise GroupLost(str(error)) from None
    finally:
        signal.signal(signal.SIGINT, before)  # Ray Train's own would keep the group's processes


def _trainer(
    function: Callable[..., Iterator[Any]], share: Share, args: tuple[Any, ...], messages: Queue
) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": share.num_cpus} | ({"GPU": share.num_gpus} if share.num_gpus else {})
    return TorchTrainer(
        _work,
        train_loop_config={"function": function, "share": share, "args": args, "messages": messages},
        # Workers that share a GPU cannot be connected by NCCL
        torch_config=TorchConfig(backend="nccl" if share.num_gpus >= 1 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=share.workers, use_gpu=bool(share.num_gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray-train",  # an empty folder: Ray Train asks for a place, and is given nothing to keep
            storage_path=str(LocalCache.default().root),
            # `Cluster.stream` tries again, so that there is one policy
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """Runs in each worker."""
    from torch import distributed

    for message in generate(config["function"], config["share"], config["args"]):
        if distributed.get_rank() == 0:
            config["messages"].put(message)


def _raise_as_ours(error: WorkerGroupError, share: Share) -> NoReturn:
    """What a worker itself has raised; otherwise some are dead, and the others have only noticed it."""
    from pipeline.training.group import PeerLost

    for failure in error.worker_failures.values():
        is_of_ray = type(failure).__module__.partition(".")[0] == "ray"
        if not is_of_ray and not isinstance(failure, PeerLost):
            failure.add_note(str(error))  # holds the worker's traceback
            raise failure from None
    raise GroupLost(f"one of {share.workers} workers was lost: {error}") from None
