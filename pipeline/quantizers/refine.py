"""Tables refined by what a quantizer chooses on real latents, with tables for Gaussians as the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.quantizers import contexts, quantize
from pipeline.quantizers.lloyd import Statistics, gather, retabulate
from pipeline.quantizers.tables import Tables

PRIOR_WEIGHT = 64.0
"""Samples a symbol that the prior counts for; weights from 4 to 256 differ by less than 0.05 % in J
(benchmarks/tuning.txt)."""
ROUNDS = 3
"""Lloyd rounds: a rate-constrained search moves with its tables."""


class Residuals(NamedTuple):
    """What a quantizer sees of one image: r float32 [C, T] in latent units, σ index uint8 [C, T]."""

    residual: npt.NDArray[np.float32]
    sigma_index: npt.NDArray[np.uint8]


def refine(
    prior: Tables,
    latents: Sequence[Residuals],
    *,
    centroids: bool = False,
    rounds: int = ROUNDS,
    weight: float = PRIOR_WEIGHT,
) -> Tables:
    """Search, count, and again: Lloyd's algorithm through the quantizer's own search.

    Args:
        prior: tables to begin with; what `latents` never show stays as they have it.
        centroids: also move the reconstruction points to the centroids. They lower the latents' error; whether the
            picture gains, only the decoder knows.
        weight: of the prior, in samples a symbol.
    """
    tables = prior
    for _ in range(rounds):
        tables = retabulate(prior, _counted(tables, latents), centroids=centroids, weight=weight)
    return tables


def _counted(tables: Tables, latents: Sequence[Residuals]) -> Statistics:
    """What `tables` make the quantizer choose, over all images."""
    total: Statistics | None = None
    for residual, sigma_index in latents:
        indices = quantize(residual, sigma_index, tables).indices
        found = gather(tables, residual, sigma_index, contexts(indices, tables), indices)
        total = found if total is None else Statistics(*(a + b for a, b in zip(total, found, strict=True)))
    assert total is not None
    return total
