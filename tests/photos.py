"""Small natural images for tests: crops of the photographs inside scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import skimage.data

# (photograph, top, left, height, width); test images are large enough for MS-SSIM, the others for one crop
TRAIN = (
    ("astronaut", 60, 180, 128, 112),
    ("coffee", 120, 200, 112, 144),
    ("chelsea", 80, 100, 128, 128),
    ("rocket", 180, 220, 112, 128),
    ("astronaut", 300, 40, 96, 128),
    ("coffee", 20, 60, 128, 96),
)
TEST = (("chelsea", 60, 200, 176, 192), ("rocket", 200, 300, 192, 176))
MORE = (("astronaut", 20, 20, 112, 112), ("chelsea", 10, 10, 128, 112))


def write(folder: Path, crops: tuple[tuple[str, int, int, int, int], ...]) -> None:
    """Save crops as PNG files in a new folder."""
    folder.mkdir(parents=True)
    for name, top, left, height, width in crops:
        pixels = getattr(skimage.data, name)()[top : top + height, left : left + width]
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name}-{top}-{left}.png")
