"""Which images of a folder a benchmark takes, by its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.pixels import Pixels, canonical_pixels


def some_images(description: str | None, first: int, stride: int, count: int) -> list[Pixels]:
    """Those that the arguments name: a folder, and which of its files in the order of their names; with defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    for name, value in {"first": first, "stride": stride, "count": count}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    files = sorted(given.images.iterdir())[given.first :: given.stride][: given.count]
    return [canonical_pixels(file.read_bytes()) for file in files]
