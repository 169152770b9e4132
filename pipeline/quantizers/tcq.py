"""Trellis-coded quantization (dependent quantization): two quantizers in turn, the path found by Viterbi's algorithm.

Quantizer Q0 has the levels 2kΔ, Q1 has (2k − sgn k)Δ; the parity of k moves the trellis. Levels lie 2Δ apart in each
and Δ apart in their union, so a trellis takes the rate of a step of 2Δ and has less distortion: denser packing.
Sources: Marcellin and Fischer, IEEE Trans. Commun. 38 (1990); Schwarz et al., DCC 2019 (VVC's dependent quantization).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.quantizers.envelope import envelopes, grid
from pipeline.quantizers.search_kernels import search_lanes
from pipeline.quantizers.tables import Settings, Tables
from pipeline.quantizers.trellis import LANES


def search(
    residual_CT: npt.NDArray[np.float32], sigma_index_CT: npt.NDArray[np.uint8], tables: Tables
) -> npt.NDArray[np.int32]:
    """Indices int32 [C, T] of least (r − r̂)² + λ_q·bits in total, over all paths and all |k| ≤ 32766, lane by lane."""
    indices_CT = np.empty(residual_CT.shape, np.int32)
    if indices_CT.size:
        search_lanes(residual_CT, sigma_index_CT, *search_arguments(tables, indices_CT.shape), indices_CT)
    return indices_CT


def search_arguments(tables: Tables, shape_CT: tuple[int, ...]) -> tuple[Any, ...]:
    """What the compiled search takes besides residuals and σ indices."""
    previous, parity = tables.settings.machine.predecessors()
    # the two ways into each state: the state before, and the branch
    into = np.stack([previous, 2 * tables.settings.state_contexts[previous] + parity], axis=-1)
    return tuple(envelopes(tables, 2)), tuple(grid(tables)), into, _trail(shape_CT, tables.settings)


def _trail(shape_CT: tuple[int, ...], settings: Settings) -> tuple[npt.NDArray[Any], ...]:
    """Room for what the search's way back needs, position by position, the lanes side by side.

    Returns:
        Survivors, a bit a state (which of two ways led into it); the grid's bin; a bit a branch (which of the bin's
        lines was best). For 8 states and tables by quantizer 4 bytes a residual where the channels fill their
        lanes, a multiple of 32; empty lanes take as much.
    """
    count = -(-shape_CT[0] // LANES) * shape_CT[1] * LANES
    marks = count * -(-settings.machine.states // 8)
    width = 1 if 2 * settings.contexts <= 8 else 2
    room = np.empty((2 + width) * count + marks, np.uint8)
    bins, rest = room[: 2 * count], room[2 * count :]
    upper = rest[: width * count]
    return rest[width * count :], bins.view(np.uint16), upper.view(np.uint8 if width == 1 else np.uint16)
