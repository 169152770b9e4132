"""State dicts of CompressAI's `MeanScaleHyperprior` to our network and back. CompressAI itself is not needed.

The networks' leaves have the same names and shapes in both. CompressAI's dict also holds constants and coding tables
that derive from them: import ignores these, export computes them as its `update(force=True)` does (version 1.2.8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.codec.entropy_models import LIKELIHOOD_MIN, TAIL_MASS, FactorizedPrior
from pipeline.codec.hyperprior import MeanScaleHyperprior
from pipeline.codec.layers import BETA_MIN, GDN, PEDESTAL
from pipeline.sigma import SIGMA_LEVELS, SIGMA_MAX, SIGMA_MIN

PRECISION_BITS = 16
DERIVED = re.compile(r"\.(pedestal|bound|target|_offset|_quantized_cdf|_cdf_length|scale_table|scale_bound)$")
# Checkpoints published before CompressAI 1.2.3 call entropy_bottleneck.matrices.0 entropy_bottleneck._matrix0.
OLD_NAMES = re.compile(r"\._(matrix|bias|factor)(\d)$")
NEW_NAMES = {"matrix": "matrices", "bias": "biases", "factor": "factors"}


def import_state_dict(state: Mapping[str, Tensor]) -> MeanScaleHyperprior:
    """Our network with the parameters of a CompressAI `MeanScaleHyperprior`; N and M follow from the shapes.

    Args:
        state: the state dict, already read (`torch.load(path, weights_only=True)`).

    Raises:
        ValueError: a leaf is missing, unknown, misshapen or not finite; says what was expected and found.
    """
    leaves = {_current_name(name): leaf for name, leaf in state.items() if not DERIVED.search(name)}
    for name in ("g_a.0.weight", "g_a.6.weight"):
        if name not in leaves:
            found = ", ".join(list(state)[:3]) or "nothing"
            raise ValueError(
                f"{name}: missing; expected a state dict of CompressAI's MeanScaleHyperprior, found {found} …"
            )
    N, M = leaves["g_a.0.weight"].shape[0], leaves["g_a.6.weight"].shape[0]
    with torch.device("meta"):
        network = MeanScaleHyperprior(N, M)
    expected = network.state_dict()
    for name, leaf in expected.items():
        if name not in leaves:
            raise ValueError(f"{name}: missing; expected {tuple(leaf.shape)} for N = {N}, M = {M}")
        shape = tuple(leaves[name].shape)
        if shape != tuple(leaf.shape):
            raise ValueError(f"{name}: expected {tuple(leaf.shape)} for N = {N}, M = {M}, found {shape}")
        if not torch.isfinite(leaves[name]).all():
            raise ValueError(f"{name}: expected finite parameters, found NaN or infinity")
    if unknown := sorted(leaves.keys() - expected.keys()):
        raise ValueError(f"{unknown[0]}: unknown; is this another architecture than MeanScaleHyperprior?")
    copies = {name: leaves[name].detach().float().clone() for name in expected}
    network.load_state_dict(copies, assign=True)
    return network


def export_state_dict(network: MeanScaleHyperprior) -> dict[str, Tensor]:
    """The state dict that CompressAI's `MeanScaleHyperprior(N, M).load_state_dict(state, strict=True)` accepts.

    Tables and constants included, so that its `compress` works at once; all tensors are on the CPU.
    """
    state = {name: leaf.detach().cpu().clone() for name, leaf in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, GDN):
            for leaf, minimum in (("beta", BETA_MIN), ("gamma", 0.0)):
                prefix = f"{name}.{leaf}_reparam"
                state[f"{prefix}.pedestal"] = torch.tensor([PEDESTAL])
                state[f"{prefix}.lower_bound.bound"] = torch.tensor([(minimum + PEDESTAL) ** 0.5])
    prior = _named("entropy_bottleneck", _prior_tables(network.entropy_bottleneck))
    return state | prior | _named("gaussian_conditional", _gaussian_tables())


def _current_name(name: str) -> str:
    return OLD_NAMES.sub(lambda match: f".{NEW_NAMES[match[1]]}.{match[2]}", name)


def _named(module: str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": leaf for name, leaf in leaves.items()}


@torch.no_grad()
def _prior_tables(prior: FactorizedPrior) -> dict[str, Tensor]:
    """Coding tables of z between each channel's outer quantiles."""
    quantiles = prior.quantiles.detach().cpu()
    medians = quantiles[:, 0, 1]
    minima = torch.ceil(medians - quantiles[:, 0, 0]).int().clamp(min=0)
    maxima = torch.ceil(quantiles[:, 0, 2] - medians).int().clamp(min=0)
    lengths = minima + maxima + 1
    on_cpu = FactorizedPrior(len(medians))
    on_cpu.load_state_dict(prior.state_dict())
    grid = torch.arange(int(lengths.max()))[None, None] + (medians - minima)[:, None, None]
    lower, upper = (torch.sigmoid(on_cpu.cumulative_logits(grid + offset))[:, 0] for offset in (-0.5, 0.5))
    above = torch.sigmoid(-on_cpu.cumulative_logits(grid[..., -1:] + 0.5))[:, 0]
    tail = math.log(2 / TAIL_MASS - 1)
    return {
        "_offset": -minima,
        "_quantized_cdf": _cumulative(upper - lower, lower[:, :1] + above, lengths),
        "_cdf_length": lengths + 2,
        "target": torch.tensor([-tail, 0.0, tail]),
        "likelihood_lower_bound.bound": torch.tensor([LIKELIHOOD_MIN]),
    }


