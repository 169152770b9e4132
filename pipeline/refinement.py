"""Effort in the encoder: latents moved, before they are quantized, to where the picture's J is lower.

What g_a gives is a guess for each image. From y on, each step quantizes the target t for real, decodes, and moves t
against the gradient of

    J = bits + λ · 255² / 3 · ‖x̂ − x‖²        (x in [0, 1], the sum over pixels and their three channels)

straight through the quantizer: the distortion's gradient at ŷ counts as that at t, the bits are those of Gaussians of
the levels' σ. Hyper latents stay as they are. Of all steps, y itself first, the indices of the lowest J are taken, so
that no image gets worse. Decoders notice nothing.

Source: Campos et al., "Content adaptive optimization for neural image compression" (CVPR Workshops 2019), with the
real quantizer in the loop; step and rule are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    target, best, lowest = latent_MHW.copy(), None, np.inf
    with torch.inference_mode(False), torch.enable_grad():
        image, means = image_BCHW.clone(), torch.from_numpy(means_MHW.copy())
        side = codec.decoder_side().requires_grad_(False)
        for step in range(refinement.steps + 1):
            found = quantize((target - means_MHW).reshape(shape[0], -1), sigma_CT, tables)
            latent = means_MHW + found.reconstruction.reshape(shape)
            error, gradient = _distortion(side, latent, image, with_gradient=step < refinement.steps)
            cost = float(found.bits.sum()) + weight * error
            if best is None or cost < lowest:
                best, lowest = found, cost
            if gradient is not None:
                target -= STEP * (weight * gradient + _rate_gradient(target, means, scales))
    assert best is not None
    return best


def _distortion(
    side: DecoderSide, latent_MHW: Floats, image: Tensor, *, with_gradient: bool
) -> tuple[float, Floats | None]:
    """‖x̂ − x‖², and its gradient at ŷ."""
    height, width = image.shape[-2:]
    latent = torch.from_numpy(latent_MHW)[None].requires_grad_(with_gradient)
    with strict_float32(latent.device), torch.set_grad_enabled(with_gradient):
        error = torch.square(side.synthesise(latent)[..., :height, :width] - image).sum()
    if not with_gradient:
        return float(error), None
    (gradient,) = torch.autograd.grad(error, latent)
    return float(error.detach()), gradient[0].numpy()


def _rate_gradient(target_MHW: Floats, means: Tensor, scales: Tensor) -> Floats:
    """Of the target's bits under Gaussians."""
    target = torch.from_numpy(target_MHW.copy()).requires_grad_(True)
    (gradient,) = torch.autograd.grad(gaussian_bits(target, scales, means).sum(), target)
    found: Floats = gradient.numpy()
    return found
