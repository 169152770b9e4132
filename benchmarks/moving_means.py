"""Rounds whose means may move: what all of h_s gains, beside g_s, with the real quantizer in every step.

    python benchmarks/moving_means.py WORKSPACE TRAINING_IMAGES HELD_OUT_IMAGES [STEPS] > benchmarks/moving_means.txt

WORKSPACE holds the results of `experiments/results.yaml`. From each codec that VVC-8's arm `paper` ended with, two
trainings of the same crops go on: of g_s alone, and of g_s and h_s. Indices are searched anew in every step, on the
crop. J counts with every fourth image of the held-out folder, whole, coded anew, and with the integer h_s.

What a mean that moves does to r̂ = Q(r), r = y − μ, and to its bits has no derivative. In its place stands what holds
on average, if r is Gaussian and the mean moves: E r̂ has the slope E(r r̂) / E(r²) (Bussgang 1952), 0 where all is
rounded to zero, so that ŷ follows μ, and 1 where indices make up for it; E bits is bent as by β r², where β is the
slope of a line of bits over r². Both are measured for each σ level. σ moves bits between two levels as in
`parts: decoder+scale`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from convergence import read
from machine import machine
from torch import Tensor

from jobs.evaluate import score
from pipeline.bitstream import ImageCoder
from pipeline.bootstrap import interval
from pipeline.codec.artifact import Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.layers import lower_bound
from pipeline.coding import analyse
from pipeline.pixels import Pixels
from pipeline.quantizers import Tables, contexts, quantize
from pipeline.quantizers.lookup import code_bits
from pipeline.sigma import SIGMA_LEVELS, SIGMA_MIN
from pipeline.training.finetune import level_places
from pipeline.training.optimization import (
    image_batch,
    learning_rate_factor,
    make_optimizers,
    set_learning_rate,
)
from storage.workspace import Workspace

LMBDAS = (0.0018, 0.009, 0.0483)
BATCH, WINDOW, MARGIN = 8, 16, 2  # crops; latents a side; latents at each side, which carry no distortion
HYPER_MARGIN = 2  # hyper latents: h_s reads less beyond a latent's own
IMAGES = 400
LEARNING_RATE, WARMUP = 2e-4, 20
CPU = torch.device("cpu")
Array = npt.NDArray[Any]


class Image(NamedTuple):
    """Pixels, y as float16 (M, h, w), hyper indices."""

    pixels: Pixels
    latent: Array
    hyper_indices: Array


def main(root: str, training: str, held_out: str, steps: str = "200") -> None:
    """Two lines for each λ."""
    workspace = Workspace.open(root, create=False)
    images, others = read(training)[:IMAGES], read(held_out)[::4]
    print(machine("torch"))
    print(
        f"{steps} steps of {BATCH} crops; on {len(others)} images held out, each in % of what it was before,"
    )
    print("and the 95 % interval of J over images\n")
    print("λ       trained         rate  distortion           J")
    for lmbda in LMBDAS:
        codec, tables = _finetuned(workspace, lmbda)
        before = _judged(codec, tables, others, lmbda)
        analysed = [_analysed(codec, pixels) for pixels in images]
        for parts in ("g_s", "g_s + h_s"):
            trained = _Moving(codec, tables, lmbda, "h_s" in parts).train(analysed, int(steps))
            after = _judged(trained, tables, others, lmbda)
            change = "  ".join(f"{100 * value:+8.2f} %" for value in after.mean(0) / before.mean(0) - 1)
            costs = np.stack([before[:, 2], after[:, 2]])
            low, high = interval(costs, lambda means: 100 * (means[1] / means[0] - 1)) or (np.nan, np.nan)
            print(f"{lmbda:<7g} {parts:9}  {change}  {low:+.2f} … {high:+.2f} %", flush=True)


def _finetuned(workspace: Workspace, lmbda: float) -> tuple[Codec, Tables]:
    """The codec and the tables of the arm's longest finetuning."""
    wanted = {"lmbda": lmbda, "quantizer": "tcq8", "arm": "paper", "seed": 0}
    records = [r for r in workspace.records.load("results").values() if r["axes"].items() >= wanted.items()]
    finetuned = max(
        (r for r in records if r["stage"] == "finetune"), key=lambda r: r["ingredients"]["settings"]["steps"]
    )
    codec, tables = finetuned["outputs"]["codec"]["blob"], finetuned["ingredients"]["inputs"]["tables"]
    return Codec.from_bytes(workspace.blobs.get(codec)), Tables.from_bytes(workspace.blobs.get(tables))


