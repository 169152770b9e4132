"""From an experiment to stage instances: the nodes of its graph, inputs before those that read them.

λ × quantizer × arm × seed expands to

    ingest ──► train[λ] ──────────────┬──► quantize[λ, quantizer] ──► finetune[λ, quantizer, arm, seed]
      └──────────────────────────────┼──────────┘                        │
    tables[quantizer] ───────────────┴──► evaluate[λ, quantizer, arm, seed] ──► report

Where a quantizer is tuned, tune[λ, quantizer], which reads codec and images, stands in place of tables[quantizer];
where it has a weight of rate for each λ, tables[λ, quantizer]. Of several λ each later one's training also reads the
codec of a neighbour. An arm `after` another reads that arm's codec, with latents, and where it says so a tuned
quantizer, of its own; arms that train with effort have latents of their own, too. The base arm has no seed and no
finetuning: `evaluate` takes the trained codec. Nothing here imports torch or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jobs import ingest
from jobs.arms import Arm, recipe, trained_on
from jobs.experiment import Experiment, ExperimentError, Images, Train
from jobs.fields import Section
from jobs.quantize import EFFORT_VERSION
from jobs.quantizer_section import QuantizerSection
from jobs.stage import Input, Node
from storage.keys import digest, sha256

# Settings added after a stage's first version, with the default they had then: left out of the key at that value,
# so that older results stay valid.
LATER_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "tables": {"context": "quantizer", "offset": None, "tune": False},
    "train": {"weights": "float32", "optimizer": "adam", "initialise": "random", "transform_rate": 1.0},
    "finetune": {"optimizer": "adam"},
}

# What of the section `train` decides how the trainings depend on each other, not what one of them computes.
SETTINGS_OF_NO_TRAINING = frozenset({"images", "held_out", "lmbda", "start", "ladder", "ladder_steps"})


# What of a quantizer concerns the encoder's search for latents, and no tables.
ENCODER_SETTINGS = frozenset({"effort"})


def expand(experiment: Experiment, rehash: bool = False) -> list[Node]:
    """All stage instances of an experiment, inputs before those that read them.

    Args:
        rehash: know files by their content instead of size and time.

    Raises:
        ingest.EmptyFolder: a folder is missing or holds no file that could be an image.
    """
    nodes: dict[str, Node] = {}

    def add(node: Node) -> Node:
        return nodes.setdefault(node.id, node)

    sets = _image_nodes(experiment, rehash, add)
    scores = []
    for codec in _codec_nodes(experiment, sets, add):
        for quantizer in experiment.quantizers:
            scores += _arm_nodes(experiment, codec, quantizer, sets, add)
    add(_report_node(experiment, scores, sets["evaluate"]))
    return list(nodes.values())


def _settings(stage: str, section: Section, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A section as it enters a key: whole, less what was added later and stands at its first default."""
    later = LATER_SETTINGS.get(stage, {})
    return {
        name: value
        for name, value in section.model_dump(mode="json").items()
        if name not in leave_out and not (name in later and later[name] == value)
    }


def _image_nodes(experiment: Experiment, rehash: bool, add: Callable[[Node], Node]) -> dict[str, Node]:
    """The ingest node of each use of images; uses of the same images share one."""
    train = experiment.train
    uses = {"train": train.images if train else None, "held_out": train.held_out if train else None}
    uses |= {"latents": experiment.latent_images, "evaluate": experiment.evaluate.images}
    if experiment.tunes:
        uses["tune"] = experiment.tuning_images
    by_images: dict[str, Node] = {}
    found = {}
    for use, images in uses.items():
        if images is not None:
            same = images.model_dump_json()
            found[use] = by_images[same] = by_images.get(same) or add(_ingest_node(use, images, rehash))
    return found


def _ingest_node(use: str, images: Images, rehash: bool) -> Node:
    files = ingest.list_files(images, rehash)
    settings = {"scale": images.scale, "max_pixels": images.max_pixels, "files": ingest.listing_digest(files)}
    return Node("ingest", {"images": use}, settings, {}, {"files": files})


def _codec_nodes(experiment: Experiment, sets: Mapping[str, Node], add: Callable[[Node], Node]) -> list[Node]:
    if experiment.train is None:
        return [add(import_node(c.trained_lmbda, *c.source)) for c in experiment.codec]
    return _train_nodes(experiment.train, sets, add)


