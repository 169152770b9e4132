"""Starts and optimizers of a base codec's training: held-out loss after so many steps.

    python benchmarks/convergence.py TRAINING_IMAGES HELD_OUT_IMAGES [STEPS] > benchmarks/convergence.txt

All see the same crops and noise, with a warm-up and a cosine to a hundredth; they run one after the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import machine

from pipeline.pixels import Pixels, canonical_pixels
from pipeline.training.base import BaseSettings, BaseTraining

RECIPES = (  # start, optimizer of the filters, learning rate
    ("random", "adam", 1e-3),
    ("random", "muon", 1e-3),
    ("transform", "adam", 4e-4),
    ("transform", "adam", 1e-3),
    ("transform", "muon", 1e-3),
)
HELD_OUT_CROP = 256  # pixels
LINES = 4


def main(training: str, held_out: str, steps: str = "1000") -> None:
    """A line for each quarter of each training."""
    images, others = read(training), read(held_out)
    print(machine("torch"))
    base = BaseSettings(64, 96, 0.009, int(steps), 8, 128, 1e-3, 100, 1.0, "auto", 0)
    print(
        f"N = 64, M = 96, λ = {base.lmbda:g}, {base.batch} crops of {base.crop} px a step, {len(images)} images"
    )
    print(f"held out: the middle {HELD_OUT_CROP} px of {len(others)} images\n")
    print("start      optimizer  learning rate  steps  seconds  held-out loss     bpp  PSNR dB")
    for initialise, optimizer, rate in RECIPES:
        _train(replace(base, initialise=initialise, optimizer=optimizer, learning_rate=rate), images, others)


def held_out_columns(found: Mapping[str, float]) -> str:
    """Loss, rate and PSNR on images held out."""
    return f"{found['held_out_loss']:13.4f}  {found['held_out_bpp']:6.4f}  {found['held_out_psnr_db']:7.3f}"


def _train(settings: BaseSettings, images: list[Pixels], others: list[Pixels]) -> None:
    training = BaseTraining(settings, images)
    # the same network seen through larger crops
    judge = BaseTraining(replace(settings, crop=HELD_OUT_CROP), others)
    seconds = 0.0
    for stop in range(settings.steps // LINES, settings.steps + 1, settings.steps // LINES):
        start = time.perf_counter()
        while training.step < stop:
            training.advance()
        seconds += time.perf_counter() - start
        judge.network.load_state_dict(training.network.state_dict())
        found = judge.held_out(others)
        recipe = f"{settings.initialise:9}  {settings.optimizer:9}  {settings.learning_rate:13g}"
        print(
            f"{recipe}  {training.step:5}  {seconds:7.0f}  {held_out_columns(found)}",
            flush=True,
        )


def read(folder: str) -> list[Pixels]:
    """Every image of a folder."""
    files = sorted(file for file in Path(folder).iterdir() if file.is_file())
    return [np.ascontiguousarray(canonical_pixels(file.read_bytes())) for file in files]


if __name__ == "__main__":
    main(*sys.argv[1:])
