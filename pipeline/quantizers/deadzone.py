"""Deadzone quantizer: k = sgn(r)·⌊|r|/Δ + offset⌋. An offset below one half widens zero and moves every index inwards.

The offset is one number, or one a σ level. Only the encoder knows it. Source: Sullivan, "Efficient scalar quantization
of exponential and Laplacian random variables", IEEE Trans. IT 42 (1996); H.264's rounding offsets of 1/3 and 1/6.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.tables import MAX_INDEX, Settings, Tables

DEFAULTS = Settings("deadzone", None, step=1.0, lmbda_q=0.0, offset=(0.4,))
"""Between rounding and H.264's 1/3: what RDOQ does with a weight of some 0.1 on photographs."""


def check(settings: Settings) -> None:
    """Raise ValueError if the settings name a trellis or weight the rate."""
    if settings.trellis is not None or settings.lmbda_q != 0:
        found = f"trellis {settings.trellis} and lmbda_q {settings.lmbda_q}"
        raise ValueError(
            f"quantizer deadzone: expected no trellis and lmbda_q 0, found {found}; rdoq weights the rate"
        )


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] within ±32766."""
    offset = np.array(tables.settings.offset)
    by_place = offset[sigma_index_CT] if offset.size > 1 else offset[0]
    magnitude = np.floor(abs(residual_CT.astype(np.float64)) / tables.settings.step + by_place)
    return np.copysign(np.minimum(magnitude, MAX_INDEX), residual_CT).astype(np.int32)
