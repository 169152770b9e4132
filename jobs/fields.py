"""Values in the experiment file that several sections or other modules know: their types, and what is accepted."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

Metric = Literal["psnr", "ms_ssim"]
Trellis = Literal[
    "vvc4",
    "vvc8",
    "ungerboeck4",
    "ungerboeck8",
    "ungerboeck16",
    "ungerboeck32",
    "ungerboeck64",
    "ungerboeck128",
    "ungerboeck256",
]
CHANNELS_MAX = 4096  # as `pipeline.codec.artifact` has it, which would bring torch along


class Section(BaseModel):
    """A mapping in the file: unknown keys are errors, numbers are finite and not made from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: object) -> object:
        """A key with nothing after its colon is an empty mapping to a person, and null to YAML."""
        return {} if value is None else value


# Which branch of `OneOrMany`; in the places of errors, from which they are left out.
ONE, MANY = "(one)", "(many)"


def _one_or_many(value: object) -> str:
    return MANY if isinstance(value, list | dict) else ONE


# Put it behind `Annotated[…, Tag(ONE)] | Annotated[…, Tag(MANY)]`: an error is then about the branch that was meant.
OneOrMany = Discriminator(_one_or_many)


def as_list(value: object) -> object:
    """One value stands for a list of it."""
    return [value] if isinstance(value, str | int | float) else value


def distinct(values: list[Any]) -> list[Any]:
    """Raises ValueError if a value stands there twice."""
    if len(set(values)) != len(values):
        raise ValueError("expected each value once")
    return values


def _as_name(value: object) -> object:
    """Names are axes of labels such as `finetune quantizer=tcq8 arm=paper seed=0`, which blanks or = would confuse."""
    if not (isinstance(value, str) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9._+-]*", value)):
        raise ValueError(
            "expected a name of letters, digits, '.', '_', '+', '-' that begins with a letter or a digit"
        )
    return value


Name = Annotated[str, BeforeValidator(_as_name)]
Channels = Annotated[int, Field(ge=1, le=CHANNELS_MAX)]
Effort = Annotated[int, Field(ge=0, le=100)]  # steps of the encoder's search
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]  # what torch's generators take
