"""The section `resources` of the experiment file: how stages execute. Nothing of it enters a key."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jobs.fields import Section


class Resources(Section):
    """How one stage executes; enters no key."""

    num_cpus: PositiveFloat = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    in_flight: PositiveInt = 64  # tasks submitted at once, at most
    log_every: PositiveInt = 20  # steps
    checkpoint_every: PositiveInt = 500  # steps


class QuantizeResources(Resources):
    """Of `quantize`."""

    max_failures: Annotated[int, Field(ge=0)] = 10  # images that are given up before the stage is


class TrainResources(Resources):
    """Of `train` and `finetune`."""

    num_cpus: PositiveFloat = 2.0
    compile: Literal["auto", True, False] = "auto"  # auto: long trainings, where a C++ compiler is
    workers: PositiveInt = 1  # that share each batch, each with num_cpus and num_gpus

    def require_equal_shares(self, stage: str, section: str, batch: int) -> None:
        """Raises ValueError if the workers cannot share a batch equally."""
        if batch % self.workers:
            raise ValueError(
                f"expected {section}.batch to be a multiple of resources.{stage}.workers, {self.workers}, found {batch}"
            )


class FinetuneResources(TrainResources):
    """Of `finetune`."""

    # share of a set's images with which a finetuning on its latents begins, while others are still being quantized
    start_at: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if self.start_at < 1 and self.workers > 1:
            raise ValueError(
                f"expected start_at: 1 where several workers share a finetuning, found start_at: {self.start_at:g} and "
                f"workers: {self.workers}: they would wait for each other's images"
            )
        return self


class AllResources(Section):
    """A section per stage."""

    ingest: Resources = Resources()
    train: TrainResources = TrainResources()
    tables: Resources = Resources()
    tune: Resources = Resources()
    quantize: QuantizeResources = QuantizeResources()
    finetune: FinetuneResources = FinetuneResources()
    evaluate: Resources = Resources()
    report: Resources = Resources()
