"""Finetuning the decoder on what it will see: real quantized latents, or a control that only simulates them.

`parts: decoder` trains g_s on the distortion alone, since its indices, and so its rate, are fixed.
`parts: decoder+scale` also trains the scale rows (the first M output filters of h_s's last layer). Their rate is that
of the stored indices k under the tables, interpolated linearly in log σ between the two neighbouring levels at fixed
quantizer Q and k, with the gradient through the weight.

Source: Borzechowski et al., ICIP 2024, arXiv 2506.08662, section 3; the controls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.codec.artifact import Codec
from pipeline.quantizers.lookup import code_bits
from pipeline.quantizers.tables import Tables
from pipeline.sigma import SIGMA_LEVELS, SIGMA_MAX, SIGMA_MIN
from pipeline.training.fused import Fused
from pipeline.training.group import ALONE, Group
from pipeline.training.latent_crops import Batches, LatentBatch
from pipeline.training.optimization import (
    gradients,
    image_batch,
    learning_rate_factor,
    make_optimizers,
    resolve_precision,
    set_learning_rate,
    state_from_bytes,
    state_to_bytes,
    step_metrics,
    training_device,
)

Array = npt.NDArray[Any]

ROUNDING_SAMPLES = 1 << 24

# What each kind of latents reads of an image (`jobs.finetune` provides it).
FIELDS: Mapping[str, tuple[str, ...]] = {
    "quantized": ("reconstruction",),
    "noise": ("latent", "sigma_index"),
    "uniform": ("latent", "sigma_index"),
    "rounded": ("latent", "means"),
}
SCALE_FIELDS = ("indices", "contexts", "features")


@dataclass(frozen=True)
class FinetuneSettings:
    """As in the experiment file's `arms`, for one λ and seed."""

    parts: str  # decoder, decoder+scale
    latents: str  # quantized, noise, uniform, rounded
    lmbda: float
    steps: int
    batch: int
    crop: int  # pixels a side, margin included
    learning_rate: float
    warmup: int  # steps
    clip: float  # largest gradient norm
    precision: str
    seed: int
    optimizer: str = "adam"  # of the filters: muon, adam


@dataclass(frozen=True)
class Control:
    """How a control simulates the arm's quantizer; empty for the arm itself.

    Attributes:
        noise_width: width of the uniform noise per σ index, float32 (64,): √(12 · E(ŷ − y)²) as measured, or 1.
        rounding_step: step of the plain rounding whose MSE is the arm's.
        mse: what that rounding has.
    """

    noise_width: npt.NDArray[np.float32] | None = None
    rounding_step: float | None = None
    mse: float | None = None


