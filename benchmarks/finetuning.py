"""A step of finetuning from a latent set, beside one that analyses and quantizes its batch each time anew.

    python benchmarks/finetuning.py FOLDER CODEC [STEPS]

The committed output is of BSDS500, and of the same pictures put together by fours and cut to 768 × 512.

A trained codec (ours or CompressAI's), batches of 8 crops of 256 × 256, tcq with 8 states, two threads. All loops take
the same compiled step of g_s; the online ones analyse their batches by g_a, h_a and h_s, in bfloat16 or float32, and
search their trellis on them. Only on whole images do they get what inference gets, and what the set holds: on crops
other indices come out. In turn, so that whatever else the machine does meets all alike. "Waiting" is the time in which
a step gathers its batch.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from machine import alternately, machine

from jobs.import_codec import read_codec
from pipeline.codec.artifact import Codec
from pipeline.coding import code
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import Tables, design, quantize, settings
from pipeline.sigma import sigma_midpoints
from pipeline.training.base import random_crop
from pipeline.training.finetune import Control, FinetuneSettings, FinetuneTraining
from pipeline.training.latent_crops import LatentBatch, LatentCrops
from pipeline.training.optimization import autocast

BATCH, CROP, IMAGES = 8, 256, 32
SETTINGS = FinetuneSettings("decoder", "quantized", 0.013, 1000, BATCH, CROP, 1e-4, 10, 1.0, "auto", 0)


class Online:
    """Batches for a finetuning, analysed and quantized when they are asked for: crops, or the whole images around."""

    def __init__(
        self, codec: Codec, tables: Tables, pixels: list[np.ndarray], precision: str, whole: bool
    ) -> None:
        self.tables, self.pixels, self.precision, self.whole = tables, pixels, precision, whole
        self.network = codec.network.to(memory_format=torch.channels_last)

    def batch(self, step: int, size: int, rows: slice = slice(None)) -> LatentBatch:
        generator = np.random.default_rng(step)
        chosen = [self.pixels[i] for i in generator.integers(len(self.pixels), size=size)]
        if self.whole:
            both = [self._within(image, generator) for image in chosen]
        else:
            crops = np.stack([random_crop(image, CROP, generator) for image in chosen])
            both = list(zip(self._latents(crops), crops, strict=True))
        y_hat, crops = (np.stack(arrays) for arrays in zip(*both, strict=True))
        mask = np.ones((size, CROP, CROP), np.bool_)
        return LatentBatch({"reconstruction": y_hat}, crops, mask, mask[:, ::16, ::16])

    def _within(self, image: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A crop on the latent grid, of an image analysed whole."""
        height, width = image.shape[0] // 64 * 64, image.shape[1] // 64 * 64
        (latent,) = self._latents(image[None, :height, :width])
        top, left = (int(generator.integers((side - CROP) // 16 + 1)) for side in (height, width))
        window = slice(top, top + CROP // 16), slice(left, left + CROP // 16)
        return latent[:, *window], image[16 * top : 16 * top + CROP, 16 * left : 16 * left + CROP]

    def _latents(self, images: np.ndarray) -> np.ndarray:
        tensor = torch.tensor(images).permute(0, 3, 1, 2).float().div_(255)
        with torch.no_grad(), autocast(self.precision, tensor.device):
            y = self.network.g_a(tensor)
            z = self.network.h_a(y).float()
            scales, means = self.network.h_s(torch.round(z)).float().chunk(2, 1)
        return np.stack([self._quantized(*each) for each in zip(y.float(), scales, means, strict=True)])

    def _quantized(self, y: torch.Tensor, scales: torch.Tensor, means: torch.Tensor) -> np.ndarray:
        index = np.searchsorted(sigma_midpoints(), scales.flatten(1).numpy()).astype(np.uint8)
        residual = (y - means).flatten(1).numpy()
        return means.numpy() + quantize(residual, index, self.tables).reconstruction.reshape(y.shape)


def main(folder: str, checkpoint: str, steps: int = 20) -> None:
    torch.set_num_threads(2)
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jpg", ".png"))
    images = (canonical_pixels(path.read_bytes()) for path in files[:: max(1, len(files) // (2 * IMAGES))])
    pixels = list(islice((image for image in images if min(image.shape[:2]) // 64 * 64 >= CROP), IMAGES))
    codec = read_codec(Path(checkpoint).read_bytes())
    tables = design(settings("tcq", trellis="vvc8", step=0.7, lmbda_q=0.1))
    y_hat = [code(codec, tables, image).latent.astype("f2") for image in pixels]
    print(machine("torch", "numba"))
    network = codec.network
    area = float(np.mean([image.shape[0] * image.shape[1] for image in pixels])) / CROP**2
    print(
        f"N = {network.N}, M = {network.M}, batch {BATCH}, {CROP} × {CROP}; median of {steps} steps in turn; "
        f"{len(pixels)} images of {area:.1f} crops' area"
    )
    for precision in ("bfloat16", "float32"):
        sources = {
            "from the set": LatentCrops({"reconstruction": y_hat}, pixels, CROP, 0),
            "online, on crops": Online(codec, tables, pixels, precision, False),
            "online, on whole images": Online(codec, tables, pixels, precision, True),
        }
        compare({name: Timed(source) for name, source in sources.items()}, precision, codec, tables, steps)


def compare(sources: dict[str, Timed], precision: str, codec: Codec, tables: Tables, steps: int) -> None:
    """Print a line for each source of batches; the step of g_s is the same, compiled."""
    works = {}
    for name, source in sources.items():
        chosen = replace(SETTINGS, precision=precision)
        works[name] = FinetuneTraining(chosen, codec, tables, source, Control(), compiled=True).advance
    seconds = {name: float(np.median(times)) for name, times in alternately(works, steps).items()}
    print(f"\n{precision}")
    for name, step in seconds.items():
        wait = float(np.median(sources[name].seconds)) / step
        print(
            f"  {name:24} {BATCH / step:6.1f} images/s, waiting {100 * wait:4.1f} %; the set is "
            f"{step / seconds['from the set']:.2f} times as fast"
        )


class Timed:
    """A source of batches, with the seconds that each took."""

    def __init__(self, source: LatentCrops | Online) -> None:
        self.source, self.seconds = source, list[float]()

    def batch(self, step: int, size: int, rows: slice = slice(None)) -> LatentBatch:
        start = time.perf_counter()
        batch = self.source.batch(step, size, rows)
        self.seconds.append(time.perf_counter() - start)
        return batch


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
