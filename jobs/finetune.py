"""finetune: codec × latent set -> codec.

Reads   latents (and, for the controls, pixels again through the encoder), copied once into node-local memmaps.
Key     the arm's settings, λ, seed; digests of the codec, the tables and the latents of just these images.
Work    one Ray task; checkpoints under attempts/, so a killed finetuning goes on.
Commits the finetuned codec and its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.loop import Message, Place, Schedule, run_loop
from jobs.stage import Node, Outcome, Output, Task
from jobs.train import commit_codec, follow
from storage.workspace import Workspace


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    s = node.settings
    return f"{s['steps']:,} steps of {s['batch']} crops, {s['parts']} on {s['latents']} latents"


def compute(task: Task) -> Outcome:
    """Finetune one codec on one arm's latents."""
    s = task.node.settings
    place = Place(task.workspace.root, "finetune", task.key, task.attempt)
    schedule = Schedule(s["steps"], task.resources.log_every, task.resources.checkpoint_every)
    args = (place, schedule, dict(s), {name: dict(output) for name, output in task.inputs.items()})
    return follow(task.cluster.stream(finetune_codec, args, task.share), task, s["steps"])


def finetune_codec(
    place: Place, schedule: Schedule, settings: dict[str, Any], inputs: dict[str, Output]
) -> Iterator[Message]:
    """Runs in a worker."""
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables
    from pipeline.training.finetune import FinetuneSettings, FinetuneTraining

    workspace = Workspace.open(place.root)
    codec = Codec.from_bytes(workspace.blobs.get(inputs["codec"]["blob"]))
    tables = Tables.from_bytes(workspace.blobs.get(inputs["tables"]["blob"]))
    yield {"say": "copying latents and pixels to this node"}
    arm = FinetuneSettings(**settings)
    crops, control = _data(workspace, inputs, arm, codec, tables)
    training = FinetuneTraining(arm, codec, tables, crops, control)
    for message in run_loop(training, schedule, place):
        if "metrics" not in message:
            yield message
            continue
        note = {
            "lmbda": settings["lmbda"],
            "precision": training.precision,
            "device": training.device.type,
            "rounding_step": control.rounding_step,
        }
        yield commit_codec(workspace, training.result(), message["metrics"], note)


def _data(
    workspace: Workspace, inputs: dict[str, Output], arm: Any, codec: Any, tables: Any
) -> tuple[Any, Any]:
    """The crops of an arm, and how its control simulates the quantizer (measured on these very latents)."""
    from jobs.local import image_digests, local_analysis, local_latents, local_pixels
    from pipeline.training.finetune import FIELDS, SCALE_FIELDS, Control, noise_widths, rounding_step
    from pipeline.training.latent_crops import LatentCrops
    from storage.latents import LatentSet

    manifest = inputs["images"]["blob"]
    digests = image_digests(workspace, manifest)
    latents = LatentSet(workspace, inputs["latents"]["note"]["set"])
    with_scale = arm.parts == "decoder+scale"
    found = local_latents(latents, digests, codec, tables, with_scale)
    control = Control()
    if arm.latents != "quantized":
        found |= local_analysis(workspace, digests, codec)
    if arm.latents == "noise":
        errors = (a.astype("f4") - b for a, b in zip(found["reconstruction"], found["latent"], strict=True))
        control = Control(noise_width=noise_widths(errors, found["sigma_index"]))
    if arm.latents == "rounded":
        residuals = (y.astype("f4") - m for y, m in zip(found["latent"], found["means"], strict=True))
        control = Control(rounding_step=rounding_step(residuals, inputs["latents"]["note"]["latent_mse"]))
    names = FIELDS[arm.latents] + (SCALE_FIELDS if with_scale else ())
    fields = {name: found[name] for name in names}
    return LatentCrops(fields, local_pixels(workspace, manifest), arm.crop, arm.seed), control
