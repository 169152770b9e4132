"""The Markdown that a person reads in MLflow: what a run is, what it read, who uses what it made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.keys import flatten
from storage.lineage.graph import Experiment, Graph, Output, Result, output_id

# MLflow cuts a tag's value at 8000 characters, and a description is a tag.
LIMIT = 7900
_MOST_LINKS = 20
_MOST_SETTINGS = 12

_STAGES = {
    "ingest": "Reads image files into canonical RGB pixels and keeps each image once, losslessly.",
    "train": "Trains the networks of a codec at one λ.",
    "import": "Takes in a codec from a checkpoint written elsewhere.",
    "tables": "Designs a quantizer's tables: symbol frequencies and reconstruction points.",
    "tune": "Searches a quantizer's step and weight of rate by a codec's pictures, and refines its tables.",
    "quantize": "Analyses every image and quantizes its latents with the quantizer the codec will really use.",
    "finetune": "Trains the decoder side of a codec on quantized latents, or on a control; the encoder stays.",
    "evaluate": "Codes every test image and measures its rate and distortion.",
    "report": "Gathers scores into tables, plots and crops.",
}


@dataclass
class Places:
    """Where things are in MLflow: id -> (experiment id, run id or model id)."""

    runs: dict[str, tuple[str, str]] = field(default_factory=dict)
    models: dict[str, tuple[str, str]] = field(default_factory=dict)

    def run_link(self, result: Result) -> str:
        """A link to a result's run, or its bare name while it has none."""
        return _link(result.instance, "runs", self.runs.get(result.id))

    def model_link(self, text: str, model: str) -> str:
        """A link to a logged model's page, or the bare text while there is none."""
        return _link(text, "models", self.models.get(model))


def result_page(graph: Graph, places: Places, result: Result) -> str:
    """The description of a stage instance's run. Links come early: MLflow folds all but the first lines away."""
    lines = [_STAGES.get(result.stage, f"Runs the stage {escape(result.stage)}."), ""]
    lines += [f"**Inputs**: {_inputs(graph, places, result)}", ""]
    for output in result.outputs:
        name = places.model_link(f"{output.name} {output.digest[:12]}", output_id(result, output))
        lines += [f"**Output** {name}: {_users(graph, places, result, output)}", ""]
    return fitted([*lines, *_summary_lines(result.summary), _settings_line(result.settings)])


def model_page(graph: Graph, places: Places, result: Result, output: Output) -> str:
    """The description of a codec or latent set."""
    what = {"codec": "A codec", "latents": "A set of quantized latents, kept in the workspace"}
    lines = [f"{what[output.kind]}, made by {places.run_link(result)}.", ""]
    lines += [f"**Inputs of that run**: {_inputs(graph, places, result)}", ""]
    lines += [f"**This**: {_users(graph, places, result, output)}", ""]
    return fitted([*lines, f"Digest: `{output.digest}`"])


def reused_page(places: Places, result: Result) -> str:
    """The description of the small run that stands for a result made under another experiment's run."""
    return f"Reused, not computed again. The run that made it: {places.run_link(result)}."


def experiment_page(graph: Graph, places: Places, experiment: Experiment, borrowed: set[str]) -> str:
    """The description of an experiment's run: a table of every instance, the last stage first.

    Args:
        borrowed: ids of the results that another run shows as its own.
    """
    lines = [f"{len(experiment.instances)} stage instances, from the last stage back to the first.", ""]
    lines += [_row("instance", "", "numbers"), "|---|---|---|"]
    for instance in reversed(experiment.instances):
        result = graph.results.get(instance.result_id)
        if result is None:
            lines.append(_row(escape(instance.label), "not finished", ""))
            continue
        how = "reused" if instance.reused or instance.result_id in borrowed else "computed"
        lines.append(_row(places.run_link(result), how, _numbers(result.summary)))
    return fitted(lines)


def fitted(lines: list[str]) -> str:
    """The lines as one text within MLflow's limit; what does not fit is counted, never cut in the middle."""
    text = "\n".join(lines)
    if len(text) <= LIMIT:
        return text.rstrip("\n")
    room, kept = LIMIT - 80, []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    return "\n".join(
        [*kept, "", f"… and {len(lines) - len(kept)} more lines, left out here for want of room."]
    )


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", text)


def show(value: Any) -> str:
    """A setting or number, short."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return str(value)


def address(page: str, place: tuple[str, str]) -> str:
    """A page of MLflow's UI, relative to the server's root, so that it holds wherever the server is reached.

    Args:
        page: "runs" or "models".
    """
    # without the parameter the UI stands in its mode for traces of language models, which hides runs and models
    return f"#/experiments/{place[0]}/{page}/{place[1]}?workflowType=machine_learning"


def _link(text: str, page: str, place: tuple[str, str] | None) -> str:
    return f"[{escape(text)}]({address(page, place)})" if place else escape(text)


def _row(*cells: str) -> str:
    return "| " + " &nbsp; | ".join(cells) + " |"  # MLflow's tables have no padding


def _settings_line(settings: Mapping[str, Any]) -> str:
    flat = list(flatten(settings).items())
    shown = [f"{escape(name)} = {escape(show(value))}" for name, value in flat[:_MOST_SETTINGS]]
    if len(flat) > _MOST_SETTINGS:
        shown.append(f"and {len(flat) - _MOST_SETTINGS} more among the parameters")
    return "Settings: " + (", ".join(shown) or "none")


def _summary_lines(summary: Mapping[str, Any]) -> list[str]:
    return [f"Numbers: {_numbers(summary)}", ""] if summary else []


def _numbers(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{escape(name)} {escape(show(value))}" for name, value in summary.items())


def _inputs(graph: Graph, places: Places, result: Result) -> str:
    """One entry a maker: a codec that is read by its grid and by its rate is one codec."""
    names: dict[str, list[str]] = {}
    for read in result.inputs:
        made = graph.producer(read.digest)
        source = f"from {places.run_link(made[0])}" if made else f"`{read.digest[:12]}`, made elsewhere"
        if made and read.name == made[0].instance:  # a report calls its inputs by their makers
            names[places.run_link(made[0])] = []
        else:
            names.setdefault(source, []).append(escape(read.name))
    entries = [f"{', '.join(read)} {source}".lstrip() for source, read in names.items()]
    return "; ".join(_some(entries)) or "none, it starts from files or settings"


def _users(graph: Graph, places: Places, result: Result, output: Output) -> str:
    users = [places.run_link(user) for user in graph.consumers(result, output)]
    return "used by " + ", ".join(_some(users)) if users else "not used by another run"


def _some(entries: list[str]) -> list[str]:
    more = len(entries) - _MOST_LINKS
    return [*entries[:_MOST_LINKS], f"and {more} more"] if more > 0 else entries
