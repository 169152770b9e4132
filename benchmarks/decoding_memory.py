"""How much memory it takes to decode an image, by its padded pixels: what a limit of pixels stands for.

    python benchmarks/decoding_memory.py

The codec has N = 128 and M = 192 and is untrained, and all indices of the images are 0: what is allocated depends on
neither. Each file is decoded in a process of its own, which has decoded one of 64 × 64 pixels before. Given is the peak
of resident memory above what the process holds then, for all but the pixels (`decode_indices`) and with them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import machine

from pipeline.bitstream import MAX_PIXELS, ImageCoder
from pipeline.codec.artifact import STRIDE, Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.coding import CodedImage
from pipeline.quantizers import settings
from pipeline.quantizers.lloyd import midpoint_tables

N, M = 128, 192
SIDES = (1024, 2048, 4096)
THREADS = 2


def empty_file(coder: ImageCoder, side: int) -> bytes:
    """A square image's, of indices that are 0."""
    cells = side // STRIDE
    hyper = np.zeros((N, cells, cells), np.int16)
    means, sigma_index = coder.codec.entropy_parameters(torch.from_numpy(hyper)[None])
    indices = np.zeros((M, 4 * cells, 4 * cells), np.int32)
    coded = CodedImage(indices, hyper, sigma_index[0].numpy(), means[0].numpy(), 0, 0, 0)
    return coder.encode_indices(coded, side, side)


def resident_MiB(name: str) -> float:
    """VmRSS, what the process holds, or VmHWM, the most it has held since `decode` asked to forget the peak before."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def decode(codec_file: str, small: str, file: str) -> None:
    """In a process of its own: print by how many MiB the peak grows with indices alone, then with pixels."""
    torch.set_num_threads(THREADS)
    coder, data = ImageCoder.from_bytes(Path(codec_file).read_bytes()), Path(file).read_bytes()
    coder.decode(Path(small).read_bytes())
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_MiB("VmRSS")
    coder.decode_indices(data)
    with_indices = resident_MiB("VmHWM")
    coder.decode(data)
    print(with_indices - before, resident_MiB("VmHWM") - before)


def main() -> None:
    network = MeanScaleHyperprior(N, M).initialise(torch.Generator().manual_seed(0))
    coder = ImageCoder(Codec.from_network(network), midpoint_tables(settings("tcq")))
    print(f"{machine('torch', 'numpy', 'numba')}, {THREADS} threads")
    print(f"N = {N}, M = {M}; peak memory in MiB above what is held after 64 × 64 pixels\n")
    print("padded pixels      file   indices and ŷ   pixels, too   bytes a pixel")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "codec").write_bytes(coder.to_bytes())
        for side in (STRIDE, *SIDES):
            (folder / str(side)).write_bytes(empty_file(coder, side))
        for side in SIDES:
            names = [str(folder / name) for name in ("codec", str(STRIDE), str(side))]
            command = [sys.executable, __file__, *names]
            words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            indices, pixels = map(float, words)
            size = (folder / str(side)).stat().st_size
            print(
                f"{side**2:13,} {size:9,} {indices:15,.0f} {pixels:13,.0f} {pixels * 2**20 / side**2:15.0f}"
            )
    scaled = [MAX_PIXELS / SIDES[-1] ** 2 * each / 1024 for each in (indices, pixels)]
    print(f"\nthe last line scaled to {MAX_PIXELS:,} pixels: {scaled[0]:.1f} and {scaled[1]:.1f} GiB")


if __name__ == "__main__":
    decode(*sys.argv[1:]) if sys.argv[1:] else main()
