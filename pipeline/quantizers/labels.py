"""Which index means which level: the labellings that a design starts from.

The union of the two quantizers' levels is a lattice. Set partitioning (Ungerboeck, IEEE Trans. Inform. Theory 28, 1982)
cuts it into four subsets, every fourth level each: D0 and D2 make Q0, D1 and D3 make Q1; the parity of k says which.

    plain      Q1: … −3Δ −Δ  0  Δ 3Δ …    odd k: −Δ and Δ, 2Δ apart. What the tables' lattice and H.266 (VVC) have
    centred    Q1: … −3Δ −Δ  0  Δ 3Δ …    odd k: … −3Δ Δ 5Δ …, even k: … −Δ 3Δ …: 4Δ apart everywhere
    offset     Q0: … −3Δ/2 Δ/2 5Δ/2 …     and Q1 its mirror image; no zero: both have a level near it

Near zero plain is no set partitioning: −Δ and Δ are in one subset. Where most residuals lie there, below 2 bits, that
costs up to 0.3 dB. Both signs of k have one point |k|; a sign without level never occurs and gets the least frequency.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.tables import Settings
from pipeline.sources import Source

Floats = npt.NDArray[np.float64]

SHIFTS: dict[str, float | None] = {"plain": None, "centred": 0.0, "offset": 0.5}
"""Of the lattice against zero, in Δ; plain keeps the levels of `Settings.lattice`."""


def levels(settings: Settings, K: int, labelling: str) -> Floats:
    """Levels of k = −K … K in latent units, float64 [Q, 2K + 1]; NaN where no level belongs to k."""
    shift, sign = SHIFTS[labelling], np.sign(np.arange(-K, K + 1))
    if shift is None:
        return sign * settings.lattice(abs(np.arange(-K, K + 1)))
    found = np.full((settings.quantizers, 2 * K + 1), np.nan)
    if shift == 0:
        found[:, K] = 0.0
    subsets = 2 * settings.quantizers
    for subset in range(subsets):
        position = np.arange(subset - subsets * (K + 1), subsets * (K + 1), subsets) + shift
        position = position[position != 0]
        odd = subset in (1, 2) if subsets == 4 else subset == 1
        magnitude = 2 * np.unique(abs(position), return_inverse=True)[1] + 2 - odd
        k = (np.sign(position) * magnitude).astype(np.int64)
        kept = magnitude <= K
        found[subset % settings.quantizers, K + k[kept]] = position[kept] * settings.step
    return found


def points(settings: Settings, K: int, labelling: str) -> npt.NDArray[np.float32]:
    """The reconstruction points of |k| = 0 … K that these levels have in common, float32 [Q, K + 1]."""
    magnitude = abs(levels(settings, K, labelling))
    both = np.fmax(magnitude[:, K:], magnitude[:, K::-1])
    both[:, 0] = 0.0
    return both.astype(np.float32)


def cells(settings: Settings, K: int, labelling: str, source: Source, sigma: float) -> Floats:
    """Probabilities of the cells between midpoints of neighbouring levels, for `source` σ wide.

    Returns:
        float64 [C, 2K + 2]: k = −K … K, then what lies beyond. The state of a trellis is taken to tell nothing of r.
    """
    rows = levels(settings, K, labelling)
    found = np.zeros((len(rows), 2 * K + 2))
    for row, level in zip(found, rows, strict=True):
        order = np.flatnonzero(~np.isnan(level))
        order = order[np.argsort(level[order])]
        known, margin = level[order], settings.spacing / 2
        edges = np.concatenate([[known[0] - margin], (known[1:] + known[:-1]) / 2, [known[-1] + margin]])
        row[order] = source.mass(edges[:-1] / sigma, edges[1:] / sigma)
        row[-1] = source.upper(edges[-1] / sigma) + source.upper(-edges[0] / sigma)
    return found[settings.context_quantizers]
