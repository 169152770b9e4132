"""A step of training the base codec beside CompressAI's, and what share of the machine's convolution rate it reaches.

    python benchmarks/training_step.py FOLDER [ROUNDS]      # in the environment of benchmarks/peers.py

N = 64, M = 96, batches of 8 crops of 256 × 256 from a folder's images, two threads. Each line is a process of its own
in each round, since memory settings are read when a process starts; medians over rounds of STEPS steps after a warm-up.

    ours, compiled     `BaseTraining.advance` after `torch.compile`: loading, bfloat16 where the processor has it,
                       clipping, both optimizers
    …, Muon            and with Muon on the filters, which needs fewer steps (benchmarks/convergence.txt)
    ours               the same without compiling
    ours, torch's gradients   and with torch's own weight gradient of transposed convolutions
    CompressAI         its `MeanScaleHyperprior` and the steps of its examples/train.py: Adam 1e-4, clipping at 1,
                       auxiliary Adam 1e-3, float32; its crops lie in memory already

The rate of a step counts 2 operations a multiplication and 3 times those of the forward pass. It stands beside the
rates at which torch computes convolutions forward in bfloat16: a large one (256 -> 256 channels, 3 × 3), and the one
that the network does most of its work in (64 -> 64 channels, 5 × 5, stride 2).
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
from counting import multiplications
from machine import machine
from peers import compressai
from torch import nn

from jobs.connection import WORKER_VARIABLES
from pipeline.codec import layers
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.pixels import canonical_pixels
from pipeline.training.base import BaseSettings, BaseTraining, random_crop

N, M, LMBDA, BATCH, CROP = 64, 96, 0.013, 8, 256
WARMUP, STEPS, IMAGES = 6, 30, 32


def ours(pixels: list[np.ndarray], compiled: bool, optimizer: str = "adam") -> Callable[[], object]:
    settings = BaseSettings(N, M, LMBDA, 1000, BATCH, CROP, 1e-4, 10, 1.0, "auto", 0, optimizer)
    return BaseTraining(settings, pixels, compiled=compiled).advance


def torchs_gradients(pixels: list[np.ndarray]) -> Callable[[], object]:
    layers.Deconv.forward = nn.ConvTranspose2d.forward
    return ours(pixels, False)


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
    "ours, compiled": lambda pixels: ours(pixels, True),
    "ours, compiled, Muon": lambda pixels: ours(pixels, True, "muon"),
    "ours": lambda pixels: ours(pixels, False),
    "ours, torch's gradients": torchs_gradients,
    "CompressAI": lambda pixels: theirs(pixels, False),
    "CompressAI, channels last": lambda pixels: theirs(pixels, True),
}


def measure(variant: str, folder: str) -> None:
    """In a process of its own: prints images a second, and the seconds of the first step."""
    torch.set_num_threads(2)
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jpg", ".png"))
    pixels = [canonical_pixels(path.read_bytes()) for path in files[:: len(files) // IMAGES][:IMAGES]]
    step = VARIANTS[variant](pixels)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    for _ in range(WARMUP):
        step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    print(STEPS * BATCH / (time.perf_counter() - start), first)


def convolution_rate(channels: int, kernel: int, stride: int, side: int) -> float:
    """Operations a second of a forward convolution in bfloat16, channels last; the best of 20."""
    layer = nn.Conv2d(channels, channels, kernel, stride=stride, padding=kernel // 2).bfloat16()
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            out = layer(x)
            times.append(time.perf_counter() - start)
    return 2 * out.numel() * layer.weight[0].numel() / min(times)


def in_turn(folder: str, rounds: int) -> dict[tuple[str, bool], np.ndarray]:
    """(variant, whether with the workers' memory settings) -> the medians of images a second and of the first step."""
    runs = [(name, kept) for name in VARIANTS for kept in (True, False)]
    found: dict[tuple[str, bool], list[list[float]]] = {run: [] for run in runs}
    for _ in range(rounds):
        for name, kept in runs:
            variables = {"OMP_WAIT_POLICY": "passive"} | (WORKER_VARIABLES if kept else {})
            command = [sys.executable, __file__, "--measure", name, folder]
            done = subprocess.run(
                command, env={**os.environ, **variables}, check=True, capture_output=True, text=True
            )
            found[name, kept].append([float(number) for number in done.stdout.split()])
    return {run: np.median(numbers, axis=0) for run, numbers in found.items()}


def main(folder: str, rounds: int = 3) -> None:
    torch.set_num_threads(2)
    print(machine("torch", "compressai"))
    print(
        f"{N = }, {M = }, batch {BATCH}, {CROP} × {CROP}; images a second, median of {rounds} rounds in turn\n"
    )
    found = in_turn(folder, rounds)
    reference = found["CompressAI", False][0]
    print(f"  {'':28} {'workers’ settings':>17} {'plain':>7}   over CompressAI as it comes   first step")
    for name in VARIANTS:
        (kept, first), (plain, _) = (found[name, k] for k in (True, False))
        print(
            f"  {name:28} {kept:17.1f} {plain:7.1f}   {kept / reference:.2f}, {plain / reference:.2f}"
            f"{first:27.1f} s"
        )
    image = torch.zeros(1, 3, CROP, CROP)
    forward = multiplications(MeanScaleHyperprior(N, M), image, torch.Generator().manual_seed(0))
    step = 3 * 2 * forward * found["ours, compiled", True][0]
    print(f"\n  {forward / 1e9:.2f} G multiplications an image forward: a step does {step / 1e12:.2f} T/s")
    for what, shape in {"256, 3 × 3": (256, 3, 1, 64), "64, 5 × 5, stride 2": (64, 5, 2, 128)}.items():
        rate = convolution_rate(*shape)
        print(f"  of a convolution's {rate / 1e12:.2f} T/s ({what}): {100 * step / rate:.0f} %")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1], *map(int, sys.argv[2:3]))
