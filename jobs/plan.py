"""Keys of an experiment's nodes, and what each would cost: reuse or compute, and why. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.quantize import SET_VERSION
from jobs.stage import Node, Output
from storage.keys import digest, flatten

# Bumped by hand whenever a stage computes something else from the same ingredients; golden values in
# tests/test_golden.py, tests/test_training.py and tests/test_finetuning.py fail when that is forgotten.
STAGE_VERSIONS: Mapping[str, int] = {
    "ingest": 1,
    "train": 1,
    "import": 1,
    "tables": 3,
    "tune": 3,
    "quantize": SET_VERSION,  # a result must not outlive the indices that it names
    "finetune": 2,
    "evaluate": 3,
    "report": 5,
}
MOST_TOLD = 4  # differences from the nearest record; those of a report can be hundreds


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


def resolve(
    nodes: Iterable[Node], results: Results, produced: Mapping[str, dict[str, Any]] | None = None
) -> list[Step]:
    """Key each node whose inputs are known and look its result up; say why what must be computed must be.

    Args:
        nodes: as `jobs.graph.expand` gives them.
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
    told = [f"{name} ({_short(old)} → {_short(new)})" for name, (old, new) in nearest.items()]
    more = [f"{len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
    return "differs from the nearest record in " + ", ".join(told[:MOST_TOLD] + more)


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
        hint = (
            "; a quantizer with `tune: true` has one, or an arm with `retune: true`"
            if stage == "tune"
            else ""
        )
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


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    return "absent" if type(value) is object else str(value)


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{unique[0]} and {len(unique) - 1} more"
