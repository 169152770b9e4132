"""g_a, h_a and g_s as quantization and evaluation run them: channels last, the largest feature maps in bands of rows.

    in bands:  x ──conv──GDN──conv──►            ──deconv──GDN──deconv──► x̂
    whole:                           GDN … ► y ► …

The maps of half the image's size are most of the memory, and to get that much fresh from the system and to read it
back takes longer than the GDN's arithmetic. So they exist a band at a time, and a GDN works in place in strips that
stay in the cache. Bands and strips depend on shapes alone. Even so nothing is promised of other numbers of threads:
contiguous maps nearly always differ in their last bits; these did not in g_a and h_a wherever we looked
(tests/test_inference.py), and in g_s for some shapes and processors (benchmarks/kodak_files.txt).

Suffixes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.codec.layers import BETA_MIN, GDN, nonnegative

BANDED = 3  # layers at the side of the image: two convolutions and the GDN between
BAND_ROWS = 32  # of the map of a quarter of the image's height
PIXEL = 3  # channels
STRIP_VALUES = 1 << 18  # 1 MiB of float32


def analyse(layers: nn.Sequential, image_BCHW: Tensor) -> Tensor:
    """y = g_a(x): (B, 3, H, W) -> (B, M, H/16, W/16), contiguous."""
    x = image_BCHW.contiguous(memory_format=torch.channels_last)
    x = _in_bands([*layers][:BANDED], x, x.shape[2] // 4, BAND_ROWS)
    return _whole([*layers][BANDED:], x).contiguous()


def hyper_analyse(layers: nn.Sequential, latent_BCHW: Tensor) -> Tensor:
    """z = h_a(y): (B, M, h, w) -> (B, N, h/4, w/4), contiguous. One by one: in a batch, small sums differ."""
    latents = latent_BCHW.contiguous(memory_format=torch.channels_last).split(1)
    return torch.cat([_whole([*layers], latent) for latent in latents]).contiguous()


def synthesise(layers: nn.Sequential, latent_BCHW: Tensor) -> Tensor:
    """x̂ = g_s(ŷ): (B, M, h, w) -> (B, 3, 16h, 16w), contiguous."""
    x = _whole([*layers][:-BANDED], latent_BCHW.contiguous(memory_format=torch.channels_last))
    return _in_bands([*layers][-BANDED:], x, 4 * x.shape[2], 4 * BAND_ROWS).contiguous()


def _whole(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = _apply(layer, x)
    return x


def _in_bands(layers: Sequence[nn.Module], x: Tensor, height: int, rows: int) -> Tensor:
    """The layers' output of `height` rows, `rows` at a time."""
    bands = [_rows(layers, x, top, min(top + rows, height)) for top in range(0, height, rows)]
    return torch.cat(bands, 2)


def _rows(layers: Sequence[nn.Module], x: Tensor, top: int, bottom: int) -> Tensor:
    """Rows `top` … `bottom` of the layers' output, from as many rows of their inputs as these depend on.

    A layer pads where its rows end, also inside of the image: the rows of its output that see it are cut off.
    """
    if not layers:
        return x[:, :, top:bottom]
    *before, layer = layers
    if isinstance(layer, GDN):
        return _apply(layer, _rows(before, x, top, bottom))
    if isinstance(layer, nn.ConvTranspose2d):
        first, last = max(top // 2 - 1, 0), (bottom + 1) // 2 + 1
        skip = top - 2 * first
    else:
        first, last = max(2 * top - 2, 0), 2 * bottom + 1
        skip = top - first // 2
    output = _apply(layer, _rows(before, x, first, last))
    return output[:, :, skip : skip + bottom - top]


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, GDN):
        return _normalise(layer, x)
    if isinstance(layer, nn.ConvTranspose2d) and layer.out_channels == PIXEL:
        return _to_pixels(layer, x)
    output: Tensor = layer(x)
    return output


def _normalise(gdn: GDN, x: Tensor) -> Tensor:
    """GDN in place, as matrices of some positions by all channels."""
    gamma, beta = nonnegative(gdn.gamma).t(), nonnegative(gdn.beta, BETA_MIN)
    for image_CHW in x:
        positions = image_CHW.permute(1, 2, 0).view(-1, len(beta))
        for strip in positions.split(max(1, STRIP_VALUES // len(beta))):
            norm = torch.addmm(beta, strip * strip, gamma)
            strip.mul_(norm.sqrt_() if gdn.inverse else norm.rsqrt_())
    return x


def _to_pixels(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """g_s's last layer, each 2×2 pixels as 12 channels of a plain 3×3 convolution.

    As a transposed convolution to 3 channels it is twice as slow, and its sums depend on the number of threads.
    """
    assert layer.bias is not None
    inputs = layer.in_channels
    # Row 2y + p of the output takes row y + 1 − i of the input times row 2i + p of the kernel.
    kernel = functional.pad(layer.weight, (0, 1, 0, 1)).view(inputs, PIXEL, 3, 2, 3, 2).flip(2, 4)
    kernel = kernel.permute(1, 3, 5, 0, 2, 4).reshape(4 * PIXEL, inputs, 3, 3)
    kernel = functional.pad(kernel, (0, 0) * 3 + (0, 4))  # 16 outputs are faster than 12
    bias = functional.pad(layer.bias.repeat_interleave(4), (0, 4))
    return functional.pixel_shuffle(functional.conv2d(x, kernel, bias, padding=1)[:, : 4 * PIXEL], 2)