def _analysed(codec: Codec, pixels: Pixels) -> Image:
    seen = analyse(codec, pixels)
    return Image(pixels, seen.latent.astype(np.float16), seen.hyper_indices)


def _judged(codec: Codec, tables: Tables, images: list[Pixels], lmbda: float) -> Array:
    """Rate, λ · distortion and J of each image, in bits a pixel; float64 (images, 3)."""
    coder = ImageCoder(codec, tables)
    scores = [score(coder, pixels, ["psnr"], to_file=False) for pixels in images]
    bpp = np.array([row["bpp"] for row in scores])
    error = lmbda * 255**2 * 10 ** (-np.array([row["psnr_db"] for row in scores]) / 10)
    return np.stack([bpp, error, bpp + error], 1)


class _Moving:
    """One training, from a codec and the tables it is coded with."""

    def __init__(self, codec: Codec, tables: Tables, lmbda: float, moves: bool) -> None:
        self.codec, self.tables, self.lmbda = codec, tables, lmbda
        self.side = codec.decoder_side().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.h_s = copy.deepcopy(codec.network.h_s).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.medians = codec.network.entropy_bottleneck.medians.reshape(-1, 1, 1)
        self.trained = [
            *self.side.decoder_parameters(),
            *(self.h_s.requires_grad_(True).parameters() if moves else []),
        ]
        self.optimizers = make_optimizers(self.trained, LEARNING_RATE, "adam")

    def train(self, images: list[Image], steps: int) -> Codec:
        """The codec after so many steps."""
        slopes = _slopes(self.codec, self.tables, images[::20])
        random = np.random.default_rng(0)
        for step in range(steps):
            set_learning_rate(self.optimizers, LEARNING_RATE * learning_rate_factor(step, steps, WARMUP))
            crops = [_crop(images[random.integers(len(images))], random) for _ in range(BATCH)]
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            self._loss(crops, slopes).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            for optimizer in self.optimizers.values():
                optimizer.step()
        state = self.codec.network.state_dict()
        state |= {f"g_s.{name}": leaf for name, leaf in self.side.g_s.state_dict().items()}
        state |= {f"h_s.{name}": leaf for name, leaf in self.h_s.state_dict().items()}
        network = MeanScaleHyperprior(self.codec.network.N, self.codec.network.M)
        network.load_state_dict(state)
        return Codec.from_network(network)

    def _loss(self, crops: list[Crop], slopes: Slopes) -> Tensor:
        """Bits of y a pixel + λ · 255² · MSE."""
        y = torch.from_numpy(np.stack([crop.latent for crop in crops]).astype(np.float32))
        scales, means = torch.cat([self._entropy_parameters(crop) for crop in crops]).chunk(2, 1)
        places = level_places(lower_bound(scales, SIGMA_MIN))
        residual = y - means
        found = _Searched(residual, places, self.tables)
        moved = residual - residual.detach()  # 0, with a gradient
        level = found.level.long()
        x_hat = self.side.synthesise(
            means + found.reconstruction + slopes.reconstruction[level] * moved, mixed=True
        )
        cut = slice(MARGIN * 16, -MARGIN * 16)
        pixels = image_batch(np.stack([crop.pixels for crop in crops]), CPU)
        mse = torch.square(x_hat - pixels)[:, :, cut, cut].mean()
        bits = found.bits(places) + 2 * slopes.bits[level] * residual.detach() * moved
        return bits.mean() * bits.shape[1] / 256 + self.lmbda * 255**2 * mse

    def _entropy_parameters(self, crop: Crop) -> Tensor:
        """(1, 2M, w, w) as h_s gives them for the whole image."""
        hyper = torch.from_numpy(crop.hyper_indices.astype(np.float32)) + self.medians
        both: Tensor = self.h_s(hyper[None].contiguous(memory_format=torch.channels_last))
        return both[:, :, crop.top : crop.top + WINDOW, crop.left : crop.left + WINDOW]


