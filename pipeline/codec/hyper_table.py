"""Integer frequencies of the hyper indices: one distribution a channel, over −K … K and an escape.

Suffixes: B batch, N channels, u and v height and width of the hyper latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.codec.entropy_models import FactorizedPrior
from pipeline.frequencies import TOTAL, escape_bits, frequency_bits, integer_frequencies

# Largest K: beyond it indices escape. Below it K is where less than one of 2**16 lies outside.
LIMIT_MAX = 511


@dataclass(frozen=True, eq=False)
class HyperTable:
    """Frequencies of n, a row a channel, rows one after another.

    Attributes:
        limits: K of each channel, the largest |n| coded without escape; int32 (N,).
        frequencies: uint32, Σ (2K + 2) of them: n = −K … K, then the escape, channel after channel.
    """

    limits: npt.NDArray[np.int32]
    frequencies: npt.NDArray[np.uint32]

    @classmethod
    @torch.no_grad()
    def from_prior(cls, prior: FactorizedPrior) -> Self:
        """Integrate a trained prior over the cell of each n, in float64 on the CPU."""
        n = torch.arange(-LIMIT_MAX, LIMIT_MAX + 1, dtype=torch.float64)
        exact = FactorizedPrior(prior.quantiles.shape[0]).double()
        exact.load_state_dict(prior.state_dict())
        mass = exact.interval_probability(n + exact.medians[:, None, None])[:, 0].numpy()
        limits = np.array([_limit(row) for row in mass], np.int32)
        rows = []
        for row, limit in zip(mass, limits, strict=True):
            inside = row[LIMIT_MAX - limit : LIMIT_MAX + limit + 1]
            escape = max(1.0 - inside.sum(), 0.0)
            rows.append(integer_frequencies(np.append(inside, escape)))
        return cls(limits, np.concatenate(rows))

    def bits(self, hyper_indices_BNUV: Tensor) -> Tensor:
        """Ideal code length of each image's hyper indices, escapes included; float64 (B,)."""
        n = hyper_indices_BNUV.cpu().numpy().astype(np.int64)
        limit = self.limits.astype(np.int64)[:, None, None]
        start = self._starts()[:, None, None]
        excess = np.abs(n) - limit - 1
        position = start + np.where(excess < 0, n + limit, 2 * limit + 1)
        bits = frequency_bits(self.frequencies)[position]
        bits = bits + np.where(excess < 0, 0.0, escape_bits(np.maximum(excess, 0)))
        return torch.from_numpy(bits.sum((1, 2, 3)))

    def row(self, channel: int) -> npt.NDArray[np.uint32]:
        """Frequencies of one channel, n = −K … K, then the escape; they sum to 2**16."""
        start = int(self._starts()[channel])
        return self.frequencies[start : start + 2 * int(self.limits[channel]) + 2]

    def tensors(self) -> dict[str, Tensor]:
        """Both arrays by their names in a checkpoint, as int32."""
        return {
            "hyper_table.limits": torch.from_numpy(self.limits),
            "hyper_table.frequencies": torch.from_numpy(self.frequencies.astype(np.int32)),
        }

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Self:
        """Inverse of `tensors`, with every value checked.

        Raises:
            ValueError: limits out of range, or frequencies that are no distributions; names leaf and channel.
        """
        limits = named["hyper_table.limits"].numpy()
        frequencies = named["hyper_table.frequencies"].numpy()
        if limits.min() < 0 or limits.max() > LIMIT_MAX:
            raise ValueError(
                f"hyper_table.limits: expected 0 … {LIMIT_MAX}, found {limits.min()} … {limits.max()}"
            )
        expected = int((2 * limits.astype(np.int64) + 2).sum())
        if frequencies.shape != (expected,):
            raise ValueError(
                f"hyper_table.frequencies: expected shape ({expected},), found {frequencies.shape}"
            )
        table = cls(limits, frequencies.astype(np.uint32))
        for channel in range(len(limits)):
            row = table.row(channel)
            if row.min() < 1 or row.max() > TOTAL or row.sum(dtype=np.int64) != TOTAL:
                raise ValueError(
                    f"hyper_table.frequencies: expected channel {channel} to sum to {TOTAL} with no zero, "
                    f"found sum {row.sum(dtype=np.int64)} and minimum {row.min()}"
                )
        return table

    def _starts(self) -> npt.NDArray[np.int64]:
        lengths = 2 * self.limits.astype(np.int64) + 2
        starts: npt.NDArray[np.int64] = np.cumsum(lengths) - lengths
        return starts


def _limit(mass: npt.NDArray[np.float64]) -> int:
    """Smallest K with less than 2**-16 of the mass outside −K … K, at most LIMIT_MAX."""
    centre = len(mass) // 2
    both = mass[centre:] + np.append(0.0, mass[:centre][::-1])
    outside = 1.0 - np.cumsum(both)
    enough = np.flatnonzero(outside < 1 / TOTAL)
    return int(enough[0]) if len(enough) else LIMIT_MAX
