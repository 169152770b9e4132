"""The experiment file: one YAML document, checked whole before anything runs.

It expands to λ × quantizer × arm × seed instances (see `jobs.graph`). Paths in the file are relative to the file;
in ``--set`` they are relative to the current folder. What only says how to execute lives in `resources` and
enters no key.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from jobs.arms import Arm, controlled, ordered
from jobs.fields import MANY, ONE, Channels, Metric, Name, Section, Seed, as_list, distinct
from jobs.quantizer_section import QuantizerSection
from jobs.resources import AllResources
from pipeline import shipped


class ExperimentError(ValueError):
    """The experiment file or a ``--set`` is wrong; the message names file, key and expectation."""


class Images(Section):
    """Folders of PNG, JPEG, WebP or TIFF files, searched recursively; a plain path or list of paths will do."""

    folders: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0  # Lanczos, before anything else sees the pixels
    limit: PositiveInt | None = None  # the first files in the order of their names
    max_pixels: PositiveInt = 1 << 27  # a file that would decode to more is skipped, with its reason


def _as_images(value: object) -> object:
    return {"folders": value} if isinstance(value, str | list) else value


ImagesField = Annotated[Images, BeforeValidator(_as_images)]


class Start(Section):
    """A codec that exists: a checkpoint file, a digest in the workspace, or one that comes with the project.

    A training goes on from one of its own N and M.
    """

    file: str | None = None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    quality: int | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.file, self.digest, self.quality].count(None) != 2:
            raise ValueError("expected exactly one of `file`, `digest` and `quality`")
        if self.quality is not None:
            shipped.path(self.quality)  # raises where there is no such quality
        return self

    @property
    def known_lmbda(self) -> float | None:
        """Its λ, where the project knows it."""
        return None if self.quality is None else shipped.SHIPPED[self.quality].lmbda

    @property
    def source(self) -> tuple[str | None, str | None, str | None]:
        """File and digest, of which one is None; and the file's digest where the project knows it."""
        if self.quality is None:
            return self.file, self.digest, None
        return str(shipped.path(self.quality)), None, shipped.SHIPPED[self.quality].packed