def _train_nodes(train: Train, sets: Mapping[str, Node], add: Callable[[Node], Node]) -> list[Node]:
    """The ladder: the first λ starts from nothing or `start`, each later one from its nearest neighbour before it.

    So a λ added at the end of the list leaves the others as they are.
    """
    settings = _settings("train", train, SETTINGS_OF_NO_TRAINING)
    images = {"images": Input(sets["train"].id, "images")}
    if "held_out" in sets:
        images["held_out"] = Input(sets["held_out"].id, "images", keyed=False)
    ladder_steps = train.ladder_steps or math.ceil(train.steps / 3)
    first = train.lmbda[0]
    start = add(import_node(first, *train.start.source)) if train.start else None
    nodes: dict[float, Node] = {}
    for lmbda in train.lmbda:
        own: dict[str, Any] = {"lmbda": lmbda}
        inputs = dict(images)
        if start and (lmbda == first or not train.ladder):
            assert train.start
            inputs["start"] = Input(start.id, "codec")
            if (known := train.start.known_lmbda) not in (None, lmbda):
                own["start_lmbda"] = known
        elif nodes and train.ladder:
            nearest = min(nodes, key=lambda there: abs(math.log(there / lmbda)))
            inputs["start"] = Input(nodes[nearest].id, "codec")
            own |= {"steps": ladder_steps, "start_lmbda": nearest}
        node_settings = settings | own
        if "start" in inputs:
            node_settings.pop("initialise", None)  # of random weights alone
        nodes[lmbda] = add(Node("train", {"lmbda": lmbda}, node_settings, inputs))
    return list(nodes.values())


def import_node(
    lmbda: float, file: str | None, codec_digest: str | None, expected: str | None = None
) -> Node:
    """A codec that exists. Its key is the digest of the file (or of the codec in this workspace).

    Raises:
        ExperimentError: no such file, or another one than the digest `expected` says.
    """
    source = _checkpoint_digest(file) if file else codec_digest
    if expected is not None and source != expected:
        raise ExperimentError(
            f"{file}: expected the codec that comes with this release, found another: install again"
        )
    parameters = {"file": file} if file else {"digest": codec_digest}
    return Node("import", {"lmbda": lmbda}, {"source": source, "lmbda": lmbda}, {}, parameters)


def _checkpoint_digest(file: str) -> str:
    try:
        return sha256(Path(file).read_bytes())
    except OSError as error:
        raise ExperimentError(
            f"{file}: expected a codec checkpoint, found none ({error.strerror})"
        ) from error


class _Made(NamedTuple):
    """What an arm starts from or ends with; latents are None where there are none yet, or no use for them."""

    codec: Node
    tables: Node
    latents: Node | None


def _arm_nodes(
    experiment: Experiment, codec: Node, quantizer: str, sets: Mapping[str, Node], add: Callable[[Node], Node]
) -> list[Node]:
    """The evaluations of a codec and a quantizer, of every arm and seed; what they read is added before them."""
    common = {"lmbda": codec.axes["lmbda"], "quantizer": quantizer}
    given = experiment.quantizers[quantizer]
    section = given.at(common["lmbda"])

    def quantized(axes: dict[str, Any], codec: Node, tables: Node, effort: int) -> Node | None:
        if "latents" not in sets:
            return None
        node = _quantize_node(axes, _effort(axes, effort), codec, tables, sets["latents"])
        return add(replace(node, parameters={"in_order": experiment.resources.finetune.start_at < 1}))

    def tuned(axes: dict[str, Any], codec: Node) -> Node:
        return add(_tune_node(axes, experiment, section, codec, sets["tune"]))

    own_axes = {"quantizer": quantizer} if section is given else common  # codecs share what no λ decides
    tables = tuned(common, codec) if section.tune else add(_tables_node(own_axes, section))
    base = _Made(codec, tables, quantized(common, codec, tables, section.effort))
    made: dict[tuple[str, int | None], _Made] = {}
    scores = []
    for name, arm in experiment.arms.items():
        for seed in [None] if arm.is_base else experiment.seeds:
            axes = common | {"arm": name} | ({} if seed is None else {"seed": seed})
            effort = arm.effort or section.effort
            end = base
            if arm.after:
                source = made[arm.after, seed]
                end = _Made(source.codec, tuned(axes, source.codec) if arm.retune else source.tables, None)
            if arm.parts != "none":
                if end.latents is None or effort != section.effort:
                    own = axes if arm.after else common | {"effort": effort}  # whichever arm of this effort
                    end = end._replace(latents=quantized(own, end.codec, end.tables, effort))
                if end.latents:
                    finetuned = _finetune_node(axes, arm, end.codec, end.tables, end.latents, sets["latents"])
                    end = end._replace(codec=add(finetuned))
            made[name, seed] = end
            scores.append(add(_evaluate_node(axes, _effort(axes, effort), experiment, end, sets["evaluate"])))
    return scores


