"""The mean-scale hyperprior of Minnen et al. 2018 without context model; CompressAI's `MeanScaleHyperprior`.

    x ──g_a──► y ──h_a──► z ──noise / round──► ẑ ──h_s──► (scales, means)
               └──────────────noise / trellis──────────────► ŷ ──g_s──► x̂

Suffixes: B batch, C channels (3 of an image, M of a latent, N of a hyper latent), H and W height and width.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from pipeline.codec.entropy_models import FactorizedPrior, gaussian_bits
from pipeline.codec.layers import GDN, Deconv, conv


class Trained(NamedTuple):
    """What a training step sees: x̂ (B, 3, H, W), unclipped float32, and the batch's bits (two scalars)."""

    x_hat: Tensor
    bits_y: Tensor
    bits_z: Tensor


class MeanScaleHyperprior(nn.Module):
    """Analysis g_a, synthesis g_s, hyper transforms h_a and h_s, and the factorized prior of z.

    Source: Minnen, Ballé, Toderici, "Joint autoregressive and hierarchical priors for learned image compression"
    (NeurIPS 2018). State-dict names are CompressAI's; its derived buffers do not exist here.

    Args:
        N: channels of the transforms and of z.
        M: channels of y; the first M outputs of h_s are scales, the last M means.
    """

    def __init__(self, N: int, M: int) -> None:
        super().__init__()
        self.N, self.M = N, M
        self.entropy_bottleneck = FactorizedPrior(N)
        self.g_a = nn.Sequential(
            conv(3, N), GDN(N), conv(N, N), GDN(N), conv(N, N), GDN(N), conv(N, M)
        )  # fmt: skip
        self.g_s = nn.Sequential(
            Deconv(M, N),
            GDN(N, inverse=True),
            Deconv(N, N),
            GDN(N, inverse=True),
            Deconv(N, N),
            GDN(N, inverse=True),
            Deconv(N, 3),
        )
        self.h_a = nn.Sequential(
            conv(M, N, kernel=3, stride=1), nn.LeakyReLU(), conv(N, N), nn.LeakyReLU(), conv(N, N)
        )
        self.h_s = nn.Sequential(
            Deconv(N, M),
            nn.LeakyReLU(),
            Deconv(M, M * 3 // 2),
            nn.LeakyReLU(),
            conv(M * 3 // 2, M * 2, kernel=3, stride=1),
        )

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Self:
        """Draw every parameter that starts at random from `generator`; returns self.

        Convolutions: uniform in ±1/√fan-in, weights and biases (torch's default, which CompressAI trains from).
        Biases of the prior: uniform in ±½. GDN and the rest of the prior start at fixed values.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                assert module.bias is not None
                bound = module.weight[0].numel() ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        for bias in self.entropy_bottleneck.biases:
            bias.uniform_(-0.5, 0.5, generator=generator)
        return self

    def forward(
        self, image_BCHW: Tensor, generator: torch.Generator, batch: int | None = None, first: int = 0
    ) -> Trained:
        """One training pass with uniform noise in place of rounding, for the rate and for the decoder.

        Args:
            image_BCHW: (B, 3, H, W) in [0, 1], H and W multiples of 64.
            generator: where the noise is drawn from (on its own device, so a CPU generator gives the same noise
                whatever the images' device).
            batch, first: the images are rows of a batch of this size, from this one on, and get the noise that they
                would get there; by default they are the batch.

        Runs under autocast as the caller sets it; entropy models are float32 always.
        """
        y = self.g_a(image_BCHW)
        z = self.h_a(y).float()
        y = y.float()
        z_noisy = z + uniform_noise(z, generator, batch, first)
        scales, means = self.h_s(z_noisy).float().chunk(2, 1)
        y_noisy = y + uniform_noise(y, generator, batch, first)
        return Trained(
            x_hat=self.g_s(y_noisy).float(),
            bits_y=gaussian_bits(y_noisy, scales, means).sum(),
            bits_z=self.entropy_bottleneck.bits(z_noisy).sum(),
        )

    def auxiliary_loss(self) -> Tensor:
        """The loss that trains `quantiles` alone, with an optimizer of its own; a scalar."""
        return self.entropy_bottleneck.auxiliary_loss()


def uniform_noise(
    like: Tensor, generator: torch.Generator, batch: int | None = None, first: int = 0
) -> Tensor:
    """Uniform noise in [−½, ½) of `like`'s shape and dtype, drawn on the generator's device.

    Args:
        batch, first: it is drawn for a batch of this size, of which `like` is the rows from `first` on.
    """
    count, *shape = like.shape
    noise = torch.rand(
        (batch or count, *shape), generator=generator, device=generator.device, dtype=like.dtype
    )
    return noise[first : first + count].to(like.device) - 0.5