def _as_file(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


class Train(Section):
    """The base codec, one per λ. Loss: bits per pixel + λ · 255² · MSE."""

    images: ImagesField
    held_out: ImagesField | None = None  # whose loss is measured now and then; it decides nothing
    architecture: Literal["mean-scale-hyperprior"] = "mean-scale-hyperprior"
    N: Channels = 64
    M: Channels = 96
    lmbda: Annotated[
        list[PositiveFloat], BeforeValidator(as_list), Field(min_length=1), AfterValidator(distinct)
    ] = [0.013]
    # In place of random weights, for the first λ.
    start: Annotated[Start | None, BeforeValidator(_as_file)] = None
    ladder: bool = True  # each later λ starts from its nearest neighbour before it in the list
    ladder_steps: PositiveInt | None = None  # of those; None: a third of `steps`
    steps: PositiveInt = 60_000
    batch: PositiveInt = 8
    crop: Annotated[int, Field(ge=64, multiple_of=64)] = 256  # pixels; smaller images are reflect-padded
    # how g_a and g_s begin without a codec to start from
    initialise: Literal["transform", "random"] = "transform"
    optimizer: Literal["muon", "adam"] = "adam"  # of the filters; all else is trained by Adam
    learning_rate: PositiveFloat = 1e-3
    transform_rate: PositiveFloat = 0.3  # of it, for g_a and g_s, which start close to where they should be
    # steps of linear rise, then a cosine down to a hundredth of the peak
    warmup: Annotated[int, Field(ge=0)] = 200
    clip: PositiveFloat = 1.0  # largest norm of the gradient
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["float32", "bfloat16"] = "float32"  # of the finished codec, rounded before it is used
    seed: Seed = 0


class ForeignCodec(Start):
    """A codec to quantize and finetune; a file may also be CompressAI's .pth."""

    lmbda: PositiveFloat | None = None  # that it was trained for

    @model_validator(mode="after")
    def _has_lmbda(self) -> Self:
        if self.lmbda is None and self.quality is None:
            raise ValueError("expected the `lmbda` that this codec was trained for")
        return self

    @property
    def trained_lmbda(self) -> float:
        """The λ given, or that of the quality."""
        if self.lmbda is None:
            assert self.quality is not None
            return shipped.SHIPPED[self.quality].lmbda
        return self.lmbda


class Latents(Section):
    """The images whose quantized latents are kept; by default those of `train`."""

    images: ImagesField | None = None


class Tune(Section):
    """On what quantizers with `tune: true` are tuned: training-side images, a crop from the middle of each."""

    images: ImagesField | None = None  # by default those of `train`, else those of `latents`
    count: Annotated[int, Field(ge=2)] = 24  # so many of them, evenly by digest
    crop: Annotated[int, Field(ge=64, multiple_of=64)] = 512  # pixels a side, at most
    refine: bool = True  # also the tables, by counts and centroids


def _compared(metrics: list[Metric]) -> list[Metric]:
    if "psnr" not in metrics:
        raise ValueError("expected `psnr` among them, by which the report compares")
    return metrics


class Evaluate(Section):
    """The test set and what is measured on it."""

    images: ImagesField
    metrics: Annotated[list[Metric], AfterValidator(distinct), AfterValidator(_compared)] = [
        "psnr",
        "ms_ssim",
    ]
    rate: Literal["bitstream", "tables"] = "bitstream"  # sizes of real files, or ideal code lengths


def _rate_and_quality(point: list[float]) -> list[float]:
    if len(point) != 2 or point[0] <= 0:
        raise ValueError("expected [bpp, PSNR in dB], with a rate above 0")
    return point


class Report(Section):
    """What the report shows beside the arms: curves from elsewhere, by name."""

    references: dict[str, list[Annotated[list[float], AfterValidator(_rate_and_quality)]]] = {}


class Experiment(Section):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    train: Train | None = None
    codec: Annotated[list[ForeignCodec], BeforeValidator(lambda v: [v] if isinstance(v, dict) else v)] = []
    latents: Latents = Latents()
    tune: Tune = Tune()
    quantizers: Annotated[dict[Name, QuantizerSection], Field(min_length=1)]
    arms: Annotated[dict[Name, Arm], Field(min_length=1), AfterValidator(ordered), AfterValidator(controlled)]
    seeds: Annotated[list[Seed], BeforeValidator(as_list), Field(min_length=1), AfterValidator(distinct)] = [
        0
    ]
    evaluate: Evaluate
    report: Report = Report()
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
        if self.tuning_images is None and self.tunes:
            raise ValueError("`tune.images` is needed where there are no images of `train` or `latents`")
        if any(arm.retune for arm in self.arms.values()):
            for quantizer in self.quantizers.values():
                quantizer.require_tunable("retune")
        if self.train:
            self.resources.train.require_equal_shares("train", "train", self.train.batch)
        for name, arm in self.arms.items():
            if arm.parts != "none":
                self.resources.finetune.require_equal_shares("finetune", f"arms.{name}", arm.batch)
        if len(set(self.lmbdas)) != len(self.lmbdas):
            raise ValueError(f"`codec` holds two codecs of one λ, found {self.lmbdas}")
        for name, quantizer in self.quantizers.items():
            weights = quantizer.lmbda_q
            if isinstance(weights, dict) and (missing := set(self.lmbdas) - weights.keys()):
                raise ValueError(
                    f"`quantizers.{name}.lmbda_q`: expected a weight for each λ of the codecs, found none for "
                    f"{', '.join(map(str, sorted(missing)))}"
                )
        return self

    @property
    def lmbdas(self) -> list[float]:
        """The λ axis: those to train, or those of the given codecs."""
        return list(self.train.lmbda) if self.train else [codec.trained_lmbda for codec in self.codec]

    @property
    def tunes(self) -> bool:
        """Whether some quantizer is tuned."""
        return any(q.tune for q in self.quantizers.values()) or any(a.retune for a in self.arms.values())

    @property
    def latent_images(self) -> Images | None:
        return self.latents.images or (self.train.images if self.train else None)

    @property
    def tuning_images(self) -> Images | None:
        """Those of the codec's training before those of the latents: more latents are no reason to tune again."""
        return self.tune.images or (self.train.images if self.train else self.latents.images)


IMAGE_KEYS = (
    ("train", "held_out"),
    *((section, "images") for section in ("train", "latents", "tune", "evaluate")),
)
PATH_KEYS = (*IMAGE_KEYS, ("train", "start"))


def load(path: str, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment file, apply ``key.path=value`` overrides (YAML 1.2 values) and check the result.

    Raises:
        ExperimentError: names the file, each wrong key, what was found and what was expected.
    """
    file = Path(path)
    try:
        document = _parse(file.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ExperimentError(
            f"{path}: expected text in UTF-8, found other bytes ({error}); save the file as UTF-8"
        ) from error
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
    except (YAMLError, ValueError) as error:  # ValueError: a date that there is not, for instance
        raise ExperimentError(f"{where}: not a YAML document: {error}") from error


def _describe(item: dict[str, Any]) -> str:
    """One pydantic error in our words: key, expectation, finding."""
    location = item["loc"][:-2] if item["loc"][-1:] == ("[key]",) else item["loc"]
    location = tuple(part for part in location if part not in (ONE, MANY))
    key = ".".join(str(part) for part in location) or "the file"
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
        if isinstance(codec, dict):
            codec.update(_anchored(codec, base))


def _anchored(value: Any, base: Path) -> Any:
    if isinstance(value, str):
        try:
            return str((base / Path(value).expanduser()).resolve())
        except (RuntimeError, ValueError) as error:  # a user that there is not, a NUL
            raise ExperimentError(f"{value!r}: expected a path ({error})") from error
    if isinstance(value, list):
        return [_anchored(item, base) for item in value]
    if isinstance(value, dict):
        return value | {key: _anchored(value[key], base) for key in ("folders", "file") if key in value}
    return value


def _override(document: dict[str, Any], override: str) -> None:
    """Apply one ``--set a.b.c=value``; paths are relative to the current folder."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ExperimentError(f"--set {override}: expected KEY=VALUE, as in --set train.steps=2000")
    value = _parse(text, f"--set {override}")
    parts = key.split(".")
    section = document
    for depth, part in enumerate(parts[:-1], 1):
        inside = section.get(part)
        if inside is None:
            inside = section[part] = {}
        # `images: DIR` and then --set train.images.limit=5
        if isinstance(inside, str | list) and tuple(parts[:depth]) in IMAGE_KEYS:
            inside = section[part] = {"folders": inside}
        if not isinstance(inside, dict):
            raise ExperimentError(f"--set {override}: {part!r} is not a section of the file")
        section = inside
    is_path = tuple(parts) in PATH_KEYS or parts[-1] in ("folders", "file")
    section[parts[-1]] = _anchored(value, Path.cwd()) if is_path else value
