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
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.codec.artifact import Codec, strict_float32
from pipeline.codec.entropy_models import gaussian_bits
from pipeline.quantizers import Quantized, Tables, quantize
from pipeline.sigma import sigma_levels

Floats = npt.NDArray[np.float32]
STEP = 0.005  # latent units per unit of ∂J/∂t, J in bits of the whole image


@dataclass(frozen=True)
class Refinement:
    """How much effort, and for which trade.

    Attributes:
        steps: each costs a search, a synthesis, and where J fell its gradient.
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
    weight = refinement.lmbda * 255**2 / 3
    with torch.inference_mode(False), torch.enable_grad():
        search = _Search(codec, tables, image_BCHW.clone(), means_MHW, sigma_index_MHW, weight)
        best, length = search.at(latent_MHW), STEP
        for _ in range(refinement.steps):
            target = best.target - np.float32(length) * best.gradient
            new = search.at(target) if np.isfinite(target).all() else None
            if new is not None and new.cost < best.cost:
                best = new
            else:
                length /= 2
    return best.found


class _Search:
    """What stays the same from target to target."""

    def __init__(
        self,
        codec: Codec,
        tables: Tables,
        image_BCHW: Tensor,
        means_MHW: Floats,
        sigma_index_MHW: npt.NDArray[np.uint8],
        weight: float,
    ) -> None:
        self.tables, self.image, self.weight = tables, image_BCHW, weight
        self.side = codec.decoder_side().requires_grad_(False)
        self.means, self.sigma_index = means_MHW, sigma_index_MHW
        self.means_tensor = torch.from_numpy(means_MHW.copy())
        self.scales = torch.from_numpy(sigma_levels().astype(np.float32)[sigma_index_MHW])

    def at(self, target_MHW: Floats) -> _Tried:
        """A target, quantized and decoded."""
        shape = target_MHW.shape
        residual = (target_MHW - self.means).reshape(shape[0], -1)
        found = quantize(residual, self.sigma_index.reshape(shape[0], -1), self.tables)
        latent = torch.from_numpy(self.means + found.reconstruction.reshape(shape))[None].requires_grad_(True)
        height, width = self.image.shape[-2:]
        with strict_float32(latent.device):
            x_hat = self.side.synthesise(latent)[..., :height, :width].clamp(0, 1)
            error = torch.square(x_hat - self.image).sum()
        cost = float(found.bits.sum()) + self.weight * float(error.detach())
        return _Tried(self, target_MHW, found, cost, error, latent)


@dataclass(eq=False)
class _Tried:
    """A target, what it is quantized to, and J in bits; J's gradient at the target once somebody asks."""

    search: _Search
    target: Floats
    found: Quantized
    cost: float
    error: Tensor
    latent: Tensor

    @cached_property
    def gradient(self) -> Floats:
        """The distortion's at ŷ, and that of the target's bits under Gaussians. What it was made of is let go."""
        search = self.search
        with strict_float32(self.latent.device):
            (slope,) = torch.autograd.grad(self.error, self.latent)
        self.error = self.error.detach()
        target = torch.from_numpy(self.target.copy()).requires_grad_(True)
        bits = gaussian_bits(target, search.scales, search.means_tensor).sum()
        found: Floats = (search.weight * slope[0] + torch.autograd.grad(bits, target)[0]).numpy()
        return found
