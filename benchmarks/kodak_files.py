"""A folder of images to files and, in fresh processes, back: every index and pixel, and sizes beside their estimates.

    python benchmarks/kodak_files.py FOLDER CHECKPOINT…

A checkpoint is one of `retrellis` or of CompressAI; its quantizer is the 8-state trellis at its defaults. Files are
written by a process with 2 threads and oneDNN, and read by three that know nothing but the files and the codec file:
with the same setting, with 1 thread, with 1 thread and PyTorch's own convolutions in place of oneDNN's. Indices, hyper
indices and ŷ have to be equal in all of them, pixels under the same setting; a difference ends this program with a
traceback. Where a setting differs, the table counts the samples of pixels that do, and by how much.

The estimate is the ideal code length by the tables, which drove the search. On top of it a file has a header and 15
bytes of coder states, of which at least 9 carry nothing: a state starts at 2^24.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import machine

from jobs.import_codec import read_codec
from pipeline.bitstream import ImageCoder, parse
from pipeline.coding import code, synthesise
from pipeline.pixels import canonical_pixels
from pipeline.quantizers import design, settings

HERE = (2, True)
SETTINGS = {"the same": HERE, "1 thread": (1, True), "1 thread, no oneDNN": (1, False)}  # threads, oneDNN
RELATIVE_GOAL, BYTES_GOAL, HEADER_GOAL = 0.003, 64, 32


class File(NamedTuple):
    """Of one image: bytes of its file, of the header in it, and of the estimate."""

    name: str
    size: int
    header: int
    estimate: float

    @property
    def excess(self) -> float:
        return self.size - self.estimate

    @property
    def reached(self) -> bool:
        return self.excess <= RELATIVE_GOAL * self.estimate + BYTES_GOAL and self.header <= HEADER_GOAL


def seal(*arrays: np.ndarray) -> bytes:
    """What arrays have in common only if they are equal, types and shapes included."""
    return sha256(b"".join(f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays)).digest()


def write(coder: ImageCoder, image: Path, folder: Path) -> File:
    """The file, and beside it what a decoder has to find."""
    pixels = canonical_pixels(image.read_bytes())
    height, width = pixels.shape[:2]
    coded = code(coder.codec, coder.tables, pixels)
    data = coder.encode_indices(coded, height, width)
    (folder / f"{image.stem}.rtl").write_bytes(data)
    (folder / f"{image.stem}.seal").write_bytes(seal(coded.indices, coded.hyper_indices, coded.latent))
    np.save(folder / f"{image.stem}.npy", synthesise(coder.codec, coded.latent, height, width))
    return File(image.stem, len(data), parse(data)[0].bytes, (coded.bits_y + coded.bits_z) / 8)


def read(folder: Path, threads: int, onednn: bool) -> None:
    """In a process of its own: decode all files, compare, print how many samples differ and by how much."""
    torch.set_num_threads(threads)
    coder, differing, largest = ImageCoder.from_bytes((folder / "codec").read_bytes()), 0, 0
    with torch.backends.mkldnn.flags(enabled=onednn):
        for file in sorted(folder.glob("*.rtl")):
            data = file.read_bytes()
            found = coder.decode_indices(data)
            assert (
                seal(found.indices, found.hyper_indices, found.latent)
                == file.with_suffix(".seal").read_bytes()
            )
            difference = np.abs(coder.decode(data).astype(int) - np.load(file.with_suffix(".npy")))
            differing, largest = differing + np.count_nonzero(difference), max(largest, int(difference.max()))
    print(differing, largest)


def read_apart(folder: Path, threads: int, onednn: bool) -> tuple[int, int]:
    command = [sys.executable, __file__, "--read", str(folder), str(threads), str(int(onednn))]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(words[0]), int(words[1])


def try_codec(checkpoint: Path, images: list[Path], folder: Path) -> list[File]:
    coder = ImageCoder(read_codec(checkpoint.read_bytes()), design(settings("tcq")))
    (folder / "codec").write_bytes(coder.to_bytes())
    files = [write(coder, image, folder) for image in images]
    samples = sum(np.load(path, mmap_mode="r").size for path in folder.glob("*.npy"))
    print(f"\n{checkpoint.stem}, codec {coder.digest[:16]}")
    for name, (threads, onednn) in SETTINGS.items():
        differing, largest = read_apart(folder, threads, onednn)
        assert largest <= (0 if (threads, onednn) == HERE else 1)
        pixels = f"{differing:,} of {samples:,} samples of pixels differ, by {largest} at most"
        print(f"  {name:20} all indices and ŷ equal; {pixels if differing else 'all pixels equal'}")
    print(f"  {'image':10} {'estimate':>11} {'file':>8} {'excess':>7} {'':>8} {'header':>7}")
    for file in files:
        relative = f"{file.excess / file.estimate:+8.3%}"
        print(
            f"  {file.name:10} {file.estimate:11.1f} {file.size:8} {file.excess:+7.1f} {relative} {file.header:7}"
            + ("" if file.reached else "   goal missed")
        )
    return files


def main(folder: str, *checkpoints: str) -> None:
    torch.set_num_threads(HERE[0])
    images = sorted(Path(folder).iterdir())
    print(machine("torch", "numpy", "numba"))
    print(f"{len(images)} images of {Path(folder).name}, {len(checkpoints)} codecs; sizes in bytes")
    files = []
    for checkpoint in checkpoints:
        with tempfile.TemporaryDirectory() as temporary:
            files += try_codec(Path(checkpoint), images, Path(temporary))
    print(f"\nall {len(files)} files")
    print(f"  largest excess     {max(f.excess for f in files):+.1f} bytes")
    print(f"  largest excess     {max(f.excess / f.estimate for f in files):+.3%}")
    print(f"  excess in all      {sum(f.excess for f in files) / sum(f.estimate for f in files):+.3%}")
    print(f"  largest header     {max(f.header for f in files)} bytes")
    goal = f"within {RELATIVE_GOAL:.1%} + {BYTES_GOAL} bytes, header at most {HEADER_GOAL} bytes"
    print(f"  {goal}: {sum(f.reached for f in files)} of {len(files)}")


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        read(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
    else:
        main(*sys.argv[1:])