class FinetuneTraining:
    """The state of one finetuning; `advance` does a step.

    Attributes:
        remarks: what a person should hear of it.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        codec: Codec,
        tables: Tables,
        crops: Batches,
        control: Control,
        *,
        compiled: bool = False,
        group: Group = ALONE,
    ) -> None:
        """Start from a codec at step 0; the codec itself is not changed.

        Args:
            compiled: fuse what is not convolution by `torch.compile`, at the first step.
            group: of the workers that share each batch.

        Raises:
            ValueError: the group cannot share the batch equally.
        """
        self.settings, self.codec, self.tables, self.crops = settings, codec, tables, crops
        self.control, self.group, self.rows = control, group, group.rows(settings.batch)
        self.device = training_device()
        self.precision = resolve_precision(settings.precision, self.device)
        side = codec.decoder_side().to(self.device)
        self.side = side.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.synthesise = Fused(self.side.synthesise, compiled)
        trained = list(side.decoder_parameters())
        if self.trains_scale:
            trained += list(side.scale_parameters())
        self.trained = trained
        self.optimizers = make_optimizers(trained, settings.learning_rate, settings.optimizer)
        self.step = 0
        self.remarks: list[str] = []

    @property
    def trains_scale(self) -> bool:
        """Whether the scale rows are trained too."""
        return self.settings.parts == "decoder+scale"

    def advance(self) -> dict[str, float]:
        """One step; its metrics: loss, psnr_db, grad_norm, and bpp of y where scale rows are trained.

        Raises:
            DivergedError: the loss is not finite; says at which step.
        """
        batch = self.crops.batch(self.step, self.settings.batch, self.rows)
        pixels = self._count(batch.loss_mask)
        latents = self._count(batch.latent_mask) if self.trains_scale else None
        return self.synthesise.attempt(lambda: self._advance(batch, pixels, latents), self.remarks)

    def _advance(self, batch: LatentBatch, pixels: Tensor, latents: Tensor | None) -> dict[str, float]:
        s = self.settings
        set_learning_rate(
            self.optimizers, s.learning_rate * learning_rate_factor(self.step, s.steps, s.warmup)
        )
        mse = self._distortion(batch, pixels)
        bpp = None if latents is None else self._rate(batch, latents)
        loss = s.lmbda * 255**2 * mse + (0 if bpp is None else bpp)
        self.side.zero_grad()
        loss.backward()
        rate = {} if bpp is None else {"bpp_y": bpp}
        self.group.average(
            [*gradients(self.trained), *(value.detach() for value in (loss, mse, *rate.values()))]
        )
        norm = torch.nn.utils.clip_grad_norm_(self.trained, s.clip, foreach=True)
        metrics = step_metrics(
            self.step, "the arm's learning_rate", loss=loss, mse=mse, grad_norm=norm, **rate
        )
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        return metrics

    def result(self) -> Codec:
        """The finetuned codec: everything that was not trained is bit-identical to the given one.

        Raises:
            RuntimeError: it is not, which is a bug.
        """
        finetuned = self.codec.refined(self.side)
        before, after = self.codec.digests(), finetuned.digests()
        for name in ("grid",) if self.trains_scale else ("grid", "rate"):
            if getattr(after, name) != getattr(before, name):
                raise RuntimeError(
                    f"finetuning {self.settings.parts} changed the codec's {name} digest: please report"
                )
        return finetuned

    def to_bytes(self) -> bytes:
        """Everything needed to go on."""
        return state_to_bytes({"side": self.side}, self.optimizers, self.step)

    def resume(self, data: bytes) -> None:
        """Go on from `to_bytes`. Raises CheckpointError."""
        self.step = state_from_bytes(data, {"side": self.side}, self.optimizers)

    def _count(self, mask: npt.NDArray[np.bool_]) -> Tensor:
        """How many are set, as the mean over the workers."""
        return self.group.mean_count(torch.tensor(np.count_nonzero(mask), device=self.device))

    def _distortion(self, batch: LatentBatch, pixels: Tensor) -> Tensor:
        """MSE over the pixels that carry loss, which are so many."""
        y_hat = self._latents(batch).contiguous(memory_format=torch.channels_last)
        x_hat = self.synthesise(y_hat, mixed=self.precision == "bfloat16")
        image_BCHW = image_batch(batch.pixels, self.device)
        mask = torch.from_numpy(batch.loss_mask).to(self.device)[:, None]
        return (torch.square(x_hat - image_BCHW) * mask).sum() / (3 * pixels)

    def _latents(self, batch: LatentBatch) -> Tensor:
        """What the decoder gets, float32 (B, M, w, w): stored reconstructions, or a control's."""
        if self.settings.latents == "quantized":
            return self._field(batch, "reconstruction").float()
        y = self._field(batch, "latent").float()
        if self.settings.latents == "rounded":
            means, step = self._field(batch, "means").float(), self.control.rounding_step
            assert step is not None
            return means + torch.round((y - means) / step) * step
        assert self.control.noise_width is not None
        whole = (self.settings.batch, *y.shape[1:])
        random = np.random.default_rng([self.settings.seed, 2, self.step]).random(whole, np.float32) - 0.5
        noise = random[self.rows] * self.control.noise_width[batch.fields["sigma_index"].astype(np.intp)]
        inside = torch.from_numpy(batch.latent_mask).to(self.device)[:, None]
        return y + torch.from_numpy(noise).to(self.device) * inside

    def _rate(self, batch: LatentBatch, latents: Tensor) -> Tensor:
        """Bits of y per pixel of the crops' latents, which are so many, as the scale rows would have them."""
        levels = level_places(self.side.scales(self._field(batch, "features")))
        lower = levels.detach().floor().clamp_(0, SIGMA_LEVELS - 2)
        weight = levels - lower
        index = lower.cpu().numpy().astype(np.uint8)
        contexts, indices = (
            batch.fields["contexts"].astype(np.uint8),
            batch.fields["indices"].astype(np.int32),
        )
        below, above = (
            torch.from_numpy(code_bits(self.tables, level, contexts, indices)).to(self.device)
            for level in (index, index + np.uint8(1))
        )
        inside = torch.from_numpy(batch.latent_mask).to(self.device)[:, None]
        bits = ((1 - weight) * below + weight * above) * inside
        return bits.sum() / (latents * 256)

    def _field(self, batch: LatentBatch, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(batch.fields[name])).to(self.device)


def level_places(scales: Tensor) -> Tensor:
    """Where σ lies between the 64 levels: 0 … 63, linear in log σ between neighbours; same shape."""
    spacing = math.log(SIGMA_MAX / SIGMA_MIN) / (SIGMA_LEVELS - 1)
    return (torch.log(scales / SIGMA_MIN) / spacing).clamp(0, SIGMA_LEVELS - 1)


def noise_widths(errors: Iterable[Array], sigma_indices: Iterable[Array]) -> npt.NDArray[np.float32]:
    """Per σ index, the width √(12 · E(ŷ − y)²) of the uniform noise with the measured variance; float32 (64,).

    Args:
        errors: ŷ − y of each image.
        sigma_indices: of the same shapes.
    """
    square, count = np.zeros(SIGMA_LEVELS), np.zeros(SIGMA_LEVELS)
    for error, index in zip(errors, sigma_indices, strict=True):
        square += np.bincount(index.ravel(), np.square(error, dtype=np.float64).ravel(), SIGMA_LEVELS)
        count += np.bincount(index.ravel(), minlength=SIGMA_LEVELS)
    return np.sqrt(12 * square / np.maximum(count, 1)).astype(np.float32)


def unit_widths() -> npt.NDArray[np.float32]:
    """Of the usual noise in [−½, ½), whatever the quantizer's step; float32 (64,)."""
    return np.ones(SIGMA_LEVELS, np.float32)


def rounding_step(residuals: Iterable[Array], count: int, mse: float) -> tuple[float, float]:
    """The step at which plain rounding of the residuals y − μ has the given MSE, by bisection to 1e-4 of it.

    Args:
        residuals: one array per image.
        count: how many values they hold together; above 2**24 an evenly spaced part of them decides.
        mse: the quantizer's. Where it is more than E(y − μ)² no step reaches it.

    Returns:
        The step, and the MSE that it has.
    """
    stride = -(-count // ROUNDING_SAMPLES)
    residual = np.concatenate([np.ravel(r)[::stride] for r in residuals]).astype(np.float32)

    def mse_of(step: float) -> float:
        return float(np.mean(np.square(residual - np.round(residual / np.float32(step)) * np.float32(step))))

    low, high = 1e-3, 64.0
    while high - low > 1e-4 * low:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mse_of(middle) < mse else (low, middle)
    step = 0.5 * (low + high)
    return step, mse_of(step)
