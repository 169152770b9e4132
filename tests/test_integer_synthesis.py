"""Hyper synthesis in integers: layers by definition, near to the float network. Any machine: test_portability.py."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.integer_synthesis import (
    ACTIVATION_LIMIT,
    EXACT_LIMIT,
    IntegerLayer,
    IntegerSynthesis,
)
from pipeline.sigma import sigma_levels, sigma_midpoints

N, M = 6, 8


def network(gain: float = 3.0) -> MeanScaleHyperprior:
    """A small network with parameters from NumPy's generator, which is the same everywhere."""
    made = MeanScaleHyperprior(N, M).eval().requires_grad_(False)
    random = np.random.default_rng(5)
    for parameter in made.h_s.parameters():
        bound = gain * parameter[0].numel() ** -0.5 if parameter.ndim == 4 else 0.5
        steps = np.round(random.uniform(-bound, bound, parameter.shape) * 4096) / 4096
        parameter.copy_(torch.from_numpy(steps))
    made.entropy_bottleneck.quantiles[:, 0, 1] = torch.linspace(-0.4, 0.4, N)
    made.h_s[-1].bias[:M] += 2
    return made


def synthesis() -> IntegerSynthesis:
    made = network()
    return IntegerSynthesis.from_float(made.h_s, made.entropy_bottleneck.medians)


def hyper_indices(batch: int = 2, limit: int = 12) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(3).integers(-limit, limit + 1, (batch, N, 3, 4)).astype(np.int16)
    )


def layer(inputs: int, outputs: int, side: int, *, upsamples: bool) -> IntegerLayer:
    random = torch.Generator().manual_seed(2)
    weight = torch.randint(-(1 << 18), 1 << 18, (outputs, inputs, side, side), generator=random)
    bias = torch.randint(-(1 << 40), 1 << 40, (outputs,), generator=random)
    return IntegerLayer(weight.int(), bias, torch.full((outputs,), 7, dtype=torch.int32), upsamples)


@pytest.mark.parametrize(("side", "upsamples"), [(3, False), (5, True)])
def test_layer_equals_python_integers(side: int, upsamples: bool) -> None:
    inputs, outputs, height, width = 2, 3, 3, 2
    made = layer(inputs, outputs, side, upsamples=upsamples)
    a = torch.randint(-ACTIVATION_LIMIT, ACTIVATION_LIMIT, (1, height, width, inputs))
    up = 2 if upsamples else 1
    sums = np.empty((up * height, up * width, outputs), object)
    for y, x, o in np.ndindex(sums.shape):
        sums[y, x, o] = int(made.bias[o])
    for y, x, i, j in itertools.product(range(height), range(width), range(side), range(side)):
        shift_y, shift_x = i - side // 2, j - side // 2
        out_y, out_x = (2 * y + shift_y, 2 * x + shift_x) if upsamples else (y - shift_y, x - shift_x)
        if 0 <= out_y < up * height and 0 <= out_x < up * width:
            for o, c in itertools.product(range(outputs), range(inputs)):
                sums[out_y, out_x, o] += int(a[0, y, x, c]) * int(made.weight[o, c, i, j])
    expected = np.vectorize(lambda total: (total + 64) >> 7)(sums).astype(np.int64)
    assert np.array_equal(made(a.double())[0].numpy().astype(np.int64), expected)


def test_layers_are_torchs_convolutions() -> None:
    a = torch.randint(-500, 500, (2, 4, 5, 3)).double()
    nchw = a.permute(0, 3, 1, 2)
    plain, transposed = layer(3, 4, 3, upsamples=False), layer(3, 4, 5, upsamples=True)
    sums = functional.conv2d(nchw, plain.weight.double(), plain.bias.double(), padding=1)
    assert torch.equal(plain(a), torch.floor(sums / 128 + 0.5).permute(0, 2, 3, 1))
    weight = transposed.weight.double().transpose(0, 1)
    sums = functional.conv_transpose2d(nchw, weight, transposed.bias.double(), 2, 2, output_padding=1)
    assert torch.equal(transposed(a), torch.floor(sums / 128 + 0.5).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("side", "upsamples"), [(3, False), (5, True)])
def test_order_of_summation_does_not_matter(side: int, upsamples: bool) -> None:
    inputs = 40
    made = layer(inputs, 5, side, upsamples=upsamples)
    a = torch.randint(-ACTIVATION_LIMIT, ACTIVATION_LIMIT, (1, 6, 7, inputs)).double()
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made(a), replace(made, weight=made.weight[:, order])(a[..., order]))