def _gaussian_tables() -> dict[str, Tensor]:
    """Coding tables of y, a row a scale, up to a tail mass of 1e-9."""
    scales = torch.exp(torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), SIGMA_LEVELS))
    centres = torch.ceil(scales * -NormalDist().inv_cdf(TAIL_MASS / 2)).int()
    lengths = 2 * centres + 1
    distance = torch.abs(torch.arange(int(lengths.max()))[None] - centres[:, None]).float()
    upper, lower = (
        0.5 * torch.erfc(-(2**-0.5) * ((end - distance) / scales[:, None])) for end in (0.5, -0.5)
    )
    return {
        "_offset": -centres,
        "_quantized_cdf": _cumulative(upper - lower, 2 * lower[:, :1], lengths),
        "_cdf_length": lengths + 2,
        "scale_table": scales,
        "scale_bound": torch.tensor([SIGMA_MIN]),
        "likelihood_lower_bound.bound": torch.tensor([LIKELIHOOD_MIN]),
        "lower_bound_scale.bound": torch.tensor([SIGMA_MIN]),
    }


def _cumulative(mass: Tensor, tail: Tensor, lengths: Tensor) -> Tensor:
    """Cumulative frequencies, int32 (rows, longest + 2), zero beyond a row's length + 2; tails come last."""
    table = np.zeros((len(lengths), int(lengths.max()) + 2), np.int32)
    for row, length in enumerate(lengths.tolist()):
        probabilities = torch.cat([mass[row, :length], tail[row]]).numpy()
        table[row, 1 : length + 2] = np.cumsum(_frequencies(probabilities))
    return torch.from_numpy(table)


def _frequencies(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """CompressAI's rounding: to 2**16 in all, the last entry takes the rest, each zero takes 1 from the rarest > 1."""
    total = 1 << PRECISION_BITS
    rounded = np.floor(probabilities.astype(np.float64) * total + 0.5).astype(np.int64)
    frequencies: npt.NDArray[np.int64] = rounded * total // rounded.sum()
    frequencies[-1] += total - frequencies.sum()
    for symbol in range(len(frequencies)):
        if frequencies[symbol] == 0:
            rarest = np.where(frequencies > 1, frequencies, total + 1).argmin()
            frequencies[rarest] -= 1
            frequencies[symbol] = 1
    return frequencies
