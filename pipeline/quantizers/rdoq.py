"""Rate-distortion optimized scalar quantization: each index alone has the least (r − r̂)² + λ_q·bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.envelope import envelopes
from pipeline.quantizers.search_kernels import search_each
from pipeline.quantizers.tables import Settings, Tables

DEFAULTS = Settings("rdoq", None, step=1.0, lmbda_q=0.1)
"""Near the slope −dD/dR = 2 ln 2 · Δ²/12 ≈ 0.12 Δ² of a uniform quantizer at high rate."""


def check(settings: Settings) -> None:
    """Raise ValueError if the settings name a trellis."""
    if settings.trellis is not None:
        raise ValueError(f"quantizer rdoq: expected no trellis, found {settings.trellis}; tcq has one")


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] of least (r − r̂)² + λ_q·bits over all |k| ≤ 32766."""
    indices_CT = np.empty(residual_CT.shape, np.int32)
    search_each(residual_CT.ravel(), sigma_index_CT.ravel(), *envelopes(tables, 1), indices_CT.reshape(-1))
    return indices_CT
