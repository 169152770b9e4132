"""Training a base codec: bits per pixel + λ · 255² · MSE on random crops, noise in place of the quantizer.

Everything random is drawn from (seed, step), so a training that resumes from a checkpoint, on any worker, goes on
exactly as one that was never stopped: to the bit on a CPU, up to the order in which CUDA sums on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.artifact import Codec
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.pixels import Pixels, centre_crop
from pipeline.training import initialisation
from pipeline.training.ahead import Ahead
from pipeline.training.fused import Fused
from pipeline.training.group import ALONE, Group
from pipeline.training.latent_crops import Arrays
from pipeline.training.optimization import (
    autocast,
    gradients,
    image_batch,
    learning_rate_factor,
    make_adam,
    make_optimizers,
    resolve_precision,
    set_learning_rate,
    state_from_bytes,
    state_to_bytes,
    step_metrics,
    training_device,
    unit_psnr_db,
)

AUXILIARY_LEARNING_RATE = 1e-3  # of the prior's quantiles, as in CompressAI's recipe


@dataclass(frozen=True)
class BaseSettings:
    """As in the experiment file's `train` section, for one λ."""

    N: int
    M: int
    lmbda: float
    steps: int
    batch: int
    crop: int  # pixels a side
    learning_rate: float
    warmup: int  # steps
    clip: float  # largest gradient norm
    precision: str  # auto, bfloat16, float32
    seed: int
    optimizer: str = "adam"  # of the filters: muon, adam
    initialise: str = "random"  # random, transform: see `pipeline.training.initialisation`
    transform_rate: float = 1.0  # of `learning_rate`, for g_a and g_s


