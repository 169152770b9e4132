"""The σ levels every conditional table is made for: 64, log-spaced, from 0.11 to 256 (latent units)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SIGMA_LEVELS = 64
SIGMA_MIN = 0.11
SIGMA_MAX = 256.0


def sigma_levels() -> npt.NDArray[np.float64]:
    """The σ levels in ascending order; float64, shape (64,). The ratio of neighbours is about 1.131."""
    levels: npt.NDArray[np.float64] = np.geomspace(SIGMA_MIN, SIGMA_MAX, SIGMA_LEVELS)
    return levels


def sigma_midpoints() -> npt.NDArray[np.float64]:
    """Geometric midpoints between neighbouring levels; float64, shape (63,).

    Snapping σ to the nearest level in log σ is counting the midpoints below σ.
    """
    levels = sigma_levels()
    midpoints: npt.NDArray[np.float64] = np.sqrt(levels[:-1] * levels[1:])
    return midpoints
