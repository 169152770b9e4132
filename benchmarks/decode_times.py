"""What decoding costs before and after finetuning: codec files side by side, each decoding its own files of the images.

    python benchmarks/decode_times.py IMAGES CODEC.safetensors… [--runs N]

The first codec is the reference. Files are decoded in turn, so that whatever else the machine does meets all alike;
times are medians over runs of the sum over images. Multiplications are g_s's and h_s's of one image of 768 × 512. The
committed output is of λ = 0.009 of docs/states.md, on four of its test images.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from counting import multiplications
from machine import alternately, machine

from pipeline.bitstream import ImageCoder
from pipeline.pixels import canonical_pixels

HEIGHT, WIDTH = 512, 768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("codecs", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    files = sorted(file for file in arguments.images.iterdir() if file.is_file())
    pixels = [canonical_pixels(file.read_bytes()) for file in files]
    works, lines = {}, []
    for path in arguments.codecs:
        data = path.read_bytes()
        coder = ImageCoder.from_bytes(data)
        coded = [coder.encode(image) for image in pixels]
        works[str(path)] = _decode_all(coder, coded)
        bpp = 8 * sum(map(len, coded)) / sum(image.shape[0] * image.shape[1] for image in pixels)
        lines.append(
            f"{bpp:.4f} bpp, {_multiplications(coder) / 1e9:.3f} G multiplications, tables of "
            f"{len(coder.tables.to_bytes()):,} bytes, codec file of {len(data):,} bytes, "
            f"{hashlib.sha256(data).hexdigest()[:12]}"
        )
    print(machine("torch", "numpy"))
    print(f"{len(pixels)} images, {torch.get_num_threads()} threads, {arguments.runs} runs in turn")
    seconds = alternately(works, arguments.runs)
    reference = next(iter(seconds.values()))
    for (name, times), line in zip(seconds.items(), lines, strict=True):
        low, middle, high = np.percentile(times / reference, (25, 50, 75))
        print(f"\n{Path(name).name}: {line}")
        print(
            f"  {1000 * np.median(times) / len(pixels):.1f} ms an image; {middle:.3f} of the first's, half of the runs "
            f"from {low:.3f} to {high:.3f}"
        )


def _decode_all(coder: ImageCoder, coded: list[bytes]) -> Callable[[], object]:
    return lambda: [coder.decode(data) for data in coded]


def _multiplications(coder: ImageCoder) -> int:
    """Of h_s and of g_s, for one image."""
    network = coder.codec.network
    z = torch.zeros(1, network.N, HEIGHT // 64, WIDTH // 64)
    y = torch.zeros(1, network.M, HEIGHT // 16, WIDTH // 16)
    return multiplications(network.h_s, z) + multiplications(network.g_s, y)


if __name__ == "__main__":
    main()