def test_near_to_the_float_network() -> None:
    made, n = network(), hyper_indices()
    found = synthesis()(n)
    z_hat = n + made.entropy_bottleneck.medians[:, None, None]
    scales, means = made.h_s(z_hat).chunk(2, 1)
    assert (found.means - means).abs().max() < 5e-3
    expected = torch.from_numpy(
        np.abs(np.log(scales.clamp(min=0.01).numpy()[..., None] / sigma_levels())).argmin(-1)
    )
    difference = (found.sigma_index.long() - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    features = synthesis().features(n)
    assert (features - made.h_s[:-1](z_hat)).abs().max() < 2e-2
    assert torch.isfinite(features).all()


def test_golden() -> None:
    """Arithmetic of the file format: may change only with its version."""
    means, sigma_index = synthesis()(hyper_indices())
    digest = hashlib.sha256(means.numpy().tobytes() + sigma_index.numpy().tobytes()).hexdigest()
    assert digest == "0d8be26a629e6ef13f238a1dbfce6d55ba4b011550e1bcb6916a33eb658b9d35"


def test_sigma_index_counts_thresholds_below() -> None:
    made = synthesis()
    assert np.array_equal(made.thresholds.numpy(), np.floor(sigma_midpoints() * 65536))
    rows = made.scales
    silent = replace(rows, weight=torch.zeros_like(rows.weight), shift=torch.zeros_like(rows.shift))
    for value, index in (
        (-5, 0),
        (int(made.thresholds[0]), 0),
        (int(made.thresholds[0]) + 1, 1),
        (1 << 40, 63),
    ):
        flat = replace(made, scales=replace(silent, bias=torch.full_like(rows.bias, value)))
        assert (flat(hyper_indices()).sigma_index == index).all()


def test_changed_scale_rows_leave_means_alone() -> None:
    made, before = network(), synthesis()
    made.h_s[-1].weight[:M] *= 37  # so far that the rows' binary points move
    rebuilt = IntegerSynthesis.from_float(made.h_s, made.entropy_bottleneck.medians)
    for after in (rebuilt, before.with_scale_rows(made.h_s)):
        changed = {
            name for name, leaf in after.tensors().items() if not torch.equal(leaf, before.tensors()[name])
        }
        assert changed == {"integer.scales.weight", "integer.scales.bias", "integer.scales.shift"} - (
            {"integer.scales.bias"} if torch.equal(after.scales.bias, before.scales.bias) else set()
        )
        assert torch.equal(after(hyper_indices()).means, before(hyper_indices()).means)
        assert not torch.equal(after(hyper_indices()).sigma_index, before(hyper_indices()).sigma_index)


def test_rows_use_the_room_there_is() -> None:
    for made in (*synthesis().trunk, synthesis().means, synthesis().scales):
        used = made.weight.long().abs().sum((1, 2, 3)) * ACTIVATION_LIMIT + made.bias.abs()
        assert (used < EXACT_LIMIT).all()
        assert (used > EXACT_LIMIT // 5).all()  # one bit more would not fit


def test_what_is_not_exact_is_refused() -> None:
    made = synthesis()
    weight = made.means.weight.clone()
    weight[3] = 1 << 30
    with pytest.raises(
        ValueError, match=r"integer.means: row 3 is not exact: expected 67108863 · Σ\|w\| \+ \|bias\|"
    ):
        IntegerSynthesis.from_tensors(made.tensors() | {"integer.means.weight": weight})
    bias = made.trunk[0].bias.clone()
    bias[1] = torch.iinfo(torch.int64).min
    with pytest.raises(ValueError, match=r"integer.trunk0: row 1 is not exact"):
        IntegerSynthesis.from_tensors(made.tensors() | {"integer.trunk0.bias": bias})
    with pytest.raises(ValueError, match=r"integer.scales: expected shifts of 0 to 51 bits"):
        IntegerSynthesis.from_tensors(made.tensors() | {"integer.scales.shift": made.scales.shift - 99})
    with pytest.raises(ValueError, match="expected ascending σ thresholds"):
        IntegerSynthesis.from_tensors(made.tensors() | {"integer.thresholds": made.thresholds.flip(0)})
    with pytest.raises(ValueError, match=r"integer.medians: expected magnitudes"):
        IntegerSynthesis.from_tensors(made.tensors() | {"integer.medians": made.medians + (1 << 30)})
    loud = network(gain=1e9)
    with pytest.raises(
        ValueError, match=r"h_s.0: the weights of output row \d+ sum to .* too large for exact integers"
    ):
        IntegerSynthesis.from_float(loud.h_s, loud.entropy_bottleneck.medians)
    with pytest.raises(ValueError, match=r"expected medians within ±4095, found 9000"):
        IntegerSynthesis.from_float(network().h_s, torch.full((N,), 9000.0))
