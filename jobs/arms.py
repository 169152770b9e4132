"""The section `arms` of the experiment file: what is finetuned on what, and what controls for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jobs.fields import Effort, Name, Section

OF_NO_TRAINING = frozenset({"parts", "after", "retune", "effort"})


class Arm(Section):
    """What is finetuned on what. An empty mapping is the base codec, as trained."""

    parts: Literal["none", "decoder", "decoder+scale"] = "none"
    latents: Literal["quantized", "noise", "uniform", "rounded"] = "quantized"
    after: Name | None = None  # an arm before it, from whose codec it goes on, with latents of its own
    retune: bool = False  # tune the quantizer to that codec first
    effort: Effort = 0  # as a quantizer's: on test images, and where it trains on its own latents too
    steps: PositiveInt = 5_000
    batch: PositiveInt = 8
    crop: Annotated[int, Field(ge=96, multiple_of=16)] = (
        256  # pixels, the margin of 2 latents a side included
    )
    optimizer: Literal["muon", "adam"] = "adam"  # of the filters; all else is trained by Adam
    learning_rate: PositiveFloat = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 50
    clip: PositiveFloat = 1.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.retune and self.after is None:
            raise ValueError(
                "`retune` needs `after`; a quantizer is tuned to the base codec by its `tune: true`"
            )
        if self.parts == "none" and (extra := self.model_fields_set - OF_NO_TRAINING):
            names = ", ".join(sorted(extra))
            raise ValueError(f"an arm without `parts` trains nothing and takes no {names}")
        if self.parts == "none" and self.after and not (self.retune or self.effort):
            raise ValueError(
                f"nothing would differ from {self.after!r}: expected `parts`, `effort` or `retune: true`"
            )
        if self.parts == "decoder+scale" and self.latents != "quantized":
            raise ValueError(
                "`parts: decoder+scale` needs `latents: quantized`: its rate is that of stored indices"
            )
        return self

    @property
    def is_base(self) -> bool:
        """Whether its codec is the one as trained, which no seed changes."""
        return self.parts == "none" and self.after is None

    @property
    def is_control(self) -> bool:
        """Whether this arm sees simulated instead of real quantization."""
        return self.parts != "none" and self.latents != "quantized"


def trained_on(arms: Mapping[str, Arm], name: str) -> str:
    """The latents of an arm; of one that trains nothing, those of the arm it goes on from."""
    arm = arms[name]
    return trained_on(arms, arm.after) if arm.parts == "none" and arm.after else arm.latents


def recipe(arms: Mapping[str, Arm], name: str) -> list[dict[str, Any]]:
    """How an arm is trained, and before it the arms it goes on from, less what is trained on what."""
    arm = arms[name]
    own: dict[str, Any] = {"retune": arm.retune}
    if arm.parts != "none":
        own = arm.model_dump(mode="json", exclude={"parts", "latents", "after", "effort"})
    own |= {"effort": arm.effort} if arm.effort else {}
    return [own, *(recipe(arms, arm.after) if arm.after else [])]


def unlike(arms: Mapping[str, Arm], mine: str, other: str) -> list[str]:
    """Where the training of two arms differs, with both values."""
    (first, *before), (theirs, *others) = recipe(arms, mine), recipe(arms, other)
    keys = list(dict.fromkeys([*first, *theirs]))
    pairs = {key: (first.get(key, 0), theirs.get(key, 0)) for key in keys}
    found = [f"{key} {ours} against {other}" for key, (ours, other) in pairs.items() if ours != other]
    return found + ([] if before == others else ["what it goes on from"])


def ordered(arms: dict[str, Arm]) -> dict[str, Arm]:
    """An arm goes on from one that stands before it and trains something on the same latents."""
    seen: list[str] = []
    for name, arm in arms.items():
        if arm.after is not None:
            if arm.after not in seen:
                raise ValueError(
                    f"{name!r}: expected `after` to name an arm before it that trains ({', '.join(seen) or 'none'}), "
                    f"found {arm.after!r}"
                )
            if (latents := trained_on(arms, name)) != (expected := trained_on(arms, arm.after)):
                raise ValueError(
                    f"{name!r}: expected `latents: {expected}` as in {arm.after!r}, from which it goes on, "
                    f"found {latents}: it would be neither an arm nor its control"
                )
        if not arm.is_base:
            seen.append(name)
    return arms


def controlled(arms: dict[str, Arm]) -> dict[str, Arm]:
    """A control controls for nothing unless some arm on quantized latents is trained just like it."""
    real = [name for name, arm in arms.items() if arm.parts != "none" and not arm.is_control]
    for name, control in arms.items():
        if control.is_control and real:
            differing = {other: unlike(arms, name, other) for other in real}
            nearest = min(differing, key=lambda other: len(differing[other]))
            if differing[nearest]:
                raise ValueError(
                    f"expected the control {name!r} to be trained like an arm on quantized latents, found "
                    f"{', '.join(differing[nearest])} in the nearest, {nearest!r}; give both the same"
                )
    return arms
