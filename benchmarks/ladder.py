"""The ladder of rates: what a training saves that starts from its neighbour's codec.

    python benchmarks/ladder.py TRAINING_IMAGES HELD_OUT_IMAGES [STEPS] > benchmarks/ladder.txt

One λ is trained from the start; its neighbour from the start, too, and from that codec, for several numbers of steps,
each with a whole schedule of its own. The recipe is `train`'s default, with smaller crops, and a warm-up of a tenth of
the steps where these are few. One seed, and one way down.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction

from convergence import HELD_OUT_CROP, held_out_columns, read
from machine import machine

from pipeline.codec.artifact import Codec
from pipeline.pixels import Pixels
from pipeline.training.base import BaseSettings, BaseTraining

FIRST, NEIGHBOUR = 0.009, 0.004
FROM_THE_START = [Fraction(part) for part in ("1/3", "2/3", "1", "2")]
FROM_THE_NEIGHBOUR = [Fraction(part) for part in ("1/6", "1/3", "2/3")]


def main(training: str, held_out: str, steps: str = "1200") -> None:
    """A line for each training."""
    images, others = read(training), read(held_out)
    print(machine("torch"))
    base = BaseSettings(
        64, 96, FIRST, int(steps), 8, 128, 1e-3, 200, 1.0, "auto", 0, "adam", "transform", 0.3
    )
    print(f"N = 64, M = 96, {base.batch} crops of {base.crop} px a step, {len(images)} images")
    print(f"held out: the middle {HELD_OUT_CROP} px of {len(others)} images\n")
    print("λ      starts from  steps  held-out loss     bpp  PSNR dB")
    first, _ = _train(base, images, others)
    own, other = replace(base, lmbda=NEIGHBOUR), Codec.from_network(first.network)
    whole = [
        (steps, _train(replace(own, steps=steps), images, others)[1])
        for steps in _parts(base, FROM_THE_START)
    ]
    print()
    for steps_there in _parts(base, FROM_THE_NEIGHBOUR):
        _, loss = _train(replace(own, steps=steps_there), images, others, other)
        print(f"       {_worse(loss, whole)}", flush=True)


def _parts(settings: BaseSettings, parts: list[Fraction]) -> list[int]:
    return [round(settings.steps * part) for part in parts]


def _train(
    settings: BaseSettings, images: list[Pixels], others: list[Pixels], start: Codec | None = None
) -> tuple[BaseTraining, float]:
    settings = replace(settings, warmup=min(settings.warmup, settings.steps // 10))
    training = BaseTraining(settings, images, start=start, start_lmbda=FIRST if start else None)
    while training.step < settings.steps:
        training.advance()
    training.settings = replace(settings, crop=HELD_OUT_CROP)  # it is only looked at from here on
    found = training.held_out(others)
    origin = f"λ = {FIRST:g}" if start else "nothing"
    print(f"{settings.lmbda:<5g}  {origin:11}  {settings.steps:5}  {held_out_columns(found)}", flush=True)
    return training, found["held_out_loss"]


def _worse(loss: float, trained: list[tuple[int, float]]) -> str:
    """Which trainings from the start end with a higher loss: short ones are shaky, so nothing is read between them."""
    steps = [str(count) for count, other in trained if other > loss]
    return f"better than {', '.join(steps) or 'none'} of those from the start"


if __name__ == "__main__":
    main(*sys.argv[1:])
