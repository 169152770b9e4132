"""Trellises: how the parities of the indices so far choose between the two quantizers Q0 and Q1.

A trellis starts in state 0; coding index k in state s moves it to `next_state[s, k & 1]`. The state's quantizer is
the context that selects the frequency table, so a decoder follows along from the indices alone.

Shapes: S states; C channels, T positions of a channel in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LANES = 32
"""Channel c runs in lane c mod 32; a lane takes its channels one after another. Part of the file format."""


@dataclass(frozen=True, slots=True, eq=False)
class Trellis:
    """A trellis with S states, two branches out of each and two into each.

    Attributes:
        next_state: uint8 [S, 2], by state and parity of the index.
        quantizer: uint8 [S], 0 or 1: which quantizer (and context) a state uses.
    """

    next_state: npt.NDArray[np.uint8]
    quantizer: npt.NDArray[np.uint8]

    @property
    def states(self) -> int:
        return len(self.quantizer)

    def predecessors(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """The two branches into each state, as (state they leave, parity they carry), each uint8 [S, 2]."""
        order = np.argsort(self.next_state.ravel(), kind="stable").reshape(self.states, 2)
        return (order >> 1).astype(np.uint8), (order & 1).astype(np.uint8)


def _vvc(next_state: list[list[int]], quantizer: list[int]) -> Trellis:
    return Trellis(np.array(next_state, np.uint8), np.array(quantizer, np.uint8))


def _ungerboeck(h0: int, h1: int) -> Trellis:
    """Systematic feedback code of parity-check polynomials (h0, h1): Ungerboeck, IEEE Trans. IT 28, 1982, Table I."""
    states = 1 << (h0.bit_length() - 1)
    s, u = np.arange(states)[:, None], np.arange(2)
    next_state = (s >> 1) ^ (u * (h1 >> 1)) ^ ((s & 1) * (h0 >> 1))
    return Trellis(next_state.astype(np.uint8), (s[:, 0] & 1).astype(np.uint8))


SCALAR = _vvc([[0, 0]], [0])
"""What a scalar quantizer is: one state, which nothing leaves."""

TRELLISES: dict[str, Trellis] = {
    # residual coding of H.266 (VVC), and ECM's extension of it to 8 states
    "vvc4": _vvc([[0, 2], [2, 0], [1, 3], [3, 1]], [0, 0, 1, 1]),
    "vvc8": _vvc([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]], [0, 1] * 4),
    "ungerboeck4": _ungerboeck(0o5, 0o2),
    "ungerboeck8": _ungerboeck(0o13, 0o4),
    "ungerboeck16": _ungerboeck(0o23, 0o4),
    "ungerboeck32": _ungerboeck(0o45, 0o10),
    "ungerboeck64": _ungerboeck(0o103, 0o24),
    "ungerboeck128": _ungerboeck(0o235, 0o126),
    "ungerboeck256": _ungerboeck(0o515, 0o362),
}
