"""tune: codec × images -> tables, of the step, the weight of rate and the frequencies of the lowest J in pictures.

Reads   crops from the middle of some training-side images, and the whole codec.
Key     quantizer settings to begin with; how many images, and how large; λ; digests of the codec and the images.
Work    one Ray task of a minute or so: each image is analysed once and decoded for every try.
Commits tables as `tables` does, judged on held-out images (`pipeline.quantizers.tuning`); every try as metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jobs.local import image_digests
from jobs.stage import Node, Outcome, Output, Task
from jobs.tables import commit_tables, quantizer_settings
from storage.workspace import Workspace

Message = dict[str, Any]
LIKELY_TRIES = 15


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    count = node.settings["count"]
    if inputs:
        count = min(count, inputs["images"]["note"]["count"])
    return f"some {LIKELY_TRIES} tries on {count} images"


def compute(task: Task) -> Outcome:
    """Tune one quantizer for one codec."""
    inputs = {name: output["blob"] for name, output in task.inputs.items()}
    arguments = (task.workspace.root, dict(task.node.settings), inputs["codec"], inputs["images"])
    outcome: Message = {}
    for message in task.cluster.stream(tune_quantizer, arguments, task.share):
        if "tries" in message:
            tries = message["tries"]
            task.progress(tries, max(LIKELY_TRIES, tries + 1), f"tries, J {message['J']:.4f}")
        outcome = message
    return Outcome(outcome["outputs"], outcome["summary"])


def evenly(digests: list[str], count: int) -> list[str]:
    """At most `count` images, spread evenly over all in the order of their digests, which says nothing of content."""
    count = min(count, len(digests))
    return [digests[i * len(digests) // count] for i in range(count)]


def tune_quantizer(root: str, settings: dict[str, Any], codec_blob: str, manifest: str) -> Iterator[Message]:
    """Runs in a worker: a message a try, then the outcome."""
    from pipeline.codec.artifact import Codec
    from pipeline.judging import centre_crop, sample
    from pipeline.quantizers.tuning import tune
    from storage.images import ImageStore

    workspace = Workspace.open(root)
    codec, store = Codec.from_bytes(workspace.blobs.get(codec_blob)), ImageStore(workspace)
    samples = [
        sample(codec, centre_crop(store.read(name), settings["crop"], codec.stride))
        for name in evenly(image_digests(workspace, manifest), settings["count"])
    ]
    start = quantizer_settings(settings["quantizer"])
    tuning = tune(start, samples, settings["lmbda"], refining=settings["refine"])
    rows: list[dict[str, Any]] = []
    while True:
        try:
            tried = next(tuning)
        except StopIteration as end:
            yield _outcome(workspace, end.value, rows)
            return
        rows.append({"step": len(rows) + 1, **_chosen(tried.settings), **_measures(tried.measured)})
        yield {"tries": len(rows), "J": min(row["J"] for row in rows)}


def _outcome(workspace: Workspace, tuned: Any, rows: list[dict[str, Any]]) -> Message:
    chosen = _chosen(tuned.tables.settings)
    held_out = {name: _measures(measured) for name, measured in tuned.held_out.items()}
    tables = commit_tables(workspace, tuned.tables, {"kept": tuned.kept, **chosen, "held_out": held_out})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    blob = workspace.blobs.put(lines.encode(), ".jsonl")
    metrics = {"kind": "metrics", "digest": blob, "blob": blob, "note": {}}
    costs = {f"J {name}": measures["J"] for name, measures in held_out.items()}
    summary = {**chosen, "kept": tuned.kept, **costs, "kilobytes": tables["note"]["kilobytes"]}
    return {"outputs": {"tables": tables, "metrics": metrics}, "summary": summary}


def _chosen(settings: Any) -> dict[str, float]:
    """What a search varies, in words that no step of a curve bears."""
    found = {"delta": settings.step}
    found |= {"lmbda_q": settings.lmbda_q} if settings.lmbda_q else {}
    return found | ({"offset": settings.offset[0]} if settings.kind == "deadzone" else {})


def _measures(measured: Any) -> dict[str, float]:
    rounded = {"bpp": measured.bpp, "distortion": measured.distortion, "J": measured.cost}
    return {name: round(value, 6) for name, value in rounded.items()}
