"""train: images -> codec, one per λ.

Reads   the pixels of an image set, copied once into a node-local memmap; the codec it starts from, and
        held-out images for a curve of the loss, where the file names them.
Key     the settings of `train` with one λ, and the digests of the image set and of that codec.
Work    one Ray task, or one on each of several workers; checkpoints under attempts/, so a killed training goes on.
Commits the codec (weights, integer hyper synthesis, tables of the prior) and its metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from jobs.loop import Message, Place, Schedule, compiles, run_loop
from jobs.stage import Node, Outcome, Output, Task
from storage.memmap import RaggedArrays
from storage.workspace import Workspace


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    s = node.settings
    start = f" from {node.inputs['start'].node}" if "start" in node.inputs else ""
    return f"{s['steps']:,} steps of {s['batch']} crops, {s['crop']} px{start}"


def compute(task: Task) -> Outcome:
    """Train one codec."""
    s = task.node.settings
    images = task.inputs["images"]
    if images["note"]["smallest_side"] < s["crop"]:
        task.say(f"some images are smaller than the crop of {s['crop']} px: they are reflect-padded")
    place = Place(task.workspace.root, "train", task.key, task.attempt)
    schedule = Schedule(s["steps"], task.resources.log_every, task.resources.checkpoint_every)
    blobs = {name: output["blob"] for name, output in task.inputs.items()}
    arguments = (place, schedule, dict(s), blobs, compiles(task.resources, s["steps"]))
    messages = task.cluster.stream(train_codec, arguments, task.share)
    return follow(messages, task, s["steps"])


def follow(messages: Iterator[Message], task: Task, steps: int) -> Outcome:
    """Show a training's messages; the last one holds its outcome."""
    outcome: Message = {}
    for message in messages:
        if "say" in message:
            task.say(message["say"])
        elif "step" in message:
            numbers = [
                f"{name} {message[name]:.4g}"
                for name in ("loss", "bpp", "bpp_y", "psnr_db", "held_out_loss")
                if name in message
            ]
            rate = f"{message['steps_per_s']:.2f} steps/s"
            task.progress(message["step"], steps, ", ".join(["steps", *numbers, rate]))
        outcome = message
    return Outcome(outcome["outputs"], outcome["summary"], outcome.get("seen"))


def train_codec(
    place: Place,
    schedule: Schedule,
    settings: dict[str, Any],
    blobs: dict[str, str],
    compiled: bool,
) -> Iterator[Message]:
    """Runs in a worker; `blobs` has those of the node's inputs."""
    from jobs.local import image_digests, local_pixels
    from pipeline.codec.artifact import Codec
    from pipeline.training.base import BaseSettings, BaseTraining
    from pipeline.training.group import Group

    workspace = Workspace(place.root)

    def pixels(images: str) -> RaggedArrays:
        return local_pixels(workspace, image_digests(workspace, blobs[images]))

    wanted = BaseSettings.__dataclass_fields__
    training = BaseTraining(
        BaseSettings(**{name: value for name, value in settings.items() if name in wanted}),
        pixels("images"),
        start=Codec.from_bytes(workspace.blobs.get(blobs["start"])) if "start" in blobs else None,
        start_lmbda=settings.get("start_lmbda"),
        compiled=compiled,
        group=Group.of_process(),
    )
    measure = None
    if "held_out" in blobs:
        measure = partial(training.held_out, pixels("held_out"))
    for message in run_loop(training, schedule, place, measure):
        if "metrics" not in message:
            yield message
            continue
        network = training.network.cpu().float().eval()
        codec = Codec.from_network(network, rounded=settings.get("weights") == "bfloat16")
        note = {"lmbda": settings["lmbda"], "precision": training.precision, "device": training.device.type}
        yield commit_codec(workspace, codec, message["metrics"], note)


def commit_codec(workspace: Workspace, codec: Any, metrics: str, note: dict[str, Any]) -> Message:
    """Keep a codec and its metrics; the outcome message."""
    blob = workspace.blobs.put(codec.to_bytes(), ".safetensors")
    lines = workspace.blobs.put(metrics.encode(), ".jsonl")
    digests = codec.digests()
    note = note | {"grid": digests.grid, "rate": digests.rate}
    last = json.loads(metrics.splitlines()[-1])
    return {
        "outputs": {
            "codec": {"kind": "codec", "digest": digests.codec, "blob": blob, "note": note},
            "metrics": {"kind": "metrics", "digest": lines, "blob": lines, "note": {}},
        },
        "summary": {name: round(value, 6) for name, value in last.items()},
    }
