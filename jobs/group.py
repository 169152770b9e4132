"""A training on several workers at once: Ray Train starts them, connected by torch.distributed, and ends them together.

    driver ◄──stream── lead (no CPU) ──fit──► Ray Train's controller ──► workers 0 … N − 1, gloo or nccl between them
                         └──◄── queue ◄─────────────────────────────────── worker 0

Ray Train carries neither messages nor checkpoints: worker 0 keeps checkpoints by itself, as a single worker does, and
puts its messages into a queue, in order. When a worker is lost, so is the group: `Cluster.stream` starts it again, and
it goes on from the newest checkpoint. Whoever kills `lead` ends the group, which belongs to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.cluster import GroupLost, Share, generate
from storage.memmap import LocalCache

if TYPE_CHECKING:
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

POLL_S = 0.5
RAY_TRAIN_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),  # also how long an end goes unnoticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more; a node that goes is a lost worker
}
Timed = tuple[float, Any]  # seconds since the message before, and a message


def lead(function: Callable[..., Iterator[Any]], share: Share, args: tuple[Any, ...]) -> Iterator[Timed]:
    """Run a function on each of `share.workers` workers, and give what the first one's yields.

    Raises:
        GroupLost: a worker has died.
        What the function raises, with the worker's traceback as a note.
    """
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError
    from ray.util.queue import Empty, Queue

    os.environ.update(RAY_TRAIN_VARIABLES)
    messages = Queue(actor_options={"num_cpus": 0})
    try:
        with ThreadPoolExecutor(1) as pool:
            group = pool.submit(_trainer(function, share, args, messages).fit)
            while not (group.done() and messages.empty()):
                with contextlib.suppress(Empty):
                    yield messages.get(timeout=POLL_S)
        group.result()
    except WorkerGroupError as error:
        _raise_as_ours(error, share)
    except RayActorError as error:  # a process of Ray Train's own
        raise GroupLost(str(error)) from None
    finally:
        messages.shutdown(force=True)


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
            failure_config=FailureConfig(
                max_failures=0
            ),  # `Cluster.stream` tries again, so that there is one policy
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
