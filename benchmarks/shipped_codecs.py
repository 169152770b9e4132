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

from jobs.evaluate import score
from jobs.files import asked_effort, shipped_coder
from pipeline.bootstrap import interval
from pipeline.metrics import bd_rate
from pipeline.pixels import Pixels
from pipeline.shipped import SHIPPED

KINDS = {"as trained": (False, 0), "encode": (True, 0), "encode --effort 10": (True, 10)}  # finetuned, steps


def points(finetuned: bool, effort: int, images: list[Pixels]) -> np.ndarray:
    """bpp and PSNR in dB of real files, (qualities, images, 2)."""
    found = []
    for quality in SHIPPED:
        coder = shipped_coder(quality, finetuned=finetuned)
        refinement = asked_effort(effort, None, coder)
        rows = [score(coder, pixels, ["psnr"], to_file=True, effort=refinement) for pixels in images]
        found.append([(row["bpp"], row["psnr_db"]) for row in rows])
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
