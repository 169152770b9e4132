"""The experiment file: one YAML document, checked whole before anything runs.

It expands to λ × quantizer × arm × seed instances (see `jobs.plan`). Paths in the file are relative to the file;
in ``--set`` they are relative to the current folder. What only says how to execute lives in `resources` and
enters no key.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

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


class ExperimentError(ValueError):
    """The experiment file or a ``--set`` is wrong; the message names file, key and expectation."""


class Section(BaseModel):
    """A mapping in the file: unknown keys are errors, numbers are not made from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=False)


# An integer is a fine float in YAML; strict pydantic would refuse it inside unions.
Number = Annotated[float, BeforeValidator(lambda v: float(v) if type(v) is int else v)]
Positive = Annotated[PositiveFloat, BeforeValidator(lambda v: float(v) if type(v) is int else v)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | int | float) else value


class Images(Section):
    """Folders of PNG, JPEG, WebP or TIFF files, searched recursively; a plain path or list of paths will do."""

    folders: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    scale: Annotated[Number, Field(gt=0, le=1)] = 1.0  # Lanczos, before anything else sees the pixels
    limit: PositiveInt | None = None  # the first files in the order of their names
    max_pixels: PositiveInt = 1 << 27  # a file that would decode to more is skipped, with its reason


def _as_images(value: object) -> object:
    return {"folders": value} if isinstance(value, str | list) else value


ImagesField = Annotated[Images, BeforeValidator(_as_images)]


class Train(Section):
    """The base codec, one per λ. Loss: bits per pixel + λ · 255² · MSE."""

    images: ImagesField
    architecture: Literal["mean-scale-hyperprior"] = "mean-scale-hyperprior"
    N: PositiveInt = 64
    M: PositiveInt = 96
    lmbda: Annotated[list[Positive], BeforeValidator(_as_list), Field(min_length=1)] = [0.013]
    steps: PositiveInt = 60_000
    batch: PositiveInt = 8
    crop: Annotated[int, Field(ge=64, multiple_of=64)] = 256  # pixels; smaller images are reflect-padded
    learning_rate: Positive = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 200  # steps of linear rise, then a cosine down to 0
    clip: Positive = 1.0  # largest norm of the gradient
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0


class ForeignCodec(Section):
    """A codec that exists: a checkpoint file (CompressAI's .pth or ours) or the digest of one in the workspace."""

    lmbda: Positive  # the λ that it was trained for
    file: str | None = None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ForeignCodec:
        if (self.file is None) == (self.digest is None):
            raise ValueError("expected exactly one of `file` and `digest`")
        return self


class Latents(Section):
    """The images whose quantized latents are kept; by default those of `train`."""

    images: ImagesField | None = None


class QuantizerSection(Section):
    """How latents are quantized; the tables are designed for these values (stage `tables`)."""

    kind: Literal["urq", "rdoq", "tcq"]
    trellis: Trellis | None = None
    step: Positive = 1.0  # Δ, in units of the latents
    lmbda_q: Annotated[Number, Field(ge=0)] = 0.0  # λ_q / Δ²: weight of a bit in the search
    centroids: bool = False  # decode to the centroids of the design instead of plain levels

    @model_validator(mode="after")
    def _fits(self) -> QuantizerSection:
        if (self.kind == "tcq") != (self.trellis is not None):
            raise ValueError(
                f"kind {self.kind!r} {'needs a' if self.kind == 'tcq' else 'takes no'} `trellis`"
            )
        if self.kind == "urq" and self.lmbda_q:
            raise ValueError("kind 'urq' rounds and takes no `lmbda_q`; use 'rdoq'")
        return self


class Arm(Section):
    """What is finetuned on what. An empty mapping is the base codec, as trained."""

    parts: Literal["none", "decoder", "decoder+scale"] = "none"
    latents: Literal["quantized", "noise", "rounded"] = "quantized"
    steps: PositiveInt = 5_000
    batch: PositiveInt = 8
    crop: Annotated[int, Field(ge=96, multiple_of=16)] = (
        256  # pixels, the margin of 2 latents a side included
    )
    learning_rate: Positive = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 50
    clip: Positive = 1.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Arm:
        if self.parts == "none" and self.model_fields_set - {"parts"}:
            extra = ", ".join(sorted(self.model_fields_set - {"parts"}))
            raise ValueError(f"an arm without `parts` is the base codec and takes no {extra}")
        if self.parts == "decoder+scale" and self.latents != "quantized":
            raise ValueError(
                "`parts: decoder+scale` needs `latents: quantized`: its rate is that of stored indices"
            )
        return self

    @property
    def is_control(self) -> bool:
        """Whether this arm sees simulated instead of real quantization."""
        return self.parts != "none" and self.latents != "quantized"


class Evaluate(Section):
    """The test set and what is measured on it. Rate is that of the tables which drove the search."""

    images: ImagesField
    metrics: list[Metric] = ["psnr", "ms_ssim"]
    rate: Literal["tables"] = "tables"


class Resources(Section):
    """How one stage executes; enters no key."""

    num_cpus: Positive = 1.0
    num_gpus: Annotated[Number, Field(ge=0)] = 0.0
    in_flight: PositiveInt = 64  # tasks submitted at once, at most
    log_every: PositiveInt = 20  # steps
    checkpoint_every: PositiveInt = 500  # steps


