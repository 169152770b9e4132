"""Files that someone has tampered with: what the decoder makes of them, how long it takes, how much memory.

    PYTHONPATH=tests python benchmarks/fuzz.py [FILES]

10,000 files unless told otherwise: bits flipped, bytes cut off, inserted, removed, lengths and sizes that lie, other
versions, random streams; every second one with its checksum repaired. They are made in turn from small files of every
kind of quantizer and from a large one. Each has to give a `BitstreamError` or an image of the size that its header
states; anything else ends this program with a traceback. A small codec keeps it to minutes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from itertools import product

import torch
from hostile_files import CODERS, mutated, photograph, stated_size
from machine import machine

from pipeline.bitstream import BitstreamError, ImageCoder

SIZES = ((100, 150), (64, 64), (1, 1), (200, 40))
LARGE = "tcq, vvc8 by state", (1000, 1500)
SUBJECTS = {  # words of a message, and what it is about; the first that is found counts
    "hyper stream": "refused: hyper stream",
    "latent stream": "refused: latent stream",
    "not a Retrellis": "refused: not such a file",
    "format version": "refused: another version",
    "checksum": "refused: checksum",
    "by its header": "refused: length",
    "another codec": "refused: another codec",
    "more than the limit": "refused: too many pixels",
    "sides of at least": "refused: no pixels",
    "header": "refused: header",
}


def outcome(coder: ImageCoder, data: bytes) -> str:
    try:
        pixels = coder.decode(data)
    except BitstreamError as error:
        return next(name for words, name in SUBJECTS.items() if words in str(error))
    assert pixels.shape == (*stated_size(data), 3)
    return "decoded to the stated size"


def main(count: int = 10_000) -> None:
    torch.set_num_threads(1)
    cases = [*product(CODERS, SIZES), LARGE]
    coders = [CODERS[name]() for name, _ in cases]
    files = [coder.encode(photograph(*size)) for coder, (_, size) in zip(coders, cases, strict=True)]
    assert {*map(outcome, coders, files)} == {"decoded to the stated size"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: Counter[tuple[str, bool, str]] = Counter()
    slowest, slowest_kind = 0.0, ""
    began = time.perf_counter()
    for seed in range(count):
        case = (seed >> 4) % len(files)
        kind, data = mutated(files[case], seed)
        start = time.perf_counter()
        name = outcome(coders[case], data)
        if (taken := time.perf_counter() - start) > slowest:
            slowest, slowest_kind = taken, f"{kind}: {name}"
        counts[kind.partition(",")[0], "repaired" in kind, name] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sizes = ", ".join(f"{width} × {height}" for height, width in SIZES)
    print(machine("torch", "numpy", "numba"))
    print(f"made from files of {'; '.join(CODERS)}, each of {sizes} pixels,")
    print(f"and from one of {LARGE[0]}, {LARGE[1][1]} × {LARGE[1][0]} pixels, {len(files[-1]):,} bytes\n")
    print(f"{count:,} files in {time.perf_counter() - began:.0f} s, no crash, no hang, no other exception")
    print(f"slowest {slowest * 1e3:.0f} ms ({slowest_kind})")
    print(f"peak memory {grown / 1024:.0f} MiB above that of decoding the files themselves\n")
    print(f"{'what was done':17} {'outcome':28} {'checksum as it was':>18} {'repaired':>9}")
    for kind, name in sorted({(kind, name) for kind, _, name in counts}):
        print(f"{kind:17} {name:28} {counts[kind, False, name]:18,} {counts[kind, True, name]:9,}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
