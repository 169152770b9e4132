"""The next step's batch, made while this one's is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes batches in a thread, always one more than was asked for: the last of a training is taken by nobody.

    Worth it where another device computes: on the processor the two would share its cores.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: tuple[int, Future[T]] | None = None

    def __call__(self, make: Callable[[int], T], step: int) -> T:
        """What `make(step)` gives, or raises."""
        (expected, made), self._waiting = self._waiting or (None, None), None
        value = made.result() if made and expected == step else make(step)
        self._waiting = step + 1, self._thread.submit(make, step + 1)
        return value
