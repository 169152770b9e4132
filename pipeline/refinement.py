"""Effort in the encoder: latents moved, before they are quantized, to where the picture's J is lower.

What g_a gives is a guess for each image. From y on, each step quantizes a target t for real, decodes, and moves t
against the gradient of

    J = bits + λ · 255² / 3 · ‖x̂ − x‖²        (x and the clipped x̂ in [0, 1], the sum over pixels and channels)

straight through the quantizer: the distortion's gradient at ŷ counts as that at t, the bits are those of Gaussians of
the levels' σ. A step that raises J is taken back and halved, so the indices of the lowest J, at worst those of y
itself, are where it ends. Hyper latents stay as they are, and decoders notice nothing.

Source: Campos et al., "Content adaptive optimization for neural image compression" (CVPR Workshops 2019), with the
real quantizer in the loop; step and rule are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.codec.artifact import Codec, strict_float32
from pipeline.codec.decoder_side import DecoderSide
from pipeline.codec.entropy_models import gaussian_bits
from pipeline.quantizers import Quantized, Tables, quantize
from pipeline.sigma import sigma_levels

Floats = npt.NDArray[np.float32]
STEP = 0.0025  # latent units per unit of ∂J/∂t, J in bits of the whole image


@dataclass(frozen=True)
class Refinement:
    """How much effort, and for which trade.

    Attributes:
        steps: each costs a synthesis, its gradient and a search.
        lmbda: λ, the weight of distortion, that the codec was trained for.

    Raises:
        ValueError: not at least one step, or a λ that is not above 0.
    """

    steps: int
    lmbda: float

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lmbda > 0:
            raise ValueError(f"expected at least one step and a λ above 0, found {self.steps}, {self.lmbda}")


def refine(
    codec: Codec,
    tables: Tables,
    image_BCHW: Tensor,
    latent_MHW: Floats,
    means_MHW: Floats,
    sigma_index_MHW: npt.NDArray[np.uint8],
    refinement: Refinement,
) -> Quantized:
    """The quantized residuals [M, h · w] of the lowest J that was found.

    Args:
        image_BCHW: float32 (1, 3, H, W) in [0, 1], not padded.
        latent_MHW: y; the others as `pipeline.coding.Analysed` has them.
    """
    shape = latent_MHW.shape
    weight = refinement.lmbda * 255**2 / 3
    sigma_CT = sigma_index_MHW.reshape(shape[0], -1)
    scales = torch.from_numpy(sigma_levels().astype(np.float32)[sigma_index_MHW])
    with torch.inference_mode(False), torch.enable_grad():
        image, means = image_BCHW.clone(), torch.from_numpy(means_MHW.copy())
        side = codec.decoder_side().requires_grad_(False)

        def tried(target: Floats) -> _Tried:
            found = quantize((target - means_MHW).reshape(shape[0], -1), sigma_CT, tables)
            error, slope = _distortion(side, means_MHW + found.reconstruction.reshape(shape), image)
            gradient = weight * slope + _rate_gradient(target, means, scales)
            return _Tried(target, found, float(found.bits.sum()) + weight * error, gradient)

        best, length = tried(latent_MHW), STEP
        for _ in range(refinement.steps):
            target = best.target - np.float32(length) * best.gradient
            new = tried(target) if np.isfinite(target).all() else None
            if new is not None and new.cost < best.cost:
                best = new
            else:
                length /= 2
    return best.found


class _Tried(NamedTuple):
    """A target, what it is quantized to, J in bits, and J's gradient at the target."""

    target: Floats
    found: Quantized
    cost: float
    gradient: Floats


def _distortion(side: DecoderSide, latent_MHW: Floats, image: Tensor) -> tuple[float, Floats]:
    """‖x̂ − x‖², and its gradient at ŷ."""
    height, width = image.shape[-2:]
    latent = torch.from_numpy(latent_MHW)[None].requires_grad_(True)
    with strict_float32(latent.device):
        error = torch.square(side.synthesise(latent)[..., :height, :width].clamp(0, 1) - image).sum()
    (gradient,) = torch.autograd.grad(error, latent)
    return float(error.detach()), gradient[0].numpy()


def _rate_gradient(target_MHW: Floats, means: Tensor, scales: Tensor) -> Floats:
    """Of the target's bits under Gaussians."""
    target = torch.from_numpy(target_MHW.copy()).requires_grad_(True)
    (gradient,) = torch.autograd.grad(gaussian_bits(target, scales, means).sum(), target)
    found: Floats = gradient.numpy()
    return found
