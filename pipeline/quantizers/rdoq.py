"""Rate-distortion optimized scalar quantization: each index alone has the least (r − r̂)² + λ_q·bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.envelope import envelopes
from pipeline.quantizers.search_kernels import search_each
from pipeline.quantizers.tables import Tables


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] of least (r − r̂)² + λ_q·bits over all |k| ≤ 32766."""
    indices_CT = np.empty(residual_CT.shape, np.int32)
    search_each(residual_CT.ravel(), sigma_index_CT.ravel(), *envelopes(tables, 1), indices_CT.reshape(-1))
    return indices_CT
