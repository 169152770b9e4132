"""Quantizers: residuals to indices and back, with tables that say what an index costs and means.

    residual r, σ index ──quantize──► indices k ──dequantize──► reconstruction r̂
                                        └──contexts──► which table codes each k ──► bits

Everything that follows from the indices alone is done here, once, for all kinds: a quantizer only chooses.
Shapes: C channels, T positions of a channel in raster order.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

import numpy as np
import numpy.typing as npt

from pipeline import quantizer_kinds
from pipeline.quantizers import lookup
from pipeline.quantizers.contract import Quantized, Quantizer
from pipeline.quantizers.kernels import plain
from pipeline.quantizers.lloyd import design_tables
from pipeline.quantizers.lookup import contexts
from pipeline.quantizers.tables import MAX_INDEX, Settings, Tables

__all__ = [
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "Settings",
    "Tables",
    "contexts",
    "dequantize",
    "design",
    "quantize",
    "sequence_bits",
    "settings",
]

QUANTIZERS: dict[str, Quantizer] = {
    kind: cast(Quantizer, import_module(f"{__name__}.{kind}")) for kind in quantizer_kinds.KINDS
}


def settings(
    kind: str,
    trellis: str | None = None,
    step: float | None = None,
    lmbda_q: float | None = None,
    *,
    context: str = "quantizer",
    offset: tuple[float, ...] | None = None,
) -> Settings:
    """Settings with the kind's defaults where None is given.

    Args:
        kind: name in `QUANTIZERS`.
        trellis: name in `pipeline.quantizers.trellis.TRELLISES`, for tcq.
        step: Δ, latent units.
        lmbda_q: λ_q/Δ².
        context: quantizer or state, for tcq.
        offset: rounding offsets, for deadzone.

    Raises:
        ValueError: if the kind is unknown, a value impossible, or one that the kind has no use for.
    """
    defaults = quantizer_kinds.named(kind)
    return Settings(
        kind,
        defaults.trellis if trellis is None else trellis,
        defaults.step if step is None else step,
        (defaults.lmbda_q or 0.0) if lmbda_q is None else lmbda_q,
        context,
        (0.5 if defaults.offset is None else defaults.offset,) if offset is None else offset,
    )


def design(settings: Settings, seed: int = 0, *, centroids: bool = False) -> Tables:
    """Tables for Gaussian residuals; seconds. Equal for equal arguments on one platform.

    Args:
        centroids: decode to the centroids of the design, which is right for a source, instead of to the plain levels.
            A decoder trained on noisy latents has learnt to move what it gets towards what is likely: centroids do it
            twice, and cost 0.2–0.4 dB of the picture although the latents' MSE falls
            (benchmarks/reconstruction_points.txt).
    """
    return design_tables(QUANTIZERS[settings.kind], settings, seed, centroids)


def quantize(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> Quantized:
    """Quantize one image's residuals.

    Args:
        residual_CT: float32 [C, T], r = y − μ in latent units, finite. One beyond the last level, that of |k| = 32766,
            counts as that level.
        sigma_index_CT: uint8 [C, T], below 64.
        tables: from `design` or `Tables.from_bytes`.

    Raises:
        ValueError: for a wrong type or shape, or a residual that is not finite, with its place.
    """
    if residual_CT.dtype != np.float32 or residual_CT.ndim != 2:
        raise ValueError(f"residuals: expected float32 [C, T], found {residual_CT.dtype} {residual_CT.shape}")
    lookup.check_sigma_index(sigma_index_CT, residual_CT.shape)
    finite_CT = np.isfinite(residual_CT)
    if not finite_CT.all():
        channel, position = np.argwhere(~finite_CT)[0].tolist()
        raise ValueError(
            f"residuals: expected finite values, found {residual_CT[channel, position]} in channel {channel}, "
            f"position {position} ({(~finite_CT).sum()} of {residual_CT.size} values); check the codec's weights"
        )
    last_level = np.float32(tables.settings.spacing * MAX_INDEX)
    within_CT = np.clip(residual_CT, -last_level, last_level)
    indices_CT = QUANTIZERS[tables.settings.kind].search(plain(within_CT), plain(sigma_index_CT), tables)
    contexts_CT = contexts(indices_CT, tables)
    return Quantized(
        indices_CT,
        lookup.reconstruct(tables, sigma_index_CT, contexts_CT, indices_CT),
        lookup.channel_bits(tables, sigma_index_CT, contexts_CT, indices_CT),
    )


def dequantize(
    indices_CT: npt.NDArray[np.int32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.float32]:
    """r̂ float32 [C, T] from what a decoder has: bit for bit `quantize`'s reconstruction. Raises as it does."""
    return lookup.reconstruct(tables, sigma_index_CT, contexts(indices_CT, tables), indices_CT)


def sequence_bits(
    indices_CT: npt.NDArray[np.int32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.float64]:
    """Ideal code length of each channel in bits, float64 [C], of indices wherever they come from."""
    return lookup.channel_bits(tables, sigma_index_CT, contexts(indices_CT, tables), indices_CT)
