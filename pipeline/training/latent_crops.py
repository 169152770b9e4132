"""Batches for finetuning: crops of latents with the pixels that belong to them, and where the loss may look.

g_s reads less than MARGIN latents beyond a pixel's own, so pixels nearer than that to a cut are wrong and carry no
loss; where the crop ends at the edge of the image, zero padding is what inference does too, and they count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

STRIDE = 16  # pixels a latent
MARGIN = 2  # latents

Array = npt.NDArray[Any]


class Arrays(Protocol):
    """One array per image, in memory or mapped from a disk."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Array: ...


@dataclass(frozen=True)
class Crop:
    """One window: image, and its place on the latent grid of that image."""

    image: int
    top: int
    left: int


@dataclass(frozen=True)
class LatentBatch:
    """Arrays of one batch, zero where a crop reaches beyond its image.

    Attributes:
        fields: by name, (B, C, w, w) with w latents a side.
        pixels: uint8 (B, 16w, 16w, 3).
        loss_mask: bool (B, 16w, 16w): real pixels that g_s computes from the crop as it would from the image.
        latent_mask: bool (B, w, w): latents of the image.
    """

    fields: Mapping[str, Array]
    pixels: npt.NDArray[np.uint8]
    loss_mask: npt.NDArray[np.bool_]
    latent_mask: npt.NDArray[np.bool_]


class Batches(Protocol):
    """What a finetuning asks for its batches."""

    def batch(self, step: int, size: int, rows: slice = ..., /) -> LatentBatch: ...


class LatentCrops:
    """Random windows of a latent set: every image once an epoch.

    The first epoch takes the images as they stand, which is the order of their digests, in which a set is filled: so
    a finetuning can begin before its set is whole. The order of later ones is drawn from (seed, epoch).
    """

    def __init__(self, fields: Mapping[str, Arrays], pixels: Arrays, side: int, seed: int) -> None:
        """
        Args:
            fields: by name, one array (C, h, w) per image; all fields of an image share h and w.
            pixels: one array (H, W, 3) per image, H ≤ 16h and W ≤ 16w.
            side: pixels a side, margin included; a multiple of 16.
        """
        self.fields, self.pixels, self.seed = fields, pixels, seed
        self.window = side // STRIDE
        self._grid = next(iter(fields.values()))

    def batch(self, step: int, size: int, rows: slice = slice(None)) -> LatentBatch:
        """The batch of a step, or some rows of it: a function of (seed, step, size) alone."""
        crops = [self._crop(step * size + i) for i in range(size)[rows]]
        masks = [self._masks(crop) for crop in crops]
        return LatentBatch(
            {
                name: np.stack([self._latents(arrays[c.image], c) for c in crops])
                for name, arrays in self.fields.items()
            },
            np.stack([self._pixels(c) for c in crops]),
            np.stack([loss for loss, _ in masks]),
            np.stack([latent for _, latent in masks]),
        )

    def _crop(self, sample: int) -> Crop:
        epoch, image = divmod(sample, len(self.pixels))
        if epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pixels))
            image = int(order[image])
        place = np.random.default_rng([self.seed, 1, sample])
        _, height, width = self._grid[image].shape
        top = int(place.integers(max(0, height - self.window) + 1))
        left = int(place.integers(max(0, width - self.window) + 1))
        return Crop(image, top, left)

    def _latents(self, latent_CHW: Array, crop: Crop) -> Array:
        cut = latent_CHW[:, crop.top : crop.top + self.window, crop.left : crop.left + self.window]
        return _fill(cut, (cut.shape[0], self.window, self.window))

    def _pixels(self, crop: Crop) -> npt.NDArray[np.uint8]:
        side = self.window * STRIDE
        top, left = crop.top * STRIDE, crop.left * STRIDE
        cut = self.pixels[crop.image][top : top + side, left : left + side]
        return _fill(cut, (side, side, 3))

    def _masks(self, crop: Crop) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Where the loss looks (pixels) and where latents are, as the product of rows and columns."""
        height, width, _ = self.pixels[crop.image].shape
        _, rows, columns = self._grid[crop.image].shape
        loss_y, latent_y = _axis_masks(crop.top, self.window, rows, height)
        loss_x, latent_x = _axis_masks(crop.left, self.window, columns, width)
        return np.outer(loss_y, loss_x), np.outer(latent_y, latent_x)


def _axis_masks(
    start: int, window: int, latents: int, pixels: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Along one axis: which pixels of the window carry loss, and which latents exist.

    The far edge of an image smaller than the window lies inside it: there g_s sees biases where inference pads
    with zeros, so a margin is kept from it too.
    """
    latent = np.arange(start, start + window)
    first = start if start == 0 else start + MARGIN
    last = latents if start + window == latents else min(start + window, latents) - MARGIN
    pixel = np.arange(start * STRIDE, (start + window) * STRIDE)
    return (pixel >= first * STRIDE) & (pixel < min(last * STRIDE, pixels)), latent < latents


def _fill(cut: Array, shape: tuple[int, ...]) -> Array:
    """The cut at the top left of zeros."""
    if cut.shape == shape:
        return np.asarray(cut)
    filled = np.zeros(shape, cut.dtype)
    filled[tuple(slice(0, n) for n in cut.shape)] = cut
    return filled
