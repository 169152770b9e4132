"""Stored bytes over the estimate, for layouts and codecs that a part of latents could have, on the sets of a workspace.

    python benchmarks/latent_layouts.py WORKSPACE [IMAGES]

`WORKSPACE` holds sets that `retrellis quantize` has made; the first IMAGES (400) of each are put into parts of 25. The
estimate is bits_y + bits_z, what an entropy coder takes with the quantizer's tables. Metadata counts in the last rows
alone, which are parts as `storage.parts` writes them. Then, how fast these are copied to this node's memmaps: the
median of five times, counted in the process's own seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import numpy as np
import numpy.typing as npt
from machine import machine
from numcodecs import LZMA, Blosc, Zstd
from numcodecs.abc import Codec

from jobs.local import local_indices
from storage import parts
from storage.inventory import set_keys
from storage.latents import LatentSet
from storage.parts import PartImage
from storage.workspace import Workspace

PART = 25
CODECS: dict[str, Codec] = {
    "zstd 3": Zstd(3),
    "zstd 15": Zstd(15),
    "zstd 22": Zstd(22),
    "Blosc zstd 9, shuffled bits": Blosc("zstd", 9, Blosc.BITSHUFFLE),
    "LZMA": LZMA(preset=6),
}
Array = npt.NDArray[np.signedinteger]
Chunks = Iterator[npt.NDArray[np.generic]]


def flat(images: Sequence[Array]) -> Chunks:
    """One image after another, in chunks of 256 KiB."""
    values = np.concatenate([image.ravel() for image in images])
    yield from np.split(values, range(parts.CHUNK_BYTES, len(values), parts.CHUNK_BYTES))


def side_by_side(images: Sequence[Array], channels: int = 4) -> Chunks:
    """Channel by channel over all images, some channels a chunk."""
    values = np.concatenate([image.reshape(len(image), -1) for image in images], axis=1)
    yield from np.split(values, range(channels, len(values), channels))


def two_a_byte(images: Sequence[Array]) -> Chunks:
    """The same, two indices a byte; those beyond -8 … 7 would have to lie elsewhere and are not counted."""
    for chunk in side_by_side(images):
        low = np.clip(chunk, -8, 7).ravel().view(np.uint8) & 15
        low = np.append(low, np.zeros(len(low) % 2, np.uint8))
        yield low[::2] | low[1::2] << 4


LAYOUTS = {
    "image by image": flat,
    "channel by channel": side_by_side,
    "channel by channel, two a byte": two_a_byte,
}


def rows(groups: Sequence[Sequence[PartImage]]) -> Iterator[tuple[str, int]]:
    """Each layout and codec with its bytes."""
    both = [[[i.indices for i in group], [i.hyper_indices for i in group]] for group in groups]
    for layout, chunks in LAYOUTS.items():
        for name, codec in CODECS.items():
            size = sum(
                len(codec.encode(np.ascontiguousarray(c)))
                for two in both
                for arrays in two
                for c in chunks(arrays)
            )
            yield f"{layout}, {name}", size
    for level in (3, 9, 13, 15, 22):
        kept, parts.ZSTD_LEVEL = parts.ZSTD_LEVEL, level
        size = sum(len(data) for group in groups for data in parts.encode(group).values())
        parts.ZSTD_LEVEL = kept
        yield f"bits and magnitudes, zstd {level}" + (" (ours)" if level == kept else ""), size


def megabytes_a_second(count: int, work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return count / 1e6 / (time.process_time() - start)


def main(root: str, limit: int = 400) -> None:
    print(machine("numpy", "zarr", "numcodecs"), flush=True)
    workspace = Workspace.open(root, create=False)
    for key in set_keys(workspace):
        stored = LatentSet(workspace, key)
        images = list(stored.read_many(sorted(stored.images())[:limit]))
        groups = [images[start : start + PART] for start in range(0, len(images), PART)]
        bits = sum(image.bits_y + image.bits_z for image in images)
        raw = sum(image.indices.size + image.hyper_indices.size for image in images)
        pixels = sum(image.height * image.width for image in images)
        print(
            f"\nset {key[:8]}: {len(images)} images, {bits / pixels:.3f} bpp, raw/estimate {raw / bits * 8:.2f}"
        )
        for name, size in rows(groups):
            print(f"  {name:60}{size / bits * 8:7.3f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            copy = LatentSet(Workspace.open(f"{folder}/workspace"), key)
            write = megabytes_a_second(
                raw,
                lambda: [copy.write_part("0", group) for group in groups],  # noqa: B023
            )
            digests = sorted(image.digest for image in images)
            reads = []
            for number in range(5):
                os.environ["RETRELLIS_SCRATCH"] = f"{folder}/scratch-{number}"
                reads.append(megabytes_a_second(raw, lambda: local_indices(copy, digests)))  # noqa: B023
        print(
            f"  written {write:.0f}, read, verified and copied into a memmap of int16 {median(reads):.0f} MB of int8 "
            "a second of one core"
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
