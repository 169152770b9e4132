"""A training so small that a test can afford several: its settings and its images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.exc import InductorError

from pipeline.training.base import BaseSettings

BASE = BaseSettings(
    N=4,
    M=6,
    lmbda=0.01,
    steps=6,
    batch=2,
    crop=64,
    optimizer="muon",
    learning_rate=1e-3,
    warmup=2,
    clip=1.0,
    precision="float32",
    seed=3,
)


def pictures() -> list[np.ndarray]:
    """Smooth random pictures: 150×200, and one smaller than a crop."""
    generator = np.random.default_rng(0)

    def picture(height: int, width: int) -> np.ndarray:
        coarse = torch.from_numpy(generator.random((1, 3, 8, 8), np.float32))
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        return (fine[0].permute(1, 2, 0) * 255).byte().numpy()

    return [picture(150, 200), picture(200, 150), picture(40, 50)]


def uncompilable(function: Callable[..., object], failing_pass: str) -> Callable[..., object]:
    """What torch.compile gives where something it needs is missing: its forward or its backward pass fails at first."""

    def refuse(*_: object) -> Callable[..., object]:
        raise InductorError(NotImplementedError("no such operation here"), None)

    passes = {"fw_compiler": lambda graph, _: graph, "bw_compiler": lambda graph, _: graph}
    passes["fw_compiler" if failing_pass == "forward" else "bw_compiler"] = refuse
    return torch.compile(function, backend=aot_autograd(**passes), dynamic=False)
