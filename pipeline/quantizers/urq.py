"""Uniform reconstruction quantizer: k = round(r/Δ), blind to the rate. The others are measured against it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.tables import MAX_INDEX, Tables


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T]: r/Δ rounded, halves to even, within ±32766."""
    nearest = np.rint(residual_CT.astype(np.float64) / tables.settings.step)
    return np.clip(nearest, -MAX_INDEX, MAX_INDEX).astype(np.int32)
