"""quantize: codec × tables × images -> latent set.

Reads   whole images, in float32.
Key     of the set: grid and rate digests of the codec, and the tables; with effort also its steps, λ and the whole
        codec, whose decoder then decides too. Of the result also the image set.
Work    one Ray task per bucket of images; only images that no recorded part holds. A bucket that fails is tried
        again image by image; the one at fault is given up, with its reason, and the rest goes on.
Commits immutable parts, each by its record; then the digest of the latents of just these images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.cluster import TaskFailed
from jobs.loaded import loaded_codec, loaded_images, loaded_tables
from jobs.local import image_digests
from jobs.resources import QuantizeResources
from jobs.stage import Node, Outcome, Output, Task
from storage.buckets import binary, buckets
from storage.claims import Claims
from storage.digests import Digests
from storage.errors import StorageError
from storage.keys import digest
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage
from storage.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.refinement import Refinement

IMAGES_PER_BUCKET = 32  # at most, on average
MOST_BITS = 18  # of a bucket: of more than 8 million images parts grow larger, not more
SET_VERSION = 3  # bumped when the same ingredients give other indices, or parts have another layout
POLL_S = 2.0  # while another run is at work
EFFORT_VERSION = 3  # the same of those that effort gives


def set_key(inputs: Mapping[str, Output], settings: Mapping[str, Any]) -> str:
    """What names a latent set: all that decides an image's indices, and no list of images."""
    note = inputs["codec"]["note"]
    ingredients = {
        "version": SET_VERSION,
        "grid": note["grid"],
        "rate": note["rate"],
        "tables": inputs["tables"]["digest"],
    }
    if settings:
        ingredients |= {**settings, "codec": inputs["codec"]["digest"]}
    return digest(ingredients)


def amount(node: Node, inputs: dict[str, Output] | None, workspace: Workspace) -> str:
    """What `plan` says of it."""
    if inputs is None:
        return "all images"
    digests = image_digests(workspace, inputs["images"]["blob"])
    latents = LatentSet(workspace, set_key(inputs, node.settings))
    missing = _possible(latents, latents.missing(digests))
    return f"{len(missing)} of {len(digests)} images"


class Part(NamedTuple):
    """What one task quantizes: images of a bucket, under a claim to the digests with this binary prefix."""

    prefix: str
    images: Digests


def compute(task: Task) -> Outcome:
    """Quantize what the set lacks, less the images that were given up before."""
    latents = LatentSet(task.workspace, set_key(task.inputs, task.node.settings))
    digests = image_digests(task.workspace, task.inputs["images"]["blob"])
    absent = latents.missing(digests)
    missing = _possible(latents, absent)
    there = len(digests) - len(absent)
    total = there + len(missing)
    task.progress(there, total, "images")
    if missing:
        bits = math.ceil(math.log2(max(1, len(digests)) / IMAGES_PER_BUCKET))
        parts = [
            Part(prefix, images) for prefix, images in buckets(missing, min(max(bits, 1), MOST_BITS)).items()
        ]
        if not task.node.parameters.get("in_order"):
            parts.sort(key=lambda part: -len(part.images))  # so that workers end at about the same time
        failed = _quantize(task, latents, parts, total)
        # which image of a part it was shows when each is a part of its own
        alone = [Part(binary(name), Digests.of([name])) for part, _ in failed for name in part.images]
        if alone:
            failed = _quantize(task, latents, alone, total)
            if len(latents.missing(digests)) == len(digests):
                raise failed[0][1].as_one_of(f"all of {len(missing)} images failed")
            for part, failure in failed:
                (name,) = part.images
                latents.give_up(name, str(failure))
                task.say(_farewell(task, latents, name, failure))
    return _outcome(latents, digests, len(missing) - len(latents.missing(missing)))


def _possible(latents: LatentSet, absent: Digests) -> Digests:
    """What the set lacks, less the images that were given up before."""
    given_up = latents.given_up()
    return Digests.of(name for name in absent if name not in given_up) if given_up else absent


