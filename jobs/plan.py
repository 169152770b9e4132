"""From an experiment to stage instances, their keys, and what each would cost: reuse or compute, and why.

λ × quantizer × arm × seed expands to

    ingest ──► train[λ] ──────────────┬──► quantize[λ, quantizer] ──► finetune[λ, quantizer, arm, seed]
      └──────────────────────────────┼──────────┘                        │
    tables[quantizer] ───────────────┴──► evaluate[λ, quantizer, arm, seed] ──► report

Where a quantizer is tuned, tune[λ, quantizer], which reads codec and images, stands in place of tables[quantizer]. The
base arm has no seed and no finetuning: `evaluate` takes the trained codec. Nothing here imports torch or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import ingest
from jobs.experiment import Arm, Experiment, ExperimentError, Images, Train
from jobs.fields import Section
from jobs.quantize import SET_VERSION
from jobs.quantizer_section import QuantizerSection
from jobs.stage import Input, Node, Output
from storage.keys import digest, flatten, sha256

# Bumped by hand whenever a stage computes something else from the same ingredients; golden values in
# tests/test_golden.py and tests/test_training.py fail when that is forgotten.
STAGE_VERSIONS: Mapping[str, int] = {
    "ingest": 1,
    "train": 1,
    "import": 1,
    "tables": 3,
    "tune": 3,
    "quantize": SET_VERSION,  # a result must not outlive the indices that it names
    "finetune": 1,
    "evaluate": 2,
    "report": 3,
}

# Settings added after a stage's first version, with the default they had then: left out of the key at that value,
# so that older results stay valid.
LATER_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "tables": {"context": "quantizer", "offset": None, "tune": False}
}

# What of the section `train` decides how the trainings depend on each other, not what one of them computes.
SETTINGS_OF_NO_TRAINING = frozenset({"images", "held_out", "lmbda", "start", "ladder", "ladder_steps"})


@dataclass(frozen=True)
class Step:
    """A node in the light of the records: its key if its inputs are known, and what to do."""

    node: Node
    key: str | None
    ingredients: dict[str, Any] | None
    record: dict[str, Any] | None  # the finished result
    why: str

    @property
    def action(self) -> str:
        return "reuse" if self.record else "compute"


Results = Mapping[str, Mapping[str, dict[str, Any]]]  # stage -> key -> result record


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
    codecs = [
        node
        for node in map(add, _codec_nodes(experiment, sets))
        if node.stage == "train" or not experiment.train
    ]
    scores = []
    for codec in codecs:
        for quantizer, section in experiment.quantizers.items():
            common = {"lmbda": codec.axes["lmbda"], "quantizer": quantizer}
            if section.tune:
                table = add(_tune_node(common, experiment, section, codec, sets["tune"]))
            else:
                table = add(_tables_node(quantizer, section))
            latents = (
                add(_quantize_node(common, codec, table, sets["latents"])) if "latents" in sets else None
            )
            for name, arm in experiment.arms.items():
                for seed in experiment.seeds if arm.parts != "none" else [None]:
                    axes = common | {"arm": name} | ({} if seed is None else {"seed": seed})
                    source = codec
                    if arm.parts != "none" and latents:
                        source = add(_finetune_node(axes, arm, codec, table, latents, sets["latents"]))
                    scores.append(add(_evaluate_node(axes, experiment, source, table, sets["evaluate"])))
    add(_report_node(experiment, scores, sets["evaluate"]))
    return list(nodes.values())


def resolve(
    nodes: Iterable[Node], results: Results, produced: Mapping[str, dict[str, Any]] | None = None
) -> list[Step]:
    """Key each node whose inputs are known and look its result up; say why what must be computed must be.

    Args:
        nodes: as `expand` gives them.
        results: every result record, by stage and key.
        produced: records of nodes that finished in this run (by node id); they need not be in `results` yet.
    """
    done: dict[str, dict[str, Any]] = dict(produced or {})
    alike = {(record["stage"], record["key"]): record for record in done.values() if "key" in record}
    steps = []
    for node in nodes:
        waiting = [i.node for i in node.inputs.values() if i.node not in done]
        if waiting:
            steps.append(Step(node, None, None, None, f"reads {_listed(waiting)}, computed first"))
            continue
        ingredients = _ingredients(node, done)
        key = digest(ingredients)
        record = done.get(node.id) or alike.get((node.stage, key)) or results.get(node.stage, {}).get(key)
        if record:
            done[node.id] = record
        why = "" if record else explain(ingredients, results.get(node.stage, {}).values())
        steps.append(Step(node, key, ingredients, record, why))
    return steps


def input_outputs(node: Node, done: Mapping[str, dict[str, Any]]) -> dict[str, Output]:
    """The output entries that a node reads, by input name; `done` holds records by node id."""
    return {name: done[i.node]["outputs"][i.output] for name, i in node.inputs.items()}


def explain(ingredients: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> str:
    """Which ingredients differ from those of the nearest record of the same stage."""
    mine = flatten(ingredients)
    nearest: dict[str, tuple[Any, Any]] | None = None
    for record in records:
        theirs = flatten(record["ingredients"])
        absent = object()
        differing = {
            name: (theirs.get(name, absent), mine.get(name, absent))
            for name in sorted(mine.keys() | theirs.keys())
            if theirs.get(name, absent) != mine.get(name, absent)
        }
        if nearest is None or len(differing) < len(nearest):
            nearest = differing
    if nearest is None:
        return "first of its stage here"
    return "differs from the nearest record in " + ", ".join(
        f"{name} ({_short(old)} → {_short(new)})" for name, (old, new) in nearest.items()
    )


def select(nodes: list[Node], stage: str | None = None, only: Mapping[str, str] | None = None) -> list[Node]:
    """The instances of a stage whose axes agree with `only`, and everything that they read.

    Args:
        stage: None stands for the report; with `only`, for the evaluations that agree.
        only: axis names and values, such as lmbda=0.013.

    Raises:
        ValueError: nothing matches; the message lists what there is.
    """
    stage = stage or ("evaluate" if only else "report")
    of_stage = [node for node in nodes if node.stage == stage]
    if not of_stage:
        hint = "; a quantizer with `tune: true` has one" if stage == "tune" else ""
        raise ValueError(f"nothing to do: this experiment has no {stage}{hint}")
    wanted = of_stage
    for name, value in (only or {}).items():
        there = sorted({str(node.axes[name]) for node in nodes if name in node.axes})
        if not there:
            axes = ", ".join(sorted({axis for node in nodes for axis in node.axes}))
            raise ValueError(f"--only {name}={value}: expected one of the axes {axes}")
        if not any(_matches(text, value) for text in there):
            raise ValueError(f"--only {name}={value}: expected {name} to be one of {', '.join(there)}")
        wanted = [node for node in wanted if name not in node.axes or _matches(node.axes[name], value)]
    if not wanted:
        raise ValueError(f"nothing to do: of {len(of_stage)} {stage} instance(s) none agrees with --only")
    by_id = {node.id: node for node in nodes}
    kept: set[str] = set()
    pending = [node.id for node in wanted]
    while pending:
        current = pending.pop()
        if current not in kept:
            kept.add(current)
            pending += [i.node for i in by_id[current].inputs.values()]
    return [node for node in nodes if node.id in kept]


def _matches(axis: Any, text: str) -> bool:
    try:
        return float(axis) == float(text)
    except (TypeError, ValueError):
        return str(axis) == text


def _ingredients(node: Node, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    outputs = input_outputs(node, done)
    keyed = {
        name: outputs[name]["digest"] if i.part == "digest" else outputs[name]["note"][i.part]
        for name, i in node.inputs.items()
        if i.keyed
    }
    return {
        "stage": node.stage,
        "stage_version": STAGE_VERSIONS[node.stage],
        "settings": dict(node.settings),
        "inputs": keyed,
    }


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
    if any(section.tune for section in experiment.quantizers.values()):
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


def _codec_nodes(experiment: Experiment, sets: Mapping[str, Node]) -> list[Node]:
    if experiment.train is None:
        return [import_node(c.lmbda, c.file, c.digest) for c in experiment.codec]
    return _train_nodes(experiment.train, sets)


def _train_nodes(train: Train, sets: Mapping[str, Node]) -> list[Node]:
    """The ladder: the first λ starts from nothing or `start`, each later one from its nearest neighbour before it.

    So a λ added at the end of the list leaves the others as they are.
    """
    settings = _settings("train", train, SETTINGS_OF_NO_TRAINING)
    images = {"images": Input(sets["train"].id, "images")}
    if "held_out" in sets:
        images["held_out"] = Input(sets["held_out"].id, "images", keyed=False)
    ladder_steps = train.ladder_steps or math.ceil(train.steps / 3)
    first = train.lmbda[0]
    nodes: dict[float, Node] = {}
    started: list[Node] = []
    if train.start:
        started.append(import_node(first, train.start.file, train.start.digest))
    for lmbda in train.lmbda:
        own = {"lmbda": lmbda}
        inputs = dict(images)
        if started and (lmbda == first or not train.ladder):
            inputs["start"] = Input(started[0].id, "codec")
        elif nodes and train.ladder:
            nearest = min(nodes, key=lambda there: abs(math.log(there / lmbda)))
            inputs["start"] = Input(nodes[nearest].id, "codec")
            own["steps"] = ladder_steps
        nodes[lmbda] = Node("train", {"lmbda": lmbda}, settings | own, inputs)
    return [*started, *nodes.values()]


def import_node(lmbda: float, file: str | None, codec_digest: str | None) -> Node:
    """A codec that exists. Its key is the digest of the file (or of the codec in this workspace)."""
    source = _checkpoint_digest(file) if file else codec_digest
    parameters = {"file": file} if file else {"digest": codec_digest}
    return Node("import", {"lmbda": lmbda}, {"source": source, "lmbda": lmbda}, {}, parameters)


def _checkpoint_digest(file: str) -> str:
    try:
        return sha256(Path(file).read_bytes())
    except OSError as error:
        raise ExperimentError(
            f"{file}: expected a codec checkpoint, found none ({error.strerror})"
        ) from error


def _tables_node(name: str, section: QuantizerSection) -> Node:
    return Node("tables", {"quantizer": name}, _settings("tables", section), {})


def _tune_node(
    axes: dict[str, Any], experiment: Experiment, section: QuantizerSection, codec: Node, images: Node
) -> Node:
    """Its output is like that of `tables`. It reads the whole codec: pictures decide, so the decoder does."""
    inputs = {"codec": Input(codec.id, "codec"), "images": Input(images.id, "images")}
    quantizer = _settings("tables", section, frozenset({"tune", "centroids"}))
    how = _settings("tune", experiment.tune, frozenset({"images"}))
    return Node("tune", axes, {"quantizer": quantizer, **how, "lmbda": axes["lmbda"]}, inputs)


def _quantize_node(axes: dict[str, Any], codec: Node, tables: Node, images: Node) -> Node:
    """Grid, rate and tables decide the indices; the decoder does not, so it enters no key here."""
    inputs = {
        "codec": Input(codec.id, "codec", keyed=False),
        "grid": Input(codec.id, "codec", "grid"),
        "rate": Input(codec.id, "codec", "rate"),
        "tables": Input(tables.id, "tables"),
        "images": Input(images.id, "images"),
    }
    return Node("quantize", axes, {}, inputs)


def _finetune_node(
    axes: dict[str, Any], arm: Arm, codec: Node, tables: Node, latents: Node, images: Node
) -> Node:
    inputs = {
        "codec": Input(codec.id, "codec"),
        "tables": Input(tables.id, "tables"),
        "latents": Input(latents.id, "latents"),
        "images": Input(images.id, "images", keyed=False),  # the latents' digest names the images too
    }
    settings = _settings("finetune", arm) | {"lmbda": axes["lmbda"], "seed": axes["seed"]}
    return Node("finetune", axes, settings, inputs)


def _evaluate_node(
    axes: dict[str, Any], experiment: Experiment, codec: Node, tables: Node, images: Node
) -> Node:
    inputs = {
        "codec": Input(codec.id, "codec"),
        "tables": Input(tables.id, "tables"),
        "images": Input(images.id, "images"),
    }
    settings = {"metrics": sorted(experiment.evaluate.metrics), "rate": experiment.evaluate.rate}
    return Node("evaluate", axes, settings, inputs)


def _report_node(experiment: Experiment, scores: list[Node], images: Node) -> Node:
    """Reads all scores; the codecs and tables behind them serve the crops."""
    inputs = {node.id: Input(node.id, "scores") for node in scores}
    inputs["images"] = Input(images.id, "images")
    arms = {name: _arm_of_report(arm) for name, arm in experiment.arms.items()}
    axes = {node.id: dict(node.axes) for node in scores}
    settings = {"title": experiment.name, "arms": arms, "scores": axes}
    return Node("report", {"experiment": experiment.name}, settings, inputs)


def _arm_of_report(arm: Arm) -> dict[str, Any]:
    """What the report says of an arm; only arms of one recipe are compared with each other."""
    what = {"parts": arm.parts, "latents": arm.latents}
    return what | {"recipe": digest(arm.model_dump(mode="json", exclude=set(what)))}


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    return "absent" if type(value) is object else str(value)


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{unique[0]} and {len(unique) - 1} more"