class AllResources(Section):
    ingest: Resources = Resources()
    train: Resources = Resources(num_cpus=2)
    tables: Resources = Resources()
    quantize: Resources = Resources()
    finetune: Resources = Resources(num_cpus=2)
    evaluate: Resources = Resources()
    report: Resources = Resources()


class Experiment(Section):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    train: Train | None = None
    codec: Annotated[list[ForeignCodec], BeforeValidator(lambda v: [v] if isinstance(v, dict) else v)] = []
    latents: Latents = Latents()
    quantizers: Annotated[dict[str, QuantizerSection], Field(min_length=1)]
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    seeds: Annotated[list[int], BeforeValidator(_as_list), Field(min_length=1)] = [0]
    evaluate: Evaluate
    resources: AllResources = AllResources()

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        if (self.train is None) == (not self.codec):
            raise ValueError("expected either `train` (a codec of our own) or `codec` (one that exists)")
        if (
            self.train is None
            and self.latents.images is None
            and any(a.parts != "none" for a in self.arms.values())
        ):
            raise ValueError("`latents.images` is needed where there is no `train.images` to take them from")
        for axis, values in (("train.lmbda", self.lmbdas), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{axis} holds a value twice: {values}")
        return self

    @property
    def lmbdas(self) -> list[float]:
        """The λ axis: those to train, or those of the given codecs."""
        return list(self.train.lmbda) if self.train else [codec.lmbda for codec in self.codec]

    @property
    def latent_images(self) -> Images | None:
        return self.latents.images or (self.train.images if self.train else None)


PATH_KEYS = (("train", "images"), ("latents", "images"), ("evaluate", "images"))


def load(path: str, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment file, apply ``key.path=value`` overrides (YAML 1.2 values) and check the result.

    Raises:
        ExperimentError: names the file, each wrong key, what was found and what was expected.
    """
    file = Path(path)
    try:
        document = _parse(file.read_text(), path)
    except OSError as error:
        raise ExperimentError(
            f"{path}: expected an experiment file, found none that can be read ({error.strerror})"
        ) from error
    if not isinstance(document, dict):
        raise ExperimentError(f"{path}: expected a mapping at the top, found {type(document).__name__}")
    _anchor_paths(document, file.parent)
    for override in overrides or []:
        _override(document, override)
    return check(document, path)


def check(document: dict[str, Any], where: str) -> Experiment:
    """Validate a parsed document; `where` is named in errors."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        lines = [f"{where}: {_describe(dict(item))}" for item in error.errors(include_url=False)]
        raise ExperimentError("\n".join(lines)) from None


def _parse(text: str, where: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        raise ExperimentError(f"{where}: not a YAML document: {error}") from error


def _describe(item: dict[str, Any]) -> str:
    """One pydantic error in our words: key, expectation, finding."""
    key = ".".join(str(part) for part in item["loc"]) or "the file"
    found = item["input"]
    if item["type"] == "extra_forbidden":
        section = _section(item["loc"][:-1])
        known = f"; expected one of: {', '.join(section.model_fields)}" if section else ""
        return f"{key}: unknown key{known}"
    if item["type"] == "missing":
        return f"{key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if isinstance(found, dict | BaseModel) else f" (found {found!r})")


def _section(location: tuple[Any, ...]) -> type[Section] | None:
    """The section class at a location, to list the keys it knows."""
    model: Any = Experiment
    for part in location:
        if isinstance(model, type) and issubclass(model, Section) and part in model.model_fields:
            model = model.model_fields[part].annotation
        inner = [a for a in _unwrap(model) if isinstance(a, type) and issubclass(a, Section)]
        model = inner[0] if inner else model
    return model if isinstance(model, type) and issubclass(model, Section) else None


def _unwrap(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [leaf for a in arguments for leaf in _unwrap(a)] if arguments else [annotation]


def _anchor_paths(document: dict[str, Any], base: Path) -> None:
    """Make the paths in the file absolute, relative to the file's folder."""
    for section, key in PATH_KEYS:
        inside = document.get(section)
        if isinstance(inside, dict) and key in inside:
            inside[key] = _anchored(inside[key], base)
    codecs = document.get("codec")
    for codec in codecs if isinstance(codecs, list) else [codecs]:
        if isinstance(codec, dict) and isinstance(codec.get("file"), str):
            codec["file"] = _anchored(codec["file"], base)


def _anchored(value: Any, base: Path) -> Any:
    if isinstance(value, str):
        return str((base / Path(value).expanduser()).resolve())
    if isinstance(value, list):
        return [_anchored(item, base) for item in value]
    if isinstance(value, dict) and "folders" in value:
        return value | {"folders": _anchored(value["folders"], base)}
    return value


def _override(document: dict[str, Any], override: str) -> None:
    """Apply one ``--set a.b.c=value``; paths are relative to the current folder."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ExperimentError(f"--set {override}: expected KEY=VALUE, as in --set train.steps=2000")
    value = _parse(text, f"--set {override}")
    parts = key.split(".")
    section = document
    for part in parts[:-1]:
        inside = section.setdefault(part, {})
        if (
            isinstance(inside, str | list) and part == "images"
        ):  # `images: DIR` and then --set train.images.limit=5
            inside = section[part] = {"folders": inside}
        if not isinstance(inside, dict):
            raise ExperimentError(f"--set {override}: {part!r} is not a section of the file")
        section = inside
    is_path = tuple(parts) in PATH_KEYS or parts[-1] in ("folders", "file")
    section[parts[-1]] = _anchored(value, Path.cwd()) if is_path else value
