"""What a quantizer is. A new one is one file with this function and one line in `pipeline.quantizer_kinds.KINDS`.

Shapes: C channels, T positions of a channel in raster order.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.tables import Tables


class Quantized(NamedTuple):
    """What a quantizer makes of one image.

    Attributes:
        indices: int32 [C, T], |k| ≤ 32766.
        reconstruction: float32 [C, T], r̂ in latent units: what a decoder gets from the indices.
        bits: float64 [C], ideal code length of each channel with the tables.
    """

    indices: npt.NDArray[np.int32]
    reconstruction: npt.NDArray[np.float32]
    bits: npt.NDArray[np.float64]


class Quantizer(Protocol):
    """One kind of quantizer: a module of its name."""

    def search(
        self, residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
    ) -> npt.NDArray[np.int32]:
        """Choose the indices int32 [C, T], |k| ≤ 32766, of residuals finite and within the last level, contiguous."""
