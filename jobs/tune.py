"""tune: codec × images -> tables, of the step, the weight of rate and the frequencies of the lowest J in pictures.

Reads   crops from the middle of some training-side images, and the whole codec.
Key     quantizer settings to begin with, and whether Δ alone is searched; how many images, and how large; λ; digests of
        the codec and the images.
Work    one Ray task of minutes: each image is analysed once and decoded for every try. Once stopped it begins again.
Commits tables as `tables` does, judged on held-out images (`pipeline.quantizers.tuning`); every try as metrics.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.local import image_digests
from jobs.stage import Node, Outcome, Output, Task
from jobs.tables import commit_tables, quantizer_settings
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantizers import Settings
    from pipeline.quantizers.tuning import Measured, Try, Tuned

Message = dict[str, Any]
LIKELY_TRIES = 15


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    count = node.settings["count"]
    if inputs:
        count = min(count, inputs["images"]["note"]["count"])
    return f"some {LIKELY_TRIES} tries on {(count + 1) // 2} of {count} images"


def compute(task: Task) -> Outcome:
    """Tune one quantizer for one codec."""
    settings = dict(task.node.settings)
    images = evenly(image_digests(task.workspace, task.inputs["images"]["blob"]), settings["count"])
    if len(images) < 2:
        raise ValueError(
            f"expected at least 2 images to tune on, one to find by and one held out, found {len(images)}; "
            "name a folder with more under `tune.images`"
        )
    arguments = (task.workspace.root, settings, task.inputs["codec"]["blob"], images)
    outcome: Message = {}
    for message in task.cluster.stream(tune_quantizer, arguments, task.share):
        if "doing" in message:
            task.progress(message["done"], message["total"], message["doing"])
        else:
            outcome = message
    return Outcome(outcome["outputs"], outcome["summary"])


def evenly(digests: Sequence[str], count: int) -> list[str]:
    """At most `count` images, spread evenly over all in the order of their digests, which says nothing of content."""
    count = min(count, len(digests))
    return [digests[i * len(digests) // count] for i in range(count)]


def tune_quantizer(
    root: str, settings: dict[str, Any], codec_blob: str, images: list[str]
) -> Iterator[Message]:
    """Runs in a worker: how it stands (`done` of `total` of what it is `doing`), and at last the outcome."""
    from pipeline.codec.artifact import Codec
    from pipeline.judging import sample
    from pipeline.pixels import centre_crop
    from pipeline.quantizers.tuning import choose, search
    from storage.images import ImageStore

    workspace = Workspace(root)
    codec, store = Codec.from_bytes(workspace.blobs.get(codec_blob)), ImageStore(workspace)
    samples = []
    for done, name in enumerate(images):
        yield {"done": done, "total": len(images), "doing": "images analysed"}
        samples.append(sample(codec, centre_crop(store.read(name), settings["crop"], codec.stride)))
    start, lmbda = quantizer_settings(settings["quantizer"]), settings["lmbda"]
    rows: list[dict[str, Any]] = []
    found = yield from _tries(search(start, samples, lmbda, alone=settings.get("alone")), rows)
    yield {"done": len(rows), "total": len(rows), "doing": "tries; designs tables and judges them"}
    tuned = choose(start, found, samples, lmbda, refining=settings["refine"])
    yield _outcome(workspace, tuned, rows)


def _tries(
    search: Generator[Try, None, Settings], rows: list[dict[str, Any]]
) -> Generator[Message, None, Settings]:
    """A message a try, of which `rows` keeps the numbers; the settings found."""
    while True:
        try:
            tried = next(search)
        except StopIteration as end:
            found: Settings = end.value
            return found
        rows.append({"step": len(rows) + 1, **_chosen(tried.settings), **_measures(tried.measured)})
        lowest, total = min(row["J"] for row in rows), max(LIKELY_TRIES, len(rows) + 1)
        yield {"done": len(rows), "total": total, "doing": f"tries, J {lowest:.4f}"}


def _outcome(workspace: Workspace, tuned: Tuned, rows: list[dict[str, Any]]) -> Message:
    chosen = _chosen(tuned.tables.settings)
    held_out = {name: _measures(measured) for name, measured in tuned.held_out.items()}
    tables = commit_tables(workspace, tuned.tables, {"kept": tuned.kept, **chosen, "held_out": held_out})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    blob = workspace.blobs.put(lines.encode(), ".jsonl")
    metrics = {"kind": "metrics", "digest": blob, "blob": blob, "note": {}}
    costs = {f"J {name}": measures["J"] for name, measures in held_out.items()}
    summary = {**chosen, "kept": tuned.kept, **costs, "kilobytes": tables["note"]["kilobytes"]}
    return {"outputs": {"tables": tables, "metrics": metrics}, "summary": summary}


def _chosen(settings: Settings) -> dict[str, float]:
    """What a search varies, in words that no step of a curve bears."""
    found = {"delta": settings.step}
    found |= {"lmbda_q": settings.lmbda_q} if settings.lmbda_q else {}
    return found | ({"offset": settings.offset[0]} if settings.kind == "deadzone" else {})


def _measures(measured: Measured) -> dict[str, float]:
    rounded = {"bpp": measured.bpp, "distortion": measured.distortion, "J": measured.cost}
    return {name: round(value, 6) for name, value in rounded.items()}
