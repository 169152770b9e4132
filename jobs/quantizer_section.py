"""A quantizer in the experiment file. Checked without `pipeline.quantizers`, which would bring Numba along."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, Tag, model_validator

from jobs.fields import MANY, ONE, Effort, OneOrMany, Section, Trellis
from pipeline.quantizer_kinds import KINDS, LMBDA_Q_MAX, STATE_CONTEXTS, STEP_RANGE, check
from pipeline.sigma import SIGMA_LEVELS

Offset = Annotated[float, Field(ge=0, le=0.5)]
Offsets = Annotated[Annotated[Offset, Tag(ONE)] | Annotated[list[Offset], Tag(MANY)], OneOrMany]
Weight = Annotated[float, Field(ge=0, le=LMBDA_Q_MAX)]
Weights = Annotated[
    Annotated[Weight, Tag(ONE)] | Annotated[dict[PositiveFloat, Weight], Tag(MANY)], OneOrMany
]


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}")
    return kind


class QuantizerSection(Section):
    """How latents are quantized; tables are designed for these values, or for better ones found from them on."""

    kind: Annotated[str, AfterValidator(_known)]
    trellis: Trellis | None = None
    context: Literal["quantizer", "state"] = "quantizer"  # what of a trellis selects the frequency table
    step: Annotated[float, Field(ge=STEP_RANGE[0], le=STEP_RANGE[1])] | None = None  # Δ, units of the latents
    lmbda_q: Weights | None = None  # λ_q/Δ²: weight of a bit, or one for each λ
    offset: Offsets | None = None  # of a deadzone: one number, or one a σ level
    centroids: bool = False  # decode to the centroids of the design instead of plain levels
    effort: Effort = 0  # steps in which the encoder searches for indices of a lower J
    tune: bool | Literal["step"] = (
        False  # for each codec, search all of these, or Δ alone, and refine the tables
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, value: object) -> object:
        """What is not given is the kind's."""
        if not isinstance(value, dict):
            return value
        given = {name: setting for name, setting in value.items() if setting is not None}
        kind = given.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            return given
        defaults = {name: default for name, default in KINDS[kind]._asdict().items() if default is not None}
        return {"lmbda_q": 0.0, **defaults, **given}

    @model_validator(mode="after")
    def _fits(self) -> QuantizerSection:
        check(self.kind, {"trellis": self.trellis, "lmbda_q": self.lmbda_q, "offset": self.offset})
        if self.context == "state" and self.trellis not in STATE_CONTEXTS:
            raise ValueError(
                f"`context: state` needs a `trellis` of at most 8 states, found {self.trellis or 'none'}"
            )
        if isinstance(self.offset, list) and len(self.offset) != SIGMA_LEVELS:
            raise ValueError(
                f"expected one `offset`, or {SIGMA_LEVELS}, one a σ level; found {len(self.offset)}"
            )
        if self.tune:
            self.require_tunable("tune")
        return self

    def at(self, lmbda: float) -> QuantizerSection:
        """As it is for a codec of this λ. Raises KeyError where it says nothing of it."""
        weights = self.lmbda_q
        return self.model_copy(update={"lmbda_q": weights[lmbda]}) if isinstance(weights, dict) else self

    def require_tunable(self, by: str) -> None:
        """Raise ValueError if this is nothing to tune; `by` is the key that asks for it."""
        if isinstance(self.offset, list):
            raise ValueError(f"`{by}` searches one `offset`; give one number to start from, or none")
        if self.centroids:
            raise ValueError(f"`{by}` itself decides on centroids; leave `centroids` out")
