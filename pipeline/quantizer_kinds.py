"""The kinds of quantizers, what their settings may be, and those that do well without tuning.

It stands outside `pipeline.quantizers`, which brings Numba along: whoever only reads an experiment file asks here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

STEP_RANGE = (0.05, 64.0)
"""Steps in latent units; at the least one, 6σ of the widest level still lies within the largest index."""
LMBDA_Q_MAX = 1e6
"""Of λ_q/Δ²: no bit is worth more, and costs stay far from the largest number there is."""
STATE_CONTEXTS = ("vvc4", "vvc8", "ungerboeck4", "ungerboeck8")
"""Trellises whose states may have tables of their own: more than 8 would leave too few samples to each."""


class Kind(NamedTuple):
    """Defaults of a kind; it has a use for those of the last three that have one.

    Attributes:
        step: Δ, latent units.
        lmbda_q: λ_q/Δ².
        trellis: name in `pipeline.quantizers.trellis.TRELLISES`.
        offset: rounding offset.
    """

    step: float = 1.0
    lmbda_q: float | None = None
    trellis: str | None = None
    offset: float | None = None


# A kind is a line here, and the module of its name in `pipeline.quantizers`. A step of 1 is what training's uniform
# noise stands for, and a decoder trained with it wants a scalar quantizer to weigh the rate but little: at the slope of
# a high-rate source, 2 ln 2 · Δ²/12 ≈ 0.12 Δ², J is 2 % higher (benchmarks/tuning.txt).
KINDS: Mapping[str, Kind] = {
    "urq": Kind(),
    "deadzone": Kind(offset=0.48),
    "rdoq": Kind(lmbda_q=0.02),
    "tcq": Kind(step=0.7, lmbda_q=0.1, trellis="vvc8"),
}


def named(kind: str) -> Kind:
    """Raises ValueError if there is no such kind."""
    if kind not in KINDS:
        raise ValueError(f"quantizer kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    return KINDS[kind]


def check(kind: str, given: Mapping[str, object]) -> None:
    """Raise ValueError if a kind has no use for what it is given, or lacks its trellis.

    Args:
        given: `trellis`, `lmbda_q` and `offset`; None, or a `lmbda_q` of 0, where there is none.
    """
    wanted = named(kind)
    for option, value in given.items():
        absent = value is None or (option == "lmbda_q" and value == 0)
        if not absent and getattr(wanted, option) is None:
            users = " and ".join(
                repr(name) for name, other in KINDS.items() if getattr(other, option) is not None
            )
            raise ValueError(f"kind {kind!r} takes no `{option}`, found {value}; {users} can use it")
    if wanted.trellis is not None and given.get("trellis") is None:
        raise ValueError(f"kind {kind!r} needs a `trellis`, such as {wanted.trellis!r}; found none")
