"""A step of training the base codec, beside CompressAI's, with and without the memory settings that workers get.

    python benchmarks/training_step.py FOLDER [ROUNDS]      # in the environment of benchmarks/peers.py

N = 64, M = 96, batches of 8 crops of 256 × 256 from a folder's images, two threads. Each line is a process of its own
in each round, since memory settings are read when a process starts; medians over rounds of STEPS steps after a warm-up.

    ours         `BaseTraining.advance`: loading, bfloat16 where the processor has it, clipping, both optimizers
    CompressAI   its `MeanScaleHyperprior` and the steps of its examples/train.py: Adam 1e-4, clipping at 1, auxiliary
                 Adam 1e-3, float32; its crops lie in memory already
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import machine
from peers import compressai

from jobs.cluster import WORKER_VARIABLES
from pipeline.pixels import canonical_pixels
from pipeline.training.base import BaseSettings, BaseTraining, random_crop

N, M, LMBDA, BATCH, CROP = 64, 96, 0.013, 8, 256
WARMUP, STEPS, IMAGES = 6, 20, 32


def ours(pixels: list[np.ndarray]) -> Callable[[], object]:
    settings = BaseSettings(N, M, LMBDA, 1000, BATCH, CROP, 1e-4, 10, 1.0, "auto", 0)
    return BaseTraining(settings, pixels).advance


def theirs(pixels: list[np.ndarray], channels_last: bool) -> Callable[[], object]:
    network = compressai("models").MeanScaleHyperprior(N, M).train()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    quantiles = network.entropy_bottleneck.quantiles
    main = torch.optim.Adam([p for p in network.parameters() if p is not quantiles], 1e-4)
    auxiliary = torch.optim.Adam([quantiles], 1e-3)
    generator = np.random.default_rng(0)
    crops = np.stack([random_crop(image, CROP, generator) for image in pixels[:BATCH]])
    image = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    image = image if channels_last else image.contiguous()

    def step() -> None:
        main.zero_grad()
        auxiliary.zero_grad()
        out = network(image)
        bpp = sum(-likelihoods.log2().sum() for likelihoods in out["likelihoods"].values())
        mse = torch.nn.functional.mse_loss(out["x_hat"], image)
        loss = LMBDA * 255**2 * mse + bpp / (BATCH * CROP * CROP)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        main.step()
        network.aux_loss().backward()
        auxiliary.step()

    return step


VARIANTS = {
    "ours": ours,
    "CompressAI": lambda pixels: theirs(pixels, False),
    "CompressAI, channels last": lambda pixels: theirs(pixels, True),
}


def measure(variant: str, folder: str) -> None:
    """In a process of its own: prints images a second."""
    torch.set_num_threads(2)
    files = sorted(Path(folder).iterdir())
    pixels = [canonical_pixels(path.read_bytes()) for path in files[:: len(files) // IMAGES][:IMAGES]]
    step = VARIANTS[variant](pixels)
    for _ in range(WARMUP):
        step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    print(STEPS * BATCH / (time.perf_counter() - start))


def main(folder: str, rounds: int = 5) -> None:
    print(machine("torch", "compressai"))
    print(
        f"{N = }, {M = }, batch {BATCH}, {CROP} × {CROP}; images a second, median of {rounds} rounds in turn\n"
    )
    runs = [(name, kept) for name in VARIANTS for kept in (True, False)]
    found: dict[tuple[str, bool], list[float]] = {run: [] for run in runs}
    for _ in range(rounds):
        for name, kept in runs:
            variables = {"OMP_WAIT_POLICY": "passive"} | (WORKER_VARIABLES if kept else {})
            command = [sys.executable, __file__, "--measure", name, folder]
            done = subprocess.run(
                command, env={**os.environ, **variables}, check=True, capture_output=True, text=True
            )
            found[name, kept].append(float(done.stdout))
    reference = np.median(found["CompressAI", False])
    print(f"  {'':28} {'workers’ memory':>16} {'plain memory':>13}   over CompressAI as it comes")
    for name in VARIANTS:
        kept, plain = (float(np.median(found[name, k])) for k in (True, False))
        print(f"  {name:28} {kept:16.1f} {plain:13.1f}   {kept / reference:.2f}, {plain / reference:.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1], *map(int, sys.argv[2:3]))
