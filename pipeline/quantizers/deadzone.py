"""Deadzone quantizer: k = sgn(r)·⌊|r|/Δ + offset⌋. An offset below one half widens zero and moves every index inwards.

The offset is one number, or one a σ level. Only the encoder knows it. Source: Sullivan, "Efficient scalar quantization
of exponential and Laplacian random variables", IEEE Trans. IT 42 (1996); H.264's rounding offsets of 1/3 and 1/6.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.tables import MAX_INDEX, Tables


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] within ±32766."""
    offset = np.array(tables.settings.offset)
    by_place = offset[sigma_index_CT] if offset.size > 1 else offset[0]
    magnitude = np.floor(abs(residual_CT.astype(np.float64)) / tables.settings.step + by_place)
    return np.copysign(np.minimum(magnitude, MAX_INDEX), residual_CT).astype(np.int32)
