"""What effort gains, by its steps, and what it takes: the codecs that come along, with rounding and with their trellis.

    python benchmarks/effort.py IMAGES [--first N] [--stride N] [--count N]

Middles of some images, 256 × 256 pixels. J in bits, as the sum over them, over that of rounding without effort.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from machine import machine
from some_images import some_images

from pipeline import shipped
from pipeline.bitstream import ImageCoder
from pipeline.codec.artifact import Codec
from pipeline.coding import code, synthesise
from pipeline.pixels import Pixels, centre_crop
from pipeline.quantizers import Tables, design, settings
from pipeline.refinement import Refinement

STEPS = (0, 5, 10, 20)


def cost_bits(codec: Codec, tables: Tables, pixels: Pixels, steps: int, lmbda: float) -> float:
    """J of the picture as it is decoded, in bits."""
    coded = code(codec, tables, pixels, Refinement(steps, lmbda) if steps else None)
    decoded = synthesise(codec, coded.latent, *pixels.shape[:2]).astype(float)
    return coded.bits_y + coded.bits_z + lmbda / 3 * float(np.square(decoded - pixels).sum())


def main() -> None:
    torch.set_num_threads(1)
    crops = [centre_crop(pixels, 256, 1) for pixels in some_images(__doc__, first=0, stride=10, count=8)]
    print(f"{machine('torch', 'numba')}; {len(crops)} crops, one thread\n")
    print("   λ     quantizer " + "".join(f"{steps:>8} steps" for steps in STEPS) + "    seconds a crop")
    for quality, known in shipped.SHIPPED.items():
        coder = ImageCoder.from_bytes(shipped.codec_file(quality))
        start = 0.0
        for name, tables in {"rounding": design(settings("urq")), "VVC-8": coder.tables}.items():
            sums, seconds = [], []
            code(coder.codec, tables, crops[0], Refinement(1, known.lmbda))  # compiles, chooses algorithms
            for steps in STEPS:
                begin = time.perf_counter()
                sums.append(sum(cost_bits(coder.codec, tables, c, steps, known.lmbda) for c in crops))
                seconds.append((time.perf_counter() - begin) / len(crops))
            start = start or sums[0]
            gains = "".join(f"{100 * (found / start - 1):+12.2f} %" for found in sums)
            print(
                f"{known.lmbda:<8g} {name:9} {gains}    {', '.join(f'{s:.2f}' for s in seconds)}", flush=True
            )


if __name__ == "__main__":
    main()