class Crop(NamedTuple):
    """As of an image; the hyper indices with a margin, in whose output the latents begin at `top` and `left`."""

    pixels: Pixels
    latent: Array
    hyper_indices: Array
    top: int
    left: int


def _crop(image: Image, random: np.random.Generator) -> Crop:
    """A window of whole latents of real pixels."""
    (top, y, v), (left, x, u) = (_axis(side, random) for side in image.pixels.shape[:2])
    return Crop(
        image.pixels[y.start * 16 : y.stop * 16, x.start * 16 : x.stop * 16],
        image.latent[:, y, x],
        image.hyper_indices[:, v, u],
        top,
        left,
    )


def _axis(pixels: int, random: np.random.Generator) -> tuple[int, slice, slice]:
    """Along one axis: where the latents begin in h_s's output, these latents, and the hyper latents."""
    start = int(random.integers(pixels // 16 - WINDOW + 1))
    first = max(0, start // 4 - HYPER_MARGIN)
    return (
        start - 4 * first,
        slice(start, start + WINDOW),
        slice(first, -(-(start + WINDOW) // 4) + HYPER_MARGIN),
    )


class _Searched:
    """The real indices of a batch, and what they cost.

    Attributes:
        level: the nearest σ level of each latent, uint8 (B, M, w, w).
        reconstruction: r̂, float32 (B, M, w, w).
    """

    def __init__(self, residual: Tensor, places: Tensor, tables: Tables) -> None:
        self.tables, self.shape = tables, residual.shape
        self.level = places.detach().round().to(torch.uint8)
        level = self._lanes(self.level)
        found = quantize(self._lanes(residual), level, tables)
        self.indices, self.contexts = found.indices, contexts(found.indices, tables)
        self.reconstruction = self._batch(found.reconstruction)

    def bits(self, places: Tensor) -> Tensor:
        """Of each index, between its two levels; float32 (B, M, w, w)."""
        lower = places.detach().floor().clamp_(0, SIGMA_LEVELS - 2)
        weight, level = places - lower, self._lanes(lower.to(torch.uint8))
        below, above = (
            self._batch(code_bits(self.tables, at, self.contexts, self.indices))
            for at in (level, level + np.uint8(1))
        )
        return (1 - weight) * below + weight * above

    def _lanes(self, values_BMHW: Tensor) -> Array:
        """[M, B · w · w], as a search goes through it."""
        return np.ascontiguousarray(values_BMHW.detach().transpose(0, 1).flatten(1).numpy())

    def _batch(self, values_MT: Array) -> Tensor:
        count, channels, *window = self.shape
        return torch.from_numpy(values_MT).view(channels, count, *window).transpose(0, 1)


class Slopes(NamedTuple):
    """By σ level, float32 (64,): of r̂ over r, and of bits over r²."""

    reconstruction: Tensor
    bits: Tensor


def _slopes(codec: Codec, tables: Tables, images: list[Image]) -> Slopes:
    """On these images' latents."""
    sums = np.zeros((6, SIGMA_LEVELS))
    for image in images:
        means, levels = codec.entropy_parameters(torch.from_numpy(image.hyper_indices)[None])
        level = levels[0].flatten(1).numpy()
        residual = (image.latent - means[0].numpy()).reshape(level.shape)
        found = quantize(residual, level, tables)
        bits = code_bits(tables, level, contexts(found.indices, tables), found.indices)
        square = np.square(residual, dtype=np.float64)
        of = (np.ones_like(square), residual * found.reconstruction, square, bits, bits * square, square**2)
        sums += [np.bincount(level.ravel(), values.ravel(), SIGMA_LEVELS) for values in of]
    _, product, square, bits, bits_square, fourth = sums / np.maximum(sums[0], 1)
    variance = np.maximum(fourth - square**2, 1e-12)
    slopes = (
        np.clip(product / np.maximum(square, 1e-9), 0, 1),
        np.maximum(bits_square - bits * square, 0) / variance,
    )
    return Slopes(*(torch.from_numpy(slope.astype(np.float32)) for slope in slopes))


if __name__ == "__main__":
    main(*sys.argv[1:])
