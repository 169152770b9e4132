"""A quantizer in the experiment file. Checked here without the pipeline, which would bring torch and Numba along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jobs.fields import STEP_RANGE, Section, Trellis

# As `pipeline.quantizers` has them, kind by kind
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "urq": {"step": 1.0, "lmbda_q": 0.0},
    "deadzone": {"step": 1.0, "lmbda_q": 0.0, "offset": 0.4},
    "rdoq": {"step": 1.0, "lmbda_q": 0.1},
    "tcq": {"trellis": "vvc8", "step": 0.7, "lmbda_q": 0.1},
}
SIGMA_LEVELS = 64
STATE_CONTEXTS = ("vvc4", "vvc8", "ungerboeck4", "ungerboeck8")  # trellises with few enough states

Offset = Annotated[float, Field(ge=0, le=0.5)]


class QuantizerSection(Section):
    """How latents are quantized; tables are designed for these values, or for better ones found from them on."""

    kind: Literal["urq", "deadzone", "rdoq", "tcq"]
    trellis: Trellis | None = None
    context: Literal["quantizer", "state"] = "quantizer"  # what of a trellis selects the frequency table
    step: Annotated[float, Field(ge=STEP_RANGE[0], le=STEP_RANGE[1])] | None = None  # Δ, units of the latents
    lmbda_q: Annotated[float, Field(ge=0)] | None = None  # λ_q / Δ²: weight of a bit in the search
    offset: Offset | list[Offset] | None = None  # of a deadzone: one number, or one a σ level
    centroids: bool = False  # decode to the centroids of the design instead of plain levels
    tune: bool = False  # search Δ, λ_q or offset, and refine the tables, for each codec

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, value: object) -> object:
        """What is not given is the kind's."""
        if not isinstance(value, dict):
            return value
        given = {name: setting for name, setting in value.items() if setting is not None}
        kind = given.get("kind")
        return {**DEFAULTS.get(kind, {}), **given} if isinstance(kind, str) else given

    @model_validator(mode="after")
    def _fits(self) -> QuantizerSection:
        if self.kind != "tcq" and self.trellis is not None:
            raise ValueError(f"kind {self.kind!r} takes no `trellis`; 'tcq' has one")
        if self.kind in ("urq", "deadzone") and self.lmbda_q:
            raise ValueError(f"kind {self.kind!r} rounds and takes no `lmbda_q`; use 'rdoq'")
        if self.kind != "deadzone" and self.offset is not None:
            raise ValueError(f"kind {self.kind!r} takes no `offset`; 'deadzone' has one")
        if self.context == "state" and self.trellis not in STATE_CONTEXTS:
            raise ValueError(
                f"`context: state` needs a `trellis` of at most 8 states, found {self.trellis or 'none'}"
            )
        if isinstance(self.offset, list) and len(self.offset) != SIGMA_LEVELS:
            raise ValueError(
                f"expected one `offset`, or {SIGMA_LEVELS}, one a σ level; found {len(self.offset)}"
            )
        if self.tune and isinstance(self.offset, list):
            raise ValueError("`tune` searches one `offset`; give one number to start from, or none")
        if self.tune and self.centroids:
            raise ValueError("`tune` itself decides on centroids; leave `centroids` out")
        return self
