"""Multiplications of a network, counted as it runs."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.codec.layers import GDN


@torch.no_grad()
def multiplications(module: nn.Module, *inputs: object) -> int:
    """Of a forward pass, for each image of the batch: convolutions, those of GDN's 1 × 1 included."""
    total = 0

    def count(layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.ConvTranspose2d):
            total += given[0][0].numel() * layer.weight[0].numel()
        elif isinstance(layer, GDN):
            total += output[0].numel() * layer.gamma.shape[1]

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return total
