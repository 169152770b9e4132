"""finetune: codec × latent set -> codec.

Reads   latents (and, for the controls, pixels again through the encoder), copied once into node-local memmaps.
Key     the arm's settings, λ, seed; digests of the codec, the tables and the latents of just these images.
Work    one Ray task, or one on each of several workers; checkpoints under attempts/, so a killed finetuning goes on.
Commits the finetuned codec and its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.loop import Message, Place, Schedule, compiles, run_loop
from jobs.plan import STAGE_VERSIONS
from jobs.quantize import quantized
from jobs.stage import Node, Outcome, Output, Task
from jobs.train import commit_codec, follow
from storage.digests import Digests
from storage.images import ImageStore
from storage.keys import digest
from storage.latents import LatentError, LatentSet
from storage.memmap import RaggedArrays
from storage.workspace import Workspace

if TYPE_CHECKING:
    from jobs.filling import Filling, Seen
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables
    from pipeline.training.finetune import Control, FinetuneSettings
    from pipeline.training.latent_crops import Batches, LatentCrops


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    s = node.settings
    return f"{s['steps']:,} steps of {s['batch']} crops, {s['parts']} on {s['latents']} latents"


def compute(task: Task) -> Outcome:
    """Finetune one codec on one arm's latents."""
    s = task.node.settings
    early = early_key(s, task.inputs)
    place = Place(task.workspace.root, "finetune", task.key, task.attempt, early)
    schedule = Schedule(s["steps"], task.resources.log_every, task.resources.checkpoint_every)
    inputs = {name: dict(output) for name, output in task.inputs.items()}
    args = (place, schedule, dict(s), inputs, compiles(task.resources, s["steps"]))
    outcome = follow(task.cluster.stream(finetune_codec, args, task.share, task.watch), task, s["steps"])
    return replace(outcome, early_key=early)


def early_key(settings: Mapping[str, Any], inputs: Mapping[str, Output]) -> str:
    """What names a finetuning before the digest of its latents is known: all else of its key, and what decides them."""
    digests = {name: inputs[name]["digest"] for name in ("codec", "tables", "images")}
    own = {"version": STAGE_VERSIONS["finetune"], "settings": dict(settings)}
    return digest(own | digests | {"set": inputs["latents"]["note"]["set"]})


def finetune_codec(
    place: Place, schedule: Schedule, settings: dict[str, Any], inputs: dict[str, Output], compiled: bool
) -> Iterator[Message]:
    """Runs in a worker."""
    from pipeline.codec.artifact import Codec
    from pipeline.quantizers import Tables
    from pipeline.training.finetune import FinetuneSettings, FinetuneTraining
    from pipeline.training.group import Group

    workspace = Workspace(place.root)
    codec = Codec.from_bytes(workspace.blobs.get(inputs["codec"]["blob"]))
    tables = Tables.from_bytes(workspace.blobs.get(inputs["tables"]["blob"]))
    arm = FinetuneSettings(**settings)
    yield {"say": "copying pixels and latents to this node"}
    if arm.latents != "quantized":
        yield {"say": "analysing the images again: a control needs the latents before quantization"}
    crops, control, seen = _data(workspace, inputs, arm, codec, tables)
    wanted = inputs["latents"]["note"].get("latent_mse", 0.0)
    if control.mse is not None and abs(control.mse - wanted) > 0.01 * wanted:
        yield {
            "say": f"no plain rounding has the latents' MSE of {wanted:.4g}: this control has {control.mse:.4g}"
        }
    training = FinetuneTraining(
        arm, codec, tables, crops, control, compiled=compiled, group=Group.of_process()
    )
    for message in run_loop(training, schedule, place, seen=seen):
        if "metrics" not in message:
            yield message
            continue
        note = {
            "lmbda": settings["lmbda"],
            "precision": training.precision,
            "device": training.device.type,
            "rounding_step": control.rounding_step,
            "rounding_mse": control.mse,
        }
        yield commit_codec(workspace, training.result(), message["metrics"], note) | {
            "seen": seen.note(training.step)
        }


