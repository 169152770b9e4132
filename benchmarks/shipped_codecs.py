"""What the codecs that come along give: files by `encode --quality`, beside those of the codecs as trained.

    python benchmarks/shipped_codecs.py IMAGES [--first N] [--stride N] [--count N]

Means over images of the sizes of files and of the PSNR of what they decode to. BD-rate is per image over the codecs as
trained, with their tables of 8 states, averaged, with a paired bootstrap 95 % interval over images.
"""

from __future__ import annotations

import numpy as np
import torch
from machine import machine
from some_images import some_images

from jobs.files import asked_effort, shipped_coder
from pipeline.bootstrap import interval
from pipeline.metrics import bd_rate, psnr_db
from pipeline.pixels import Pixels
from pipeline.shipped import SHIPPED

KINDS = {"as trained": (False, 0), "encode": (True, 0), "encode --effort 10": (True, 10)}  # finetuned, steps


def points(finetuned: bool, effort: int, images: list[Pixels]) -> np.ndarray:
    """bpp and PSNR in dB of real files, (qualities, images, 2)."""
    found = []
    for quality in SHIPPED:
        coder, refinement = shipped_coder(quality, finetuned=finetuned), asked_effort(effort, None, quality)
        files = [coder.encode(pixels, refinement) for pixels in images]
        found.append(
            [
                (8 * len(file) / (pixels.shape[0] * pixels.shape[1]), psnr_db(coder.decode(file), pixels))
                for file, pixels in zip(files, images, strict=True)
            ]
        )
    return np.array(found)


def main() -> None:
    torch.set_num_threads(1)
    images = some_images(__doc__, first=0, stride=1, count=24)
    print(f"{machine('torch', 'numba')}; {len(images)} images\n", flush=True)
    curves: dict[str, np.ndarray] = {}
    for name, kind in KINDS.items():
        curves[name] = points(*kind, images)
        means = "   ".join(f"{bpp:.4f} {db:.3f}" for bpp, db in curves[name].mean(1))
        print(f"{name:18} bpp and dB: {means}", flush=True)
        if len(curves) > 1:
            print(f"{'':18} BD-rate {compared(curves['as trained'], curves[name])}", flush=True)


def over(anchor: np.ndarray, other: np.ndarray) -> float:
    """BD-rate in %, of curves as (qualities, 2)."""
    return bd_rate(*anchor.T, *other.T)


def compared(anchor: np.ndarray, other: np.ndarray) -> str:
    """Per image with its interval, and of the mean curves."""
    each = np.array([over(anchor[:, i], other[:, i]) for i in range(anchor.shape[1])])
    ends = interval(each[None])
    between = f" ({ends[0]:+.2f} … {ends[1]:+.2f})" if ends else ""
    return f"{each.mean():+.2f} %{between}, mean curves {over(anchor.mean(1), other.mean(1)):+.2f} %"


if __name__ == "__main__":
    main()