def _quantize(task: Task, latents: LatentSet, parts: list[Part], total: int) -> list[tuple[Part, TaskFailed]]:
    """One task a part, none for a part that another run has made meanwhile; the failed parts.

    Raises:
        TaskFailed: the store failed, a node, or its memory, which is no image's fault; or more parts than images may.
    """
    codec, tables = task.inputs["codec"]["blob"], task.inputs["tables"]["blob"]
    assert isinstance(task.resources, QuantizeResources)
    settings, limit = dict(task.node.settings), task.resources.max_failures
    done, failed, told = total - _count(parts), [], False
    while parts:
        claimed: list[Part] = []  # by another run
        items = [(task.workspace.root, latents.key, part, codec, tables, settings) for part in parts]
        for (_, _, part, *_), result in task.cluster.attempt(quantize_part, items, task.share):
            if result is True:
                done += len(part.images)
                task.progress(done, total, "images")
            elif result is False:
                claimed.append(part)
            elif not result.blames_input or isinstance(result.cause, (StorageError, OSError)):
                raise result
            else:
                failed.append((part, result))
                if len(failed) > limit:
                    raise result.as_one_of(
                        f"more than {limit} images failed (resources.quantize.max_failures)"
                    )
        parts = [part for part in claimed if latents.missing(part.images, part.prefix)]
        done += _count(claimed) - _count(parts)
        task.progress(done, total, "images")
        if parts:
            if not told:
                task.say(
                    f"another run is at work on {_count(parts)} of these images: waiting for what it makes"
                )
            told = True
            time.sleep(POLL_S)
    return failed


def _count(parts: list[Part]) -> int:
    return sum(len(part.images) for part in parts)


def _farewell(task: Task, latents: LatentSet, name: str, failure: TaskFailed) -> str:
    records = [f"latents/{latents.key}/failed/{name}", f"results/quantize/{task.key}"]
    reason, result = (task.workspace.path(f"records/{record}.json") for record in records)
    return (
        f"gave up image {name[:12]}: {failure}. The rest goes on without it. The reason is kept in {reason}: to have "
        f"the image tried again, move that file away, and {result}"
    )


def quantize_part(
    root: str, key: str, part: Part, codec_blob: str, tables_blob: str, settings: Mapping[str, Any]
) -> bool:
    """Runs in a worker: quantize the images of a part that are still missing. False where another run is at it."""
    workspace = Workspace(root)
    latents = LatentSet(workspace, key)
    with Claims(workspace, f"claims/{key}").hold(part.prefix) as held:
        if held and (missing := latents.missing(part.images, part.prefix)):
            images = _quantized(root, missing, codec_blob, tables_blob, settings)
            latents.write_part(part.prefix, images)
    return held


def _quantized(
    root: str, digests: Sequence[str], codec_blob: str, tables_blob: str, settings: Mapping[str, Any]
) -> list[PartImage]:
    from pipeline.coding import code

    codec, tables = loaded_codec(root, codec_blob), loaded_tables(root, tables_blob)
    store = loaded_images(root)
    images = []
    for name in digests:
        pixels = store.read(name)
        coded = code(codec, tables, pixels, refinement(settings))
        height, width, _ = pixels.shape
        images.append(
            PartImage(
                name,
                height,
                width,
                coded.indices,
                coded.hyper_indices,
                bits_y=coded.bits_y,
                bits_z=coded.bits_z,
                squared_error=coded.squared_error,
            )
        )
    return images


def refinement(settings: Mapping[str, Any]) -> Refinement | None:
    """The effort that a node's settings ask for."""
    from pipeline.refinement import Refinement

    return Refinement(settings["effort"], settings["lmbda"]) if "effort" in settings else None


def _outcome(latents: LatentSet, digests: Digests, computed: int) -> Outcome:
    """What is there of these images; those given up are named, so that whoever reads the set leaves them out, too."""
    table = latents.compact()
    found = table.find(digests)
    whole = digests.where(found >= 0)
    if not whole:
        raise LatentError(
            f"expected latents of {len(digests)} images, found all given up before: "
            f"`retrellis latents show {latents.key[:8]}` says why"
        )
    rows = found[found >= 0]
    bits = table.total("bits_y", rows) + table.total("bits_z", rows)
    mse = table.total("squared_error", rows) / table.total("samples", rows)
    note: dict[str, Any] = {
        "set": latents.key,
        "images": len(whole),
        "bpp": round(bits / table.total("pixels", rows), 6),
        "latent_mse": round(mse, 8),
    }
    summary = {"images": len(whole), "quantized_now": computed, "bpp": note["bpp"]}
    if failed := list(digests.where(found < 0).distinct()):
        if withdrawn := sorted(set(failed) - latents.given_up().keys()):
            raise LatentError(
                f"expected the latents of {len(digests)} images, {len(withdrawn)} are missing, such as "
                f"{withdrawn[0]}: their parts were withdrawn meanwhile. Run again: only these are computed"
            )
        note["given_up"] = failed
        summary["given_up"] = len(failed)
    return Outcome(
        {"latents": {"kind": "latents", "digest": latents.content_digest(whole), "note": note}}, summary
    )


def quantized(digests: Digests, latents: Output) -> Digests:
    """Those of an image set's digests that its latents hold: all but the ones given up."""
    given_up = set(latents["note"].get("given_up", ()))
    return Digests.of(name for name in digests if name not in given_up) if given_up else digests
