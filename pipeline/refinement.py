"""Effort in the encoder: indices chosen by what the decoder makes of them, not by how near they lie to y.

What g_a gives is a guess for each image. From its indices on, steps look for a lower

    J = bits + λ · 255² / 3 · ‖x̂ − x‖²        (x and the clipped x̂ in [0, 1], the sum over pixels and channels)

Around the ŷ at hand, with g the gradient of the distortion there and L a curvature, J is approximately

    bits(ŷ') + g · (ŷ' − ŷ) + L/2 · ‖ŷ' − ŷ‖² + const = bits(ŷ') + L/2 · ‖ŷ' − t‖² + other const,    t = ŷ − g/L

whose exact minimum a search finds, for the target t and the weight of rate λ_q = 2/L. Gradients of single steps are
noisy, since a trellis that moves one index moves others along its path. So what a target t leaves unquantized is kept
for the next one:

    t ← ŷ + MEMORY · (t − ŷ) − PULL · g/L,    at first t = y

which, while ŷ and g stay, tends to ŷ − 1.5 · g/L. A step that does not lower J is taken back, and the next one takes a
larger L; after one that does it takes a smaller one. The indices of the lowest J, at worst those of y itself, are where
it ends. Hyper latents stay as they are, and decoders notice nothing.

Source: Campos et al., "Content adaptive optimization for neural image compression" (CVPR Workshops 2019), with the
real quantizer in place of noise. The parabola is as in Hunter & Lange, "A tutorial on MM algorithms" (2004), but L is
tried, no bound; its use with a trellis, and the memory, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.codec.artifact import Codec, strict_float32
from pipeline.quantizer_kinds import LMBDA_Q_MAX
from pipeline.quantizers import Quantized, Tables, quantize

Floats = npt.NDArray[np.float32]
# Found on four crops of held-out images at three λ, for rounding and for the trellis of VVC.
RATE_WEIGHT = 0.16  # λ_q/Δ² of the first step, which is 2/L in units of Δ²
MEMORY = 0.8  # of how far the last target lay from its ŷ
PULL = 0.3  # of g/L
LOOSEN, TIGHTEN = 1 / 0.9, 1 / 1.5  # the weight of rate, after a step that lowered J and one that did not


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
        search = _Search(codec, image_BCHW.clone(), means_MHW, sigma_index_MHW, weight)
        best, rate_weight = search.at(latent_MHW, tables), RATE_WEIGHT
        for _ in range(refinement.steps):
            new = search.follow(best, tables, rate_weight)
            if new is not None and new.cost < best.cost:
                best, rate_weight = new, min(rate_weight * LOOSEN, LMBDA_Q_MAX)
            else:
                rate_weight *= TIGHTEN
            del new  # with its graph, before the next one is built
    return best.found


class _Search:
    """What stays the same from target to target."""

    def __init__(
        self,
        codec: Codec,
        image_BCHW: Tensor,
        means_MHW: Floats,
        sigma_index_MHW: npt.NDArray[np.uint8],
        weight: float,
    ) -> None:
        self.image, self.weight = image_BCHW, weight
        self.side = codec.decoder_side().requires_grad_(False)
        self.means, self.sigma_index = means_MHW, sigma_index_MHW

    def at(self, target_MHW: Floats, tables: Tables) -> _Tried:
        """A target, quantized and decoded."""
        shape = target_MHW.shape
        residual = (target_MHW - self.means).reshape(shape[0], -1)
        found = quantize(residual, self.sigma_index.reshape(shape[0], -1), tables)
        latent = torch.from_numpy(self.means + found.reconstruction.reshape(shape))[None].requires_grad_(True)
        height, width = self.image.shape[-2:]
        with strict_float32(latent.device):
            x_hat = self.side.synthesise(latent)[..., :height, :width].clamp(0, 1)
            error = self.weight * torch.square(x_hat - self.image).sum()
        cost = float(found.bits.sum()) + float(error.detach())
        left = target_MHW - latent.detach()[0].numpy()
        return _Tried(found, cost, error, latent, left)

    def follow(self, tried: _Tried, tables: Tables, rate_weight: float) -> _Tried | None:
        """The target after one tried, under a weight of rate; None where it is not finite."""
        inverse_curvature = rate_weight * tables.settings.step**2 / 2
        away = MEMORY * tried.left - PULL * inverse_curvature * tried.gradient
        target = tried.latent.detach()[0].numpy() + away
        return self.at(target, tables.weighing(rate_weight)) if np.isfinite(target).all() else None


@dataclass(eq=False)
class _Tried:
    """What a target is quantized to.

    Attributes:
        cost: J in bits.
        error: what of J is distortion, with its graph back to ŷ until the gradient has been asked for.
        latent: ŷ, float32 (1, M, h, w).
        left: t − ŷ, float32 (M, h, w).
    """

    found: Quantized
    cost: float
    error: Tensor
    latent: Tensor
    left: Floats

    @cached_property
    def gradient(self) -> Floats:
        """Of the distortion in bits at ŷ, float32 (M, h, w). What it was made of is let go."""
        with strict_float32(self.latent.device):
            (slope,) = torch.autograd.grad(self.error, self.latent)
        self.error = self.error.detach()
        gradient: Floats = slope[0].numpy()
        return gradient
