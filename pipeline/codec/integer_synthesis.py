"""Hyper synthesis h_s in exact integers: what selects a table, and what is added to a residual, is equal everywhere.

    n ──· 2^14 + median──► a ──[ taps, rescale, clamp, activation ]×2──► a ──means──► μ · 2^12
                                                                           └─scales─► σ · 2^16 ──thresholds──► σ index

Every number is an integer held in float64. With |a| ≤ 2^26 and |a| · Σ|w| + |bias| < 2^52 for every output row
(checked whenever weights are loaded) each product and each partial sum is exact, so neither the order of summation, nor
threads, nor the machine can change a result. Convolutions are one matrix product a kernel tap: no FFT, no Winograd.
A transposed one of stride 2 is four plain ones, for the even and odd rows and columns of its output.

Suffixes: B batch, H and W height and width, I input and O output channels, K kernel side, N channels of z, M of y.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.codec.contract import EntropyParameters
from pipeline.sigma import SIGMA_LEVELS, sigma_midpoints

FRACTION_BITS = 14  # of every layer's input
INTEGER_BITS = 12  # ... and its range, ±4096
ACTIVATION_LIMIT = (1 << (FRACTION_BITS + INTEGER_BITS)) - 1
MEANS_FRACTION_BITS = 12  # with ±4096 a mean has 24 bits: a float32 holds it exactly
MEANS_LIMIT = (1 << (MEANS_FRACTION_BITS + INTEGER_BITS)) - 1
SCALES_FRACTION_BITS = 16
HYPER_LIMIT = (1 << INTEGER_BITS) - 1  # largest |n|
EXACT_LIMIT = 1 << 52
WEIGHT_BITS_MAX = 24
WEIGHT_BITS_MIN = 8  # fewer fraction bits than this would cost too much
SLOPE_NUMERATOR, SLOPE_BITS = 655, 16  # leaky ReLU's 0.01 as 655 / 65536


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A convolution with integer weights; a row is an output channel and has a binary point of its own.

    Attributes:
        weight: int32 (O, I, K, K); a transposed convolution's too.
        bias: int64 (O,), in units of input times weight.
        shift: int32 (O,), bits to drop from the sums.
        upsamples: transposed, stride 2; otherwise stride 1. K is odd, the padding K // 2.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    upsamples: bool = False

    @classmethod
    def from_float(
        cls, weight_OIKK: Tensor, bias_O: Tensor, out_bits: int, *, upsamples: bool = False
    ) -> Self:
        """Round a float layer to integers, each row with as many weight bits (24 … 8) as stay exact.

        Rows do not influence each other: changed scale rows leave the mean rows as they are.

        Raises:
            ValueError: a row's weights are too large for 8 fraction bits.
        """
        weight, bias = weight_OIKK.detach().double().cpu(), bias_O.detach().double().cpu()
        best = torch.full((weight.shape[0],), -1, dtype=torch.int64)
        for bits in range(WEIGHT_BITS_MIN, WEIGHT_BITS_MAX + 1):
            scaled = torch.round(weight * 2.0**bits), torch.round(bias * 2.0 ** (FRACTION_BITS + bits))
            best[_fits(*scaled)] = bits
        if (best < 0).any():
            row = int((best < 0).nonzero()[0, 0])
            raise ValueError(
                f"the weights of output row {row} sum to {weight[row].abs().sum():.4g} in magnitude (bias "
                f"{bias[row]:.4g}), too large for exact integers: expected less than about "
                f"{EXACT_LIMIT / ACTIVATION_LIMIT / 2**WEIGHT_BITS_MIN:.4g}; was the network trained to convergence?"
            )
        one = torch.pow(2.0, best.double())
        return cls(
            weight=torch.round(weight * one[:, None, None, None]).to(torch.int32),
            bias=torch.round(bias * one * 2.0**FRACTION_BITS).to(torch.int64),
            shift=(best + FRACTION_BITS - out_bits).to(torch.int32),
            upsamples=upsamples,
        )

    def check(self, name: str) -> None:
        """Assert that every sum this layer can form is exact.

        Raises:
            ValueError: names the layer and the first row that is not, or whose shift is out of range.
        """
        bad = ~_fits(self.weight.double(), self.bias.double())
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            total = int(self.weight[row].long().abs().sum())
            raise ValueError(
                f"{name}: row {row} is not exact: expected {ACTIVATION_LIMIT} · Σ|w| + |bias| < 2^52, found "
                f"Σ|w| = {total}, |bias| = {abs(int(self.bias[row]))}; the checkpoint is damaged"
            )
        if ((self.shift < 0) | (self.shift > 51)).any():
            raise ValueError(f"{name}: expected shifts of 0 to 51 bits, found {self.shift.tolist()}")

    def __call__(self, a_BHWI: Tensor) -> Tensor:
        """Sums, rescaled to floor(sum / 2^shift + ½): integers in float64, (B, H, W, I) -> (B, H', W', O)."""
        # A division by 2^shift is exact; pow and ldexp are left to libraries that may approximate.
        divisor = torch.bitwise_left_shift(torch.ones_like(self.bias), self.shift.long()).double()
        return self._sums(a_BHWI).div_(divisor).add_(0.5).floor_()

    def _sums(self, a: Tensor) -> Tensor:
        """The convolution, zero-padded, with its bias: (B, H, W, I) -> (B, H', W', O)."""
        batch, height, width, inputs = a.shape
        outputs, _, side, _ = self.weight.shape
        up = 2 if self.upsamples else 1
        reach, step = (side // 2 + up - 1) // up, -up if self.upsamples else 1
        padded = functional.pad(a, (0, 0, reach, reach, reach, reach))
        sums = self.bias.double().expand(up, up, batch * height * width, outputs).clone()
        for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
            top, left = reach + dy, reach + dx
            patch = padded[:, top : top + height, left : left + width].reshape(-1, inputs)
            # Row up·y + p of the output takes row y + dy of the input times row i of the kernel.
            for p, q in itertools.product(range(up), repeat=2):
                i, j = side // 2 + p + step * dy, side // 2 + q + step * dx
                if 0 <= i < side and 0 <= j < side:
                    sums[p, q].addmm_(patch, self._taps[i, j])
        split = sums.view(up, up, batch, height, width, outputs)
        return split.permute(2, 3, 0, 4, 1, 5).reshape(batch, up * height, up * width, outputs)

    @cached_property
    def _taps(self) -> Tensor:
        """The weight as matrices, float64 (K, K, I, O); kept, since to convert it takes as long as to use it."""
        return self.weight.permute(2, 3, 1, 0).double().contiguous()

    def to(self, device: torch.device | str) -> Self:
        """The same layer on `device`."""
        return replace(
            self, weight=self.weight.to(device), bias=self.bias.to(device), shift=self.shift.to(device)
        )


def _fits(weight: Tensor, bias: Tensor) -> Tensor:
    """Which rows satisfy ACTIVATION_LIMIT · Σ|w| + |bias| < 2^52; integer-valued float64 in, bool (O,) out."""
    total = (
        weight.abs().flatten(1).sum(1).clamp(max=2.0**36).to(torch.int64)
    )  # 2^36 neither fits nor overflows
    room = EXACT_LIMIT - 1 - bias.abs().clamp(max=float(EXACT_LIMIT)).to(torch.int64)
    return total * ACTIVATION_LIMIT <= room


def _activate(a: Tensor) -> Tensor:
    """Leaky ReLU in integers, after a clamp to ±(2^26 − 1): a ≥ 0 ? a : floor(a · 655 / 65536)."""
    a = a.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    return torch.where(a >= 0, a, torch.floor(a * SLOPE_NUMERATOR / (1 << SLOPE_BITS)))


@dataclass(frozen=True, eq=False)
class IntegerSynthesis:
    """Medians, trunk, mean rows, scale rows and σ thresholds: all that turns n into (means, σ index).

    Attributes:
        medians: int64 (N,), in units of 2^-14.
        trunk: the two transposed convolutions, each followed by clamp and activation.
        means, scales: the last layer's last and first M rows.
        thresholds: int64 (63,), ascending, in units of 2^-16: a σ's index is how many lie below it.
    """

    medians: Tensor
    trunk: tuple[IntegerLayer, IntegerLayer]
    means: IntegerLayer
    scales: IntegerLayer
    thresholds: Tensor

    @classmethod
    def from_float(cls, h_s: nn.Sequential, medians_N: Tensor) -> Self:
        """Round a trained h_s (deconv, leaky ReLU, deconv, leaky ReLU, conv) and the medians to integers.

        Raises:
            ValueError: a layer's weights or a median are too large for exact integers.
        """
        medians = torch.round(medians_N.detach().double().cpu() * 2.0**FRACTION_BITS)
        if not (medians.abs() <= ACTIVATION_LIMIT).all():
            raise ValueError(
                f"expected medians within ±{HYPER_LIMIT}, found {float(medians_N.abs().max()):.6g}"
            )
        thresholds = torch.from_numpy(sigma_midpoints() * 2.0**SCALES_FRACTION_BITS).floor().to(torch.int64)
        synthesis = cls(
            medians=medians.to(torch.int64),
            trunk=(_trunk_layer(h_s, 0), _trunk_layer(h_s, 2)),
            means=_last_rows(h_s, scales=False),
            scales=_last_rows(h_s, scales=True),
            thresholds=thresholds,
        )
        synthesis.check()
        return synthesis

    def with_scale_rows(self, h_s: nn.Sequential) -> Self:
        """These integers with the scale rows of another h_s; all else, and so μ, stays bit-identical."""
        return replace(self, scales=_last_rows(h_s, scales=True).to(self.medians.device))

    def __call__(self, hyper_indices_BNHW: Tensor) -> EntropyParameters:
        """Means and σ indices from hyper indices (any integer type, (B, N, h, w)), both (B, M, 4h, 4w).

        Indices beyond ±4095 are clamped, so no input can leave the exact range.
        """
        means, scales = self._last(self._trunk(hyper_indices_BNHW)).chunk(2, -1)
        means = means.clamp(-MEANS_LIMIT, MEANS_LIMIT) / (1 << MEANS_FRACTION_BITS)
        # searchsorted on the left counts the thresholds strictly below.
        sigma_index = torch.searchsorted(self.thresholds.double(), scales.contiguous(), out_int32=True)
        return EntropyParameters(
            means.permute(0, 3, 1, 2).to(torch.float32).contiguous(),
            sigma_index.permute(0, 3, 1, 2).to(torch.uint8).contiguous(),
        )

    def features(self, hyper_indices_BNHW: Tensor) -> Tensor:
        """Input of h_s's last layer, the integers as float32: (B, N, h, w) -> (B, 3M/2, 4h, 4w)."""
        a = self._trunk(hyper_indices_BNHW) / (1 << FRACTION_BITS)
        return a.permute(0, 3, 1, 2).to(torch.float32).contiguous()

    def _trunk(self, hyper_indices_BNHW: Tensor) -> Tensor:
        n = hyper_indices_BNHW.permute(0, 2, 3, 1).double().clamp(-HYPER_LIMIT, HYPER_LIMIT)
        a = (n * (1 << FRACTION_BITS) + self.medians.double()).clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        for layer in self.trunk:
            a = _activate(layer(a))
        return a

    @cached_property
    def _last(self) -> IntegerLayer:
        """Mean rows and scale rows as one layer: rows do not know of each other."""
        rows = self.means, self.scales
        return IntegerLayer(
            weight=torch.cat([layer.weight for layer in rows]),
            bias=torch.cat([layer.bias for layer in rows]),
            shift=torch.cat([layer.shift for layer in rows]),
        )

    def check(self) -> None:
        """Assert exactness of every layer and order of the thresholds.

        Raises:
            ValueError: names what is wrong.
        """
        for name, layer in self._layers().items():
            layer.check(name)
        if not (self.medians.double().abs() <= ACTIVATION_LIMIT).all():
            raise ValueError(f"integer.medians: expected magnitudes up to {ACTIVATION_LIMIT}")
        thresholds = self.thresholds.double()
        if not (thresholds.abs() < EXACT_LIMIT).all() or (thresholds.diff() <= 0).any():
            raise ValueError("integer.thresholds: expected ascending σ thresholds below 2^52")

    def to(self, device: torch.device | str) -> Self:
        """The same integers on `device`."""
        first, second = self.trunk
        return replace(
            self,
            medians=self.medians.to(device),
            trunk=(first.to(device), second.to(device)),
            means=self.means.to(device),
            scales=self.scales.to(device),
            thresholds=self.thresholds.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every integer by its name in a checkpoint."""
        named = {"integer.medians": self.medians, "integer.thresholds": self.thresholds}
        for name, layer in self._layers().items():
            named |= {
                f"{name}.weight": layer.weight,
                f"{name}.bias": layer.bias,
                f"{name}.shift": layer.shift,
            }
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Self:
        """Inverse of `tensors`, for tensors whose names, shapes and types were checked against `expected_leaves`.

        Raises:
            ValueError: values that would not be exact.
        """

        def layer(name: str, *, upsamples: bool = False) -> IntegerLayer:
            weight, bias, shift = (named[f"integer.{name}.{leaf}"] for leaf in ("weight", "bias", "shift"))
            return IntegerLayer(weight, bias, shift, upsamples)

        synthesis = cls(
            medians=named["integer.medians"],
            trunk=(layer("trunk0", upsamples=True), layer("trunk1", upsamples=True)),
            means=layer("means"),
            scales=layer("scales"),
            thresholds=named["integer.thresholds"],
        )
        synthesis.check()
        return synthesis

    def _layers(self) -> dict[str, IntegerLayer]:
        return {
            "integer.trunk0": self.trunk[0],
            "integer.trunk1": self.trunk[1],
            "integer.means": self.means,
            "integer.scales": self.scales,
        }


def expected_leaves(N: int, M: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of every tensor of an `IntegerSynthesis` for a network of N and M channels."""
    wide = M * 3 // 2
    leaves: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "integer.medians": (torch.int64, (N,)),
        "integer.thresholds": (torch.int64, (SIGMA_LEVELS - 1,)),
    }
    weights = {
        "trunk0": (M, N, 5, 5),
        "trunk1": (wide, M, 5, 5),
        "means": (M, wide, 3, 3),
        "scales": (M, wide, 3, 3),
    }
    for name, shape in weights.items():
        leaves[f"integer.{name}.weight"] = (torch.int32, shape)
        leaves[f"integer.{name}.bias"] = (torch.int64, shape[:1])
        leaves[f"integer.{name}.shift"] = (torch.int32, shape[:1])
    return leaves


def _trunk_layer(h_s: nn.Sequential, position: int) -> IntegerLayer:
    layer = h_s[position]
    assert isinstance(layer, nn.ConvTranspose2d)
    assert layer.bias is not None
    return _named(f"h_s.{position}", layer.weight.transpose(0, 1), layer.bias, FRACTION_BITS, upsamples=True)


def _last_rows(h_s: nn.Sequential, *, scales: bool) -> IntegerLayer:
    layer = h_s[-1]
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    half = layer.weight.shape[0] // 2
    rows = slice(None, half) if scales else slice(half, None)
    bits = SCALES_FRACTION_BITS if scales else MEANS_FRACTION_BITS
    return _named(f"h_s.{len(h_s) - 1}", layer.weight[rows], layer.bias[rows], bits, upsamples=False)


def _named(name: str, weight: Tensor, bias: Tensor, out_bits: int, *, upsamples: bool) -> IntegerLayer:
    try:
        return IntegerLayer.from_float(weight, bias, out_bits, upsamples=upsamples)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