def _data(
    workspace: Workspace, inputs: dict[str, Output], arm: FinetuneSettings, codec: Codec, tables: Tables
) -> tuple[Batches, Control, Seen]:
    """The crops of an arm, and how its control simulates the quantizer (measured on these very latents)."""
    from jobs.filling import Seen
    from jobs.local import image_digests, local_analysis, local_latents, local_pixels
    from pipeline.training.finetune import FIELDS, SCALE_FIELDS, Control
    from pipeline.training.latent_crops import LatentCrops

    digests = quantized(image_digests(workspace, inputs["images"]["blob"]), inputs["latents"])
    latents = LatentSet(workspace, inputs["latents"]["note"]["set"])
    if not inputs["latents"]["digest"]:
        filling = _filling(workspace, latents, digests, arm, codec, tables)
        return filling, Control(), filling
    _require_same(latents.content_digest(digests), inputs["latents"]["digest"])
    with_scale = arm.parts == "decoder+scale"
    found: dict[str, RaggedArrays] = {}
    if arm.latents in ("quantized", "noise"):  # the others need nothing of the real ones but their MSE
        found |= local_latents(latents, digests, codec, tables, with_scale)
    if arm.latents != "quantized":
        found |= local_analysis(workspace, digests, codec)
    names = FIELDS[arm.latents] + (SCALE_FIELDS if with_scale else ())
    fields = {name: found[name] for name in names}
    crops = LatentCrops(fields, local_pixels(workspace, digests), arm.crop, arm.seed)
    control = _control(arm, found, inputs["latents"]["note"]["latent_mse"])
    return crops, control, Seen(latents, digests)


def _filling(
    workspace: Workspace,
    latents: LatentSet,
    digests: Digests,
    arm: FinetuneSettings,
    codec: Codec,
    tables: Tables,
) -> Filling:
    """The same crops of real latents, from a set that is still being filled."""
    from jobs.filling import Filling
    from jobs.local import decoded, local_latents, local_pixels
    from pipeline.training.latent_crops import LatentCrops

    with_scale = arm.parts == "decoder+scale"

    def whole(digests: Digests) -> LatentCrops:
        fields = local_latents(latents, digests, codec, tables, with_scale)
        return LatentCrops(fields, local_pixels(workspace, digests), arm.crop, arm.seed)

    return Filling(
        latents,
        digests,
        arm.batch,
        fields=lambda image: decoded(image, codec, tables, with_scale),
        pixels=ImageStore(workspace).read,
        crops=lambda fields, pixels: LatentCrops(fields, pixels, arm.crop, arm.seed),
        whole=whole,
    )


def _control(arm: FinetuneSettings, found: dict[str, RaggedArrays], mse: float) -> Control:
    """What simulates the quantizer in place of its latents; nothing for the arm itself."""
    from pipeline.training.finetune import Control, noise_widths, rounding_step, unit_widths

    if arm.latents == "uniform":
        return Control(noise_width=unit_widths())
    if arm.latents == "noise":
        errors = (a.astype("f4") - b for a, b in zip(found["reconstruction"], found["latent"], strict=True))
        return Control(noise_width=noise_widths(errors, found["sigma_index"]))
    if arm.latents == "rounded":
        residuals = (y.astype("f4") - m for y, m in zip(found["latent"], found["means"], strict=True))
        count = int(found["latent"].shapes.prod(axis=1).sum())
        step, reached = rounding_step(residuals, count, mse)
        return Control(rounding_step=step, mse=reached)
    return Control()


def _require_same(found: str, expected: str) -> None:
    """The key of this finetuning names the latents by their digest; parts can be retired and computed anew."""
    if found != expected:
        raise LatentError(
            f"expected the latents {expected[:12]} that this finetuning is keyed by, found {found[:12]}: parts of the "
            "set have been replaced. Move the record of `quantize` away and run again"
        )
