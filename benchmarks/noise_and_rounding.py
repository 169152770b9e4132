"""What the decoders of the codecs that come along lose at inference: PSNR on the noise they knew and on rounding.

    python benchmarks/noise_and_rounding.py IMAGES [--first N] [--stride N] [--count N]

Means over some images: how many latents have σ < 0.2; the squared error of rounding over that of noise, 1/12, of all
latents and of those; and the PSNR of the mean squared error where the decoder gets y, y + U(±½), and μ + round(y − μ).
"""

from __future__ import annotations

import numpy as np
import torch
from machine import machine
from some_images import some_images

from pipeline import shipped
from pipeline.bitstream import ImageCoder
from pipeline.codec.artifact import Codec
from pipeline.coding import analyse, synthesise
from pipeline.pixels import Pixels
from pipeline.sigma import sigma_levels
from pipeline.training.optimization import unit_psnr_db

SMALL = 0.2


def numbers(codec: Codec, pixels: Pixels) -> list[float]:
    """Share, both error ratios, and the three mean squared errors of values in [0, 1], of one image."""
    a = analyse(codec, pixels)
    small = sigma_levels()[a.sigma_index] < SMALL
    rounded = a.means + np.round(a.latent - a.means)
    noise = np.random.default_rng(0).random(a.latent.shape, np.float32) - np.float32(0.5)
    error = 12 * np.square(rounded - a.latent, dtype=np.float64)
    found = [float(small.mean()), float(error.mean()), float(error[small].mean())]
    for latent in (a.latent, a.latent + noise, rounded):
        decoded = synthesise(codec, latent, *pixels.shape[:2]).astype(float)
        found.append(float(np.square((decoded - pixels) / 255).mean()))
    return found


def main() -> None:
    torch.set_num_threads(1)
    images = some_images(__doc__, first=3, stride=25, count=4)
    print(f"{machine('torch')}; {len(images)} images\n")
    print("   λ      σ < 0.2   error/noise   of those   dB on y   on noise   on rounding   rounding loses")
    for quality, known in shipped.SHIPPED.items():
        codec = ImageCoder.from_bytes(shipped.codec_file(quality)).codec
        share, error, of_small, *mse = np.mean([numbers(codec, pixels) for pixels in images], 0)
        exact, noisy, rounded = map(unit_psnr_db, mse)
        row = (
            f"{known.lmbda:<8g} {100 * share:7.0f} % {error:12.2f} {of_small:11.2f} {exact:9.2f} {noisy:9.2f}"
        )
        print(f"{row} {rounded:12.2f} {noisy - rounded:14.2f} dB", flush=True)


if __name__ == "__main__":
    main()
