"""`torch.compile` where it works, and the plain function where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

T = TypeVar("T")


class Fused:
    """A function that `torch.compile` fuses at its first call, if that is wanted and torch can.

    Attributes:
        plain: the function itself.
        function: what is called now.
    """

    def __init__(self, plain: Callable[..., Any], compiled: bool) -> None:
        self.plain = plain
        self.function = torch.compile(plain, dynamic=False) if compiled else plain

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)

    def attempt(self, step: Callable[[], T], remarks: list[str]) -> T:
        """A training step that calls this function; once more without fusing where torch turns out to be unable.

        Args:
            step: a backward pass is compiled when it is first run, so this is all of a step. Until that pass is over
                it changes nothing that it reads, and exchanges nothing with other workers.
            remarks: gets one that says so.
        """
        try:
            return step()
        except TorchDynamoException as error:
            if self.function is self.plain:
                raise
            reason = " ".join(str(error).split())[:300]
        self.function = self.plain
        remarks.append(f"torch cannot compile this training, which goes on without: {reason}")
        return step()
