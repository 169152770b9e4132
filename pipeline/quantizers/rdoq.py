"""Rate-distortion optimized scalar quantization: each index alone has the least (r − r̂)² + λ_q·bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pipeline.quantizers.envelope import best, envelopes
from pipeline.quantizers.tables import Settings, Tables

DEFAULTS = Settings("rdoq", None, step=1.0, lmbda_q=0.1)


def check(settings: Settings) -> None:
    """Raise ValueError if the settings name a trellis."""
    if settings.trellis is not None:
        raise ValueError(f"quantizer rdoq: expected no trellis, found {settings.trellis}; tcq has one")


def contexts(indices_CT: npt.NDArray[np.int32], settings: Settings) -> npt.NDArray[np.uint8]:
    """All zero, uint8 [C, T]: one table a σ level."""
    return np.zeros(indices_CT.shape, np.uint8)


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] of least (r − r̂)² + λ_q·bits over all |k| ≤ 32766."""
    indices_CT = np.empty(residual_CT.shape, np.int32)
    _search(residual_CT.ravel(), sigma_index_CT.ravel(), *envelopes(tables, 1), indices_CT.reshape(-1))
    return indices_CT


@numba.njit(nogil=True, cache=True)
def _search(residual: Any, sigma_index: Any, branches: Any, guess: Any, lines: Any, indices: Any) -> None:
    for i in range(residual.size):
        indices[i] = best(np.float64(residual[i]), np.int64(sigma_index[i]), branches, guess, lines)[1]