class BaseTraining:
    """The state of one training; `advance` does a step.

    Attributes:
        remarks: what a person should hear of it.
    """

    def __init__(
        self,
        settings: BaseSettings,
        images: Arrays,
        *,
        start: Codec | None = None,
        start_lmbda: float | None = None,
        compiled: bool = False,
        group: Group = ALONE,
    ) -> None:
        """Start at step 0.

        Args:
            images: uint8 arrays (H, W, 3); those smaller than the crop are reflect-padded.
            start: whose weights it starts from, with fresh moments; random weights by default.
            start_lmbda: the λ it was trained with: its latents are scaled by √(λ / start_lmbda), at which the
                unit step is as right for the new λ as it was for that one.
            compiled: fuse what is not convolution by `torch.compile`, at its first step.
            group: of the workers that share each batch.

        Raises:
            ValueError: `start` has another N or M than the settings, or the group cannot share the batch equally.
        """
        self.settings, self.images, self.group = settings, images, group
        self.rows = group.rows(settings.batch)
        self.device = training_device()
        self.precision = resolve_precision(settings.precision, self.device)
        network = MeanScaleHyperprior(settings.N, settings.M)
        network.initialise(torch.Generator().manual_seed(settings.seed))
        if start:
            _take_weights(network, start.network)
            if start_lmbda:
                initialisation.scale_latents(network, math.sqrt(settings.lmbda / start_lmbda))
        elif settings.initialise == "transform":
            initialisation.start_as_transform(network, self._some_crops(), settings.lmbda)
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = Fused(self.network, compiled)
        quantiles = network.entropy_bottleneck.quantiles
        self.trained = [p for p in network.parameters() if p is not quantiles]
        self.main = self._make_optimizers()
        self.auxiliary = make_adam([quantiles], AUXILIARY_LEARNING_RATE)
        self.ahead = None if self.device.type == "cpu" else Ahead[Pixels]()
        self.step = 0
        self.remarks: list[str] = []

    def advance(self) -> dict[str, float]:
        """One step; its metrics: loss, bpp, psnr_db (of the unclipped batch), grad_norm.

        Raises:
            DivergedError: the loss is not finite; says at which step.
        """
        return self.forward.attempt(self._advance, self.remarks)

    def _advance(self) -> dict[str, float]:
        self._set_learning_rate()
        noise = torch.Generator(self.device).manual_seed(_seed(self.settings.seed, self.step))
        found = self._backward(image_batch(self._batch(), self.device), noise)
        metrics = step_metrics(self.step, "train.learning_rate", **found)
        self._take_step()
        self.step += 1
        return metrics

    def _set_learning_rate(self) -> None:
        s = self.settings
        set_learning_rate(self.main, s.learning_rate * learning_rate_factor(self.step, s.steps, s.warmup))

    def _backward(self, image_BCHW: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        """The gradients of a batch, averaged over the group and clipped; scalars loss, bpp, mse, grad_norm."""
        s = self.settings
        with autocast(self.precision, self.device):
            out = self.forward(image_BCHW, noise, s.batch, self.rows.start)
        mse = torch.mean(torch.square(out.x_hat.float() - image_BCHW))
        bpp = (out.bits_y + out.bits_z) / (len(image_BCHW) * s.crop * s.crop)
        loss = bpp + s.lmbda * 255**2 * mse
        self.network.zero_grad()
        loss.backward()
        self.group.average([*gradients(self.trained), *(value.detach() for value in (loss, bpp, mse))])
        norm = torch.nn.utils.clip_grad_norm_(self.trained, s.clip, foreach=True)
        return {"loss": loss, "bpp": bpp, "mse": mse, "grad_norm": norm}

    def _take_step(self) -> None:
        """With the gradients found; the auxiliary loss is of the weights alone, and so the same on all workers."""
        for optimizer in self.main.values():
            optimizer.step()
        self.auxiliary.zero_grad()
        self.network.auxiliary_loss().backward()
        self.auxiliary.step()

    @torch.no_grad()
    def held_out(self, images: Arrays) -> dict[str, float]:
        """The loss on the middles of other images, with the same noise at every step: held_out_loss, _bpp, _psnr_db."""
        s = self.settings
        sums = np.zeros(2)
        noise = torch.Generator(self.device).manual_seed(s.seed)
        for first in range(0, len(images), s.batch):
            rows = range(first, min(first + s.batch, len(images)))
            crops = np.stack([centre_crop(reflect_pad(images[i], s.crop), s.crop, 1) for i in rows])
            image_BCHW = image_batch(crops, self.device)
            with autocast(self.precision, self.device):
                out = self.network(image_BCHW, noise)
            mse = torch.square(out.x_hat.float() - image_BCHW).mean((1, 2, 3)).sum()
            sums += [float(out.bits_y + out.bits_z) / s.crop**2, float(mse)]
        bpp, mse_mean = sums / len(images)
        return {
            "held_out_loss": bpp + s.lmbda * 255**2 * mse_mean,
            "held_out_bpp": bpp,
            "held_out_psnr_db": unit_psnr_db(mse_mean),
        }

    def to_bytes(self) -> bytes:
        """Everything needed to go on."""
        return state_to_bytes({"network": self.network}, self._optimizers, self.step)

    def resume(self, data: bytes) -> None:
        """Go on from `to_bytes`. Raises CheckpointError."""
        self.step = state_from_bytes(data, {"network": self.network}, self._optimizers)

    @property
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.main | {"auxiliary": self.auxiliary}

    def _make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One set for all, or where g_a and g_s have a rate of their own, two."""
        s = self.settings
        if s.transform_rate == 1:
            return make_optimizers(self.trained, s.learning_rate, s.optimizer)
        transforms = [*self.network.g_a.parameters(), *self.network.g_s.parameters()]
        slow = {id(parameter) for parameter in transforms}
        others = [parameter for parameter in self.trained if id(parameter) not in slow]
        theirs = make_optimizers(transforms, s.learning_rate, s.optimizer, s.transform_rate)
        return make_optimizers(others, s.learning_rate, s.optimizer) | {
            f"transform_{name}": optimizer for name, optimizer in theirs.items()
        }

    def _some_crops(self) -> Tensor:
        """Of images drawn by the seed, on the CPU."""
        generator = np.random.default_rng([self.settings.seed, 2])
        chosen = generator.integers(len(self.images), size=initialisation.CROPS)
        crops = np.stack([random_crop(self.images[int(i)], initialisation.CROP, generator) for i in chosen])
        return image_batch(crops, torch.device("cpu"))

    def _batch(self) -> Pixels:
        return self.ahead(self._crops, self.step) if self.ahead else self._crops(self.step)

    def _crops(self, step: int) -> Pixels:
        """This worker's rows of a step's batch: uint8 (B, H, W, 3)."""
        s = self.settings
        generator = np.random.default_rng([s.seed, step])
        chosen = generator.integers(len(self.images), size=s.batch)
        crops = [random_crop(self.images[int(i)], s.crop, generator) for i in chosen]  # views
        return np.stack(crops[self.rows])


def _take_weights(network: MeanScaleHyperprior, start: MeanScaleHyperprior) -> None:
    if (start.N, start.M) != (network.N, network.M):
        raise ValueError(
            f"train.start: expected a codec of N = {network.N}, M = {network.M}, found N = {start.N}, M = {start.M}"
        )
    network.load_state_dict(start.state_dict())


def random_crop(pixels_HWC: Pixels, side: int, generator: np.random.Generator) -> Pixels:
    """A random square, flipped left to right every second time; smaller images are reflect-padded first."""
    height, width, _ = pixels_HWC.shape
    if height < side or width < side:
        pixels_HWC = reflect_pad(pixels_HWC, side)
        height, width, _ = pixels_HWC.shape
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    crop = pixels_HWC[top : top + side, left : left + side]
    return crop[:, ::-1] if generator.random() < 0.5 else crop


def reflect_pad(pixels_HWC: Pixels, side: int) -> Pixels:
    """Reflect at the bottom and right until both sides are at least `side` pixels."""
    height, width, _ = pixels_HWC.shape
    missing = ((0, max(0, side - height)), (0, max(0, side - width)), (0, 0))
    return np.pad(pixels_HWC, missing, mode="reflect")


def _seed(seed: int, step: int) -> int:
    """One 63-bit seed for a step's noise."""
    return int(np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)
