"""Files that someone has tampered with: what the decoder makes of them, how long it takes, how much memory.

    PYTHONPATH=tests python benchmarks/fuzz.py [FILES]

10,000 files unless told otherwise: bits flipped, bytes cut off, inserted, removed, lengths and sizes that lie, other
versions, random streams; every second one with its checksum repaired. Each has to give a `BitstreamError` or an image
of the size that its header states; anything else ends this program with a traceback. A small codec keeps it to minutes.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import torch
from hostile_files import mutated, photograph, small_coder, stated_size

from pipeline.bitstream import BitstreamError

SIZES = ((100, 150), (64, 64), (1, 1), (200, 40))
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


def outcome(data: bytes) -> str:
    try:
        pixels = small_coder("urq").decode(data)
    except BitstreamError as error:
        return next(name for words, name in SUBJECTS.items() if words in str(error))
    assert pixels.shape == (*stated_size(data), 3)
    return "decoded to the stated size"


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main(count: int = 10_000) -> None:
    torch.set_num_threads(1)
    files = [small_coder("urq").encode(photograph(*size)) for size in SIZES]
    assert [outcome(file) for file in files] == ["decoded to the stated size"] * len(files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: Counter[tuple[str, bool, str]] = Counter()
    slowest, slowest_kind = 0.0, ""
    began = time.perf_counter()
    for seed in range(count):
        kind, data = mutated(files[(seed >> 4) % len(files)], seed)
        start = time.perf_counter()
        name = outcome(data)
        if (taken := time.perf_counter() - start) > slowest:
            slowest, slowest_kind = taken, f"{kind}: {name}"
        counts[kind.partition(",")[0], "repaired" in kind, name] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    versions = f"torch {torch.__version__}, numpy {np.__version__}, numba {numba.__version__}"
    print(f"{cpu()}, Python {platform.python_version()}, {versions}\n")
    print(f"{count:,} files in {time.perf_counter() - began:.0f} s, no crash, no hang, no other exception")
    print(f"slowest {slowest * 1e3:.0f} ms ({slowest_kind})")
    print(f"peak memory {grown / 1024:.0f} MiB above that of decoding the files themselves\n")
    print(f"{'what was done':17} {'outcome':28} {'checksum as it was':>18} {'repaired':>9}")
    for kind, name in sorted({(kind, name) for kind, _, name in counts}):
        print(f"{kind:17} {name:28} {counts[kind, False, name]:18,} {counts[kind, True, name]:9,}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
