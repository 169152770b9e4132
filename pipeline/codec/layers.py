"""Layers of the mean-scale hyperprior, with CompressAI's parameters and gradients.

Suffixes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

REPARAMETRIZATION_OFFSET = 2.0**-18
PEDESTAL = REPARAMETRIZATION_OFFSET**2
BETA_MIN = 1e-6
GAMMA_INIT = 0.1


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ((x >= ctx.bound) | (grad < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound), of the same shape, whose gradient still passes below the bound where it raises x.

    A plain maximum has no gradient there, and what once fell below would never return. Source: Ballé et al.,
    "Variational image compression with a scale hyperprior" (ICLR 2018); TensorFlow Compression's `lower_bound`.
    """
    bounded: Tensor = _LowerBound.apply(x, bound)
    return bounded


def nonnegative(parameter: Tensor, minimum: float = 0.0) -> Tensor:
    """The value ≥ `minimum` that a stored GDN parameter stands for: max(p, √(minimum + 2⁻³⁶))² − 2⁻³⁶.

    Source: Ballé, "Efficient nonlinear transforms for lossy image compression" (PCS 2018), section II.
    """
    bounded = lower_bound(parameter, (minimum + PEDESTAL) ** 0.5)
    return bounded * bounded - PEDESTAL


def stored_nonnegative(value: Tensor) -> Tensor:
    """The parameter that stands for `value` ≥ 0; inverse of `nonnegative`."""
    return torch.sqrt(torch.clamp(value + PEDESTAL, min=PEDESTAL))


class GDN(nn.Module):
    """Generalized divisive normalization: y_i = x_i / √(β_i + Σ_j γ_ij x_j²); the inverse multiplies instead.

    Source: Ballé, Laparra, Simoncelli, "Density modeling of images using a generalized normalization
    transformation" (ICLR 2016), equation 1 with CompressAI's exponents.

    Args:
        channels: C.
        inverse: multiply by the norm (IGDN, in g_s) instead of dividing by it.

    Attributes:
        norm_float32: compute the norm in float32 even under autocast. Training leaves it off for speed; finetuning
            turns it on. Outside autocast it changes nothing.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.norm_float32 = False
        self.beta = nn.Parameter(stored_nonnegative(torch.ones(channels)))
        self.gamma = nn.Parameter(stored_nonnegative(GAMMA_INIT * torch.eye(channels)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the memory format given."""
        if self.norm_float32 and torch.is_autocast_enabled(x_BCHW.device.type):
            with torch.autocast(x_BCHW.device.type, enabled=False):
                return self._normalise(x_BCHW.float())
        return self._normalise(x_BCHW)

    def _normalise(self, x: Tensor) -> Tensor:
        gamma = nonnegative(self.gamma)[:, :, None, None]  # a 1×1 convolution: cheap in channels_last
        norm = functional.conv2d(x * x, gamma, nonnegative(self.beta, BETA_MIN))
        return x * (torch.sqrt(norm) if self.inverse else torch.rsqrt(norm))


def conv(inputs: int, outputs: int, kernel: int = 5, stride: int = 2) -> nn.Conv2d:
    """Convolution whose output has 1/stride of the input's size: (B, inputs, H, W) -> (B, outputs, H/s, W/s)."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2)


class _TransposedConvolution(torch.autograd.Function):
    """Whose weight gradient is taken as that of the convolution it transposes, with input and gradient exchanged.

    It is the same sum, but oneDNN computes it several times as fast in that form (benchmarks/training_step.txt).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.conv_transpose2d(x, weight, bias, stride=2, padding=2, output_padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = functional.conv2d(grad, weight, stride=2, padding=2) if ctx.needs_input_grad[0] else None
        geometry = ([2, 2], [2, 2], [1, 1], False, [0, 0], 1)
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            x, grad, weight, None, *geometry, [False, True, False]
        )
        return grad_x, grad_weight, grad.sum((0, 2, 3))


class Deconv(nn.ConvTranspose2d):
    """5×5 transposed convolution of stride 2: (B, inputs, H, W) -> (B, outputs, 2H, 2W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 5, stride=2, padding=2, output_padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the class says; `output_size` is not used."""
        device = x.device.type
        if device != "cpu" or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        assert self.bias is not None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _TransposedConvolution.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return out
