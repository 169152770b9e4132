"""Where a training starts: transform coding, for the network to become better than.

g_a's four convolutions begin as a cascade of principal component transforms, each of 2 × 2 positions of what the one
before gives, g_s's as their transposes, and all GDN close to the identity. So before the first step the network codes
images about as well as a block transform of 16 × 16 pixels does, where random weights take thousands of steps to get
to (benchmarks/convergence.txt). The last transform's scale is that at which a unit step is the best at high rate,

    d/dΔ (A Δ²/12 − log₂ Δ) = 0   at   Δ² = 6 / (A ln 2),   A = λ · 255² / 3,

for components of pixels in [0, 1]. Channels that are no component have a fraction of their random weights, and
no component reads them yet. Hyper transforms and prior are left as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.layers import GDN, stored_nonnegative

CROP = 128  # pixels a side, of the images that the components are of
CROPS = 256
RANDOM_SHARE = 0.3  # of the weights that are left random
GAMMA = 1e-3  # GDN's own weight at the start, in place of 0.1
KERNEL = 5
TAPS = slice(KERNEL // 2, KERNEL // 2 + 2)  # of a kernel, those of the 2 × 2 positions


@torch.no_grad()
def start_as_transform(network: MeanScaleHyperprior, images_BCHW: Tensor, lmbda: float) -> None:
    """Set g_a and g_s, as described above, of a network whose weights are random.

    Args:
        images_BCHW: float32 (B, 3, 16h, 16w) in [0, 1], whose components these are.
    """
    encoder = [layer for layer in network.g_a if isinstance(layer, nn.Conv2d)]
    decoder = [layer for layer in network.g_s if isinstance(layer, nn.ConvTranspose2d)]
    components = cascade(images_BCHW, [layer.out_channels for layer in encoder])
    scales = [1.0] * (len(components) - 1) + [_scale(lmbda)]
    for basis, scale, there, back in zip(components, scales, encoder, reversed(decoder), strict=True):
        _place(
            there.weight, basis * scale
        )  # (outputs, inputs, K, K), of a transposed one (inputs, outputs, K, K)
        _place(back.weight.transpose(0, 1), basis.transpose(0, 1) / scale)
        for layer in (there, back):
            assert layer.bias is not None
            layer.bias.zero_()
    for layer in (*network.g_a, *network.g_s):
        if isinstance(layer, GDN):
            layer.gamma.copy_(stored_nonnegative(GAMMA * torch.eye(len(layer.gamma))))


@torch.no_grad()
def scale_latents(network: MeanScaleHyperprior, factor: float) -> None:
    """Make y, and all that is predicted of it, larger by a factor, and leave the rest as it was.

    The network codes as before at a step of 1/factor. Its scale bound apart, it gives the same pictures.
    """
    for parameter in (*network.g_a[-1].parameters(), *network.h_s[-1].parameters()):  # whose outputs are y's
        parameter.mul_(factor)
    for layer in (network.g_s[0], network.h_a[0]):  # whose inputs are
        next(layer.parameters()).div_(factor)  # the weight


def cascade(x_BCHW: Tensor, channels: list[int]) -> list[Tensor]:
    """For each level its principal components (k, C, 2, 2), orthonormal, by falling energy; k at most its channels."""
    found = []
    for count in channels:
        batch, inputs, height, width = x_BCHW.shape
        cells = x_BCHW.reshape(batch, inputs, height // 2, 2, width // 2, 2)
        vectors = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, inputs * 4)
        second_moments = (vectors.T @ vectors).double()
        basis = torch.linalg.eigh(second_moments).eigenvectors.flip(1)[:, :count].T.float()
        x_BCHW = (vectors @ basis.T).reshape(batch, height // 2, width // 2, -1).permute(0, 3, 1, 2)
        found.append(basis.reshape(-1, inputs, 2, 2))
    return found


def _place(weight_OIKK: Tensor, basis_oi22: Tensor) -> None:
    """Make the first o outputs components, of the first i inputs alone; the others read all inputs, at random."""
    outputs, inputs = basis_oi22.shape[:2]
    weight_OIKK.mul_(RANDOM_SHARE)
    weight_OIKK[:outputs] = 0
    weight_OIKK[:outputs, :inputs, TAPS, TAPS] = basis_oi22


def _scale(lmbda: float) -> float:
    """1/Δ of the components at which a step of 1 in the latents is the best."""
    return math.sqrt(lmbda * 255**2 / 3 * math.log(2) / 6)
