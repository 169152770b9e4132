"""Which tables suit latents of a codec that was trained on noise: plain levels or centroids, designed or not.

    python benchmarks/reconstruction_points.py CHECKPOINT FOLDER [IMAGES]

Prints, for some images of a folder (choose training-side ones), rate, PSNR of the pictures and MSE of the latents, for
uniform quantization and 8-state TCQ. To be read at equal rate: the last column moves each line to the first one's rate
along the slope between two uniform quantizers of different steps.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import torch

from jobs.import_codec import read_codec
from pipeline.coding import code, synthesise
from pipeline.metrics import psnr_db
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import Tables, design, settings
from pipeline.quantizers.lloyd import midpoint_tables

URQ, COARSER = settings("urq"), settings("urq", step=1.3)
TCQ = settings("tcq", trellis="vvc8", step=0.8, lmbda_q=0.1)
CANDIDATES = {
    "urq, plain levels": lambda: design(URQ),
    "urq Δ = 1.3, plain levels": lambda: design(COARSER),
    "urq, centroids": lambda: design(URQ, centroids=True),
    "tcq8, Gaussian midpoints": lambda: midpoint_tables(TCQ),
    "tcq8, centred midpoints": lambda: midpoint_tables(TCQ, labelling="centred"),
    "tcq8, designed, plain levels": lambda: design(TCQ),
    "tcq8, designed, centroids": lambda: design(TCQ, centroids=True),
}


def measure(codec: object, tables: Tables, images: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean bpp, mean PSNR in dB, MSE of the latents."""
    rows = []
    for pixels in images:
        coded = code(codec, tables, pixels)  # type: ignore[arg-type]
        height, width, _ = pixels.shape
        decoded = synthesise(codec, coded.latent, height, width)  # type: ignore[arg-type]
        bpp = (coded.bits_y + coded.bits_z) / (height * width)
        rows.append((bpp, psnr_db(pixels, decoded), coded.squared_error / coded.latent.size))
    bpp, psnr, mse = np.mean(rows, axis=0)
    return float(bpp), float(psnr), float(mse)


def main(checkpoint: str, folder: str, count: int = 10) -> None:
    codec = read_codec(Path(checkpoint).read_bytes())
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    chosen = files[:: max(1, len(files) // count)][:count]
    images = [canonical_pixels(path.read_bytes()) for path in chosen]
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )
    print(f"{Path(checkpoint).name}, {len(images)} images of {Path(folder).name}\n")
    found = {name: measure(codec, make(), images) for name, make in CANDIDATES.items()}
    (rate, quality, _), (coarse_rate, coarse_quality, _) = list(found.values())[:2]
    slope = (quality - coarse_quality) / (rate - coarse_rate)
    print(f"{'tables':30} {'bpp':>7} {'PSNR dB':>8} {'MSE of ŷ':>9} {'ΔPSNR at equal rate':>20}")
    for name, (bpp, psnr, mse) in found.items():
        print(f"{name:30} {bpp:7.4f} {psnr:8.3f} {mse:9.5f} {psnr - quality - slope * (bpp - rate):+20.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
