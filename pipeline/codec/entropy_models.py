"""Entropy models of training: the factorized prior of z and the conditional Gaussian of y, in float32 always.

Suffixes: B batch, N hyper-latent channels, H and W height and width, S samples of one channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.codec.layers import lower_bound
from pipeline.sigma import SIGMA_MIN

LIKELIHOOD_MIN = 1e-9
TAIL_MASS = 1e-9
INIT_SCALE = 10.0
FILTERS = (3, 3, 3, 3)


def gaussian_bits(y_hat: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """Bits of each latent under N(mean, scale²) integrated over its unit cell: −log₂ P(|u − ŷ| ≤ ½).

    Args:
        y_hat: rounded or noisy latents, any shape.
        scales: raw scales, same shape; bounded below by 0.11 with a gradient that passes where it raises them.
        means: same shape.

    Returns:
        float32 of the same shape, at most 29.9 (likelihoods are bounded below by 1e-9).

    Source: Minnen, Ballé, Toderici, "Joint autoregressive and hierarchical priors" (NeurIPS 2018), section 2.
    """
    with torch.autocast(y_hat.device.type, enabled=False):
        sigma = lower_bound(scales.float(), SIGMA_MIN)
        distance = torch.abs(y_hat.float() - means.float())
        # Both ends lie in the lower tail, where erfc keeps its precision.
        likelihood = _normal_cdf((0.5 - distance) / sigma) - _normal_cdf((-0.5 - distance) / sigma)
        return -torch.log2(lower_bound(likelihood, LIKELIHOOD_MIN))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x * -(2**-0.5))


class FactorizedPrior(nn.Module):
    """Fully factorized density of the hyper latents, one monotone network a channel, filters (3, 3, 3, 3).

    Parameter names and shapes are those of CompressAI's `EntropyBottleneck`. `quantiles` (N, 1, 3) holds each
    channel's lower tail, median and upper tail; only `auxiliary_loss` trains it.
    Source: Ballé et al., "Variational image compression with a scale hyperprior" (ICLR 2018), appendix 6.1.

    Args:
        channels: N.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (1, *FILTERS, 1)
        layers = range(len(widths) - 1)
        spread = INIT_SCALE ** (1 / (len(widths) - 1))
        starts = [math.log(math.expm1(1 / spread / widths[i + 1])) for i in layers]
        self.matrices = nn.ParameterList(
            torch.full((channels, widths[i + 1], widths[i]), starts[i]) for i in layers
        )
        self.biases = nn.ParameterList(torch.rand(channels, widths[i + 1], 1) - 0.5 for i in layers)
        self.factors = nn.ParameterList(torch.zeros(channels, widths[i + 1], 1) for i in layers[:-1])
        start = torch.tensor([-INIT_SCALE, 0.0, INIT_SCALE])
        self.quantiles = nn.Parameter(start.repeat(channels, 1, 1))

    @property
    def medians(self) -> Tensor:
        """Medians, what ẑ is rounded relative to; shape (N,), detached."""
        return self.quantiles[:, 0, 1].detach()

    def cumulative_logits(self, samples_N1S: Tensor) -> Tensor:
        """Logit of the cumulative distribution at each sample; (N, 1, S) -> (N, 1, S)."""
        return self._logits(samples_N1S, [*self.matrices], [*self.biases], [*self.factors])

    def bits(self, z_hat_BNHW: Tensor) -> Tensor:
        """Bits of each rounded or noisy hyper latent; (B, N, H, W) -> float32 (B, N, H, W), at most 29.9 each."""
        with torch.autocast(z_hat_BNHW.device.type, enabled=False):
            batch, channels, height, width = z_hat_BNHW.shape
            samples = z_hat_BNHW.float().transpose(0, 1).reshape(channels, 1, -1)
            likelihood = lower_bound(self.interval_probability(samples), LIKELIHOOD_MIN)
            bits = -torch.log2(likelihood)
            return bits.reshape(channels, batch, height, width).transpose(0, 1)

    def interval_probability(self, samples_N1S: Tensor) -> Tensor:
        """P(sample − ½ < z ≤ sample + ½); (N, 1, S) -> (N, 1, S)."""
        lower = self.cumulative_logits(samples_N1S - 0.5)
        upper = self.cumulative_logits(samples_N1S + 0.5)
        # σ(u) − σ(l) = σ(−l) − σ(−u): take the side where neither is near 1 and digits are kept.
        sign = torch.where(lower + upper > 0, -1.0, 1.0)
        return torch.abs(torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower))

    def auxiliary_loss(self) -> Tensor:
        """Σ |logit of the distribution at each quantile − target|, a scalar whose gradient reaches `quantiles` only.

        The targets are a mass of 1e-9 / 2 below and above, and ½ at the median.
        """
        with torch.autocast(self.quantiles.device.type, enabled=False):
            frozen = [
                [parameter.detach() for parameter in group]
                for group in (self.matrices, self.biases, self.factors)
            ]
            logits = self._logits(self.quantiles, *frozen)
            tail = math.log(2 / TAIL_MASS - 1)
            return torch.abs(logits - torch.linspace(-tail, tail, 3, device=logits.device)).sum()

    @staticmethod
    def _logits(x: Tensor, matrices: list[Tensor], biases: list[Tensor], factors: list[Tensor]) -> Tensor:
        for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            x = functional.softplus(matrix) @ x + bias
            if i < len(factors):
                x = x + torch.tanh(factors[i]) * torch.tanh(x)
        return x
