"""The parts of a codec that finetuning may change, as a module of its own: g_s and the scale rows of h_s.

Nothing else is in it, so nothing else can change. Suffixes: B batch, M latent channels, h and w latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.layers import GDN, conv, lower_bound
from pipeline.sigma import SIGMA_MIN

# Layers at the end of g_s that stay in float32 when the rest runs in bfloat16, as the GDN norms do: all of it
# in bfloat16 costs 0.01–0.03 dB at 26–30 dB and more above.
FLOAT32_LAYERS = 2


class DecoderSide(nn.Module):
    """A trainable copy of g_s and of the first M rows of h_s's last layer; fulfils `DecoderContract`.

    Its state dict is all that a finetuning's checkpoint needs of the codec.

    Args:
        network: what to copy from; it is not changed.
    """

    def __init__(self, network: MeanScaleHyperprior) -> None:
        super().__init__()
        last = network.h_s[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        self.g_s = copy.deepcopy(network.g_s).requires_grad_(True)
        self.scale_rows = conv(last.in_channels, network.M, kernel=3, stride=1).to(last.weight.device)
        rows = {"weight": last.weight[: network.M], "bias": last.bias[: network.M]}
        self.scale_rows.load_state_dict({name: row.detach() for name, row in rows.items()})
        for layer in self.g_s:
            if isinstance(layer, GDN):
                layer.norm_float32 = True

    def synthesise(self, y_hat_BMHW: Tensor, *, mixed: bool = False) -> Tensor:
        """g_s: (B, M, h, w) -> float32 (B, 3, 16h, 16w), unclipped, differentiable.

        Args:
            y_hat_BMHW: latents.
            mixed: bfloat16 for all but the last two layers and the GDN norms.
        """
        device = y_hat_BMHW.device.type
        split = len(self.g_s) - FLOAT32_LAYERS
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            features = self.g_s[:split](y_hat_BMHW)
        with torch.autocast(device, enabled=False):
            image: Tensor = self.g_s[split:](features.float())
        return image

    def scales(self, features_BCHW: Tensor) -> Tensor:
        """σ ≥ 0.11, float32: (B, 3M/2, h, w) -> (B, M, h, w); the bound passes gradients that raise σ."""
        with torch.autocast(features_BCHW.device.type, enabled=False):
            return lower_bound(self.scale_rows(features_BCHW.float()), SIGMA_MIN)

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of g_s."""
        return self.g_s.parameters()

    def scale_parameters(self) -> Iterator[nn.Parameter]:
        """Weight and bias of the scale rows."""
        return self.scale_rows.parameters()
