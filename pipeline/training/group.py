"""Several workers on one training: each computes its rows of every batch, and all take the same step.

What is drawn at random is drawn for the whole batch by each of them, so the number of workers decides who computes
what, and not what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, distributed


class PeerLost(RuntimeError):
    """Another worker of the group cannot be reached any more."""


@dataclass(frozen=True)
class Group:
    """This worker's place in a group; by default it is alone.

    Attributes:
        rank: 0 … size − 1. The worker of rank 0 tells what happens, and keeps checkpoints and results.
        size: number of workers.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_process(cls) -> Self:
        """As `torch.distributed` has been set up in this process, if it has."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def rows(self, batch: int) -> slice:
        """This worker's rows of a batch.

        Raises:
            ValueError: the workers' shares would not be equal.
        """
        if batch % self.size:
            raise ValueError(
                f"expected a batch that {self.size} workers can share equally, found {batch}: "
                f"name a multiple of {self.size}, or another number of workers"
            )
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the workers, to the same bits on all of them.

        Args:
            tensors: of one dtype and device, and of the same shapes on every worker.

        Raises:
            PeerLost: a worker has died, or does not answer.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _among_peers():
            distributed.all_reduce(flat)
        flat /= self.size
        means = flat.split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def mean_count(self, count: Tensor) -> Tensor:
        """A worker's number of places that are set, a scalar, as the mean over the workers.

        Sums over such places, divided by it, have as their mean over the workers the sum over all the places of the
        batch divided by their number, also where the workers have different numbers of them.
        """
        if self.size > 1:
            count = count.float()
            self.average([count])
        return count

    def from_first(self, data: bytes) -> bytes:
        """What the worker of rank 0 calls this with, on every worker. Raises PeerLost."""
        if self.size == 1:
            return data
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        size = torch.tensor([len(data)], device=device)
        with _among_peers():
            distributed.broadcast(size, 0)
            mine = np.frombuffer(data if self.rank == 0 else bytes(int(size)), np.uint8)
            box = torch.from_numpy(mine.copy()).to(device)
            distributed.broadcast(box, 0)  # as plain bytes: broadcast_object_list would unpickle them
        return box.cpu().numpy().tobytes()


ALONE = Group()


@contextmanager
def _among_peers() -> Iterator[None]:
    """What torch raises where a peer has died says nothing of it."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"a worker of this training is gone: {error}") from error