def _tables_node(axes: dict[str, Any], section: QuantizerSection) -> Node:
    return Node("tables", axes, _settings("tables", section, ENCODER_SETTINGS), {})


def _tune_node(
    axes: dict[str, Any], experiment: Experiment, section: QuantizerSection, codec: Node, images: Node
) -> Node:
    """Its output is like that of `tables`. It reads the whole codec: pictures decide, so the decoder does."""
    inputs = {"codec": Input(codec.id, "codec"), "images": Input(images.id, "images")}
    quantizer = _settings("tables", section, ENCODER_SETTINGS | {"tune", "centroids"})
    how = _settings("tune", experiment.tune, frozenset({"images"}))
    alone = {"alone": "step"} if section.tune == "step" else {}
    return Node("tune", axes, {"quantizer": quantizer, **how, **alone, "lmbda": axes["lmbda"]}, inputs)


def _effort(axes: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What an encoder needs to know to make an effort; nothing where it makes none."""
    if not steps:
        return {}
    return {"effort": steps, "effort_version": EFFORT_VERSION, "lmbda": axes["lmbda"]}


def _quantize_node(
    axes: dict[str, Any], effort: dict[str, Any], codec: Node, tables: Node, images: Node
) -> Node:
    """Grid, rate and tables decide the indices; without effort the decoder does not, and enters no key here."""
    inputs = {
        "codec": Input(codec.id, "codec", keyed=bool(effort)),
        "grid": Input(codec.id, "codec", "grid"),
        "rate": Input(codec.id, "codec", "rate"),
        "tables": Input(tables.id, "tables"),
        "images": Input(images.id, "images"),
    }
    return Node("quantize", axes, effort, inputs)


def _finetune_node(
    axes: dict[str, Any], arm: Arm, codec: Node, tables: Node, latents: Node, images: Node
) -> Node:
    inputs = {
        "codec": Input(codec.id, "codec"),
        "tables": Input(tables.id, "tables"),
        "latents": Input(latents.id, "latents"),
        "images": Input(images.id, "images", keyed=False),  # the latents' digest names the images too
    }
    settings = _settings("finetune", arm, frozenset({"after", "retune", "effort"})) | {
        "lmbda": axes["lmbda"],
        "seed": axes["seed"],
    }
    return Node("finetune", axes, settings, inputs)


def _evaluate_node(
    axes: dict[str, Any], effort: dict[str, Any], experiment: Experiment, made: _Made, images: Node
) -> Node:
    inputs = {
        "codec": Input(made.codec.id, "codec"),
        "tables": Input(made.tables.id, "tables"),
        "images": Input(images.id, "images"),
    }
    settings = {"metrics": sorted(experiment.evaluate.metrics), "rate": experiment.evaluate.rate}
    return Node("evaluate", axes, settings | effort, inputs)


def _report_node(experiment: Experiment, scores: list[Node], images: Node) -> Node:
    """Reads all scores; the codecs and tables behind them serve the crops."""
    inputs = {node.id: Input(node.id, "scores") for node in scores}
    inputs["images"] = Input(images.id, "images")
    arms = {name: _arm_of_report(experiment.arms, name) for name in experiment.arms}
    axes = {node.id: dict(node.axes) for node in scores}
    settings = {"title": experiment.name, "arms": arms, "scores": axes}
    if experiment.report.references:
        settings["references"] = experiment.report.model_dump(mode="json")["references"]
    return Node("report", {"experiment": experiment.name}, settings, inputs)


def _arm_of_report(arms: Mapping[str, Arm], name: str) -> dict[str, Any]:
    """What the report says of an arm; only arms of one recipe are compared with each other."""
    arm = arms[name]
    parts: str = arm.parts
    if parts == "none" and (arm.after or arm.effort):
        parts = "tables" if arm.retune else "effort"
    return {"parts": parts, "latents": trained_on(arms, name), "recipe": digest(recipe(arms, name))}
