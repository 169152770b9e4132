"""A finetuning that begins while its latents are still being quantized (`resources.finetune.start_at`).

It computes what it would have computed after: see `jobs.filling`. Its key names the latents by their digest, which
comes last; until then it works under an early key, by which its checkpoints are found again.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from jobs.cluster import Cluster, Withdrawn
from jobs.filling import Seen
from jobs.finetune import early_key
from jobs.local import image_digests
from jobs.plan import Step
from jobs.progress import Board
from jobs.quantize import quantized, set_key
from jobs.resources import AllResources
from jobs.stage import Node, Output, share
from storage.latents import LatentSet
from storage.workspace import Workspace

LOOK_EVERY_S = 1.0  # whether another one can begin
PATIENCE_S = 600.0  # without any progress of the set, or of what waits for it; a part may take minutes
WHOLE_PATIENCE_S = 3600.0  # the same once the set is whole, which is then copied

Record = dict[str, Any]
Running = Mapping[Future[Record], Step]


class EarlyStep(NamedTuple):
    """A finetuning whose latents are being quantized."""

    step: Step  # its key is the early one
    inputs: dict[str, Output]  # the latents have no digest yet
    latents: Future[Record]  # the record of what quantizes them

    def saw(self, seen: bytes | None, inputs: Mapping[str, Output], workspace: Workspace) -> bool:
        """Whether it has been trained on what its latents turned out to be."""
        digests = quantized(image_digests(workspace, inputs["images"]["blob"]), inputs["latents"])
        latents = LatentSet(workspace, self.inputs["latents"]["note"]["set"])
        return seen is not None and Seen(latents, digests).agrees(seen)


class HeadStart:
    """Which finetunings of a run begin early."""

    def __init__(
        self, resources: AllResources, board: Board, cluster: Cluster, results: Iterable[Record]
    ) -> None:
        """`results` of finetunings; what stands there is not begun, but found by its key once that is known."""
        self._resources, self._board, self._cluster = resources, board, cluster
        self._withdrawn: set[str] = set()
        self._finished = {record.get("early_key") for record in results}
        self.possible = resources.finetune.start_at < 1

    @property
    def look_every_s(self) -> float | None:
        """How often to look; None where nothing can begin early."""
        return LOOK_EVERY_S if self.possible else None

    def withdraw(self, step: Step) -> None:
        """It had begun too early, and waits for its latents now."""
        self._withdrawn.add(step.node.id)

    def steps(
        self, steps: list[Step], produced: Mapping[str, Record], running: Running, failed: Container[str]
    ) -> Iterator[EarlyStep]:
        """Those whose set has as many images as `start_at` asks for. `running` may grow meanwhile."""
        if not self.possible:
            return
        for node in [step.node for step in steps if step.node.stage == "finetune" and not step.key]:
            # a control measures the whole set before it begins
            if node.settings["latents"] != "quantized" or node.id in failed or node.id in self._withdrawn:
                continue
            by_node = {step.node.id: future for future, step in running.items()}
            latents = by_node.get(node.inputs["latents"].node)
            known = {name: i for name, i in node.inputs.items() if i.node in produced}
            if node.id in by_node or not latents or len(known) + 1 < len(node.inputs):
                continue
            if not self._is_filled(running[latents].node):
                continue
            inputs = {name: produced[i.node]["outputs"][i.output] for name, i in known.items()}
            inputs["latents"] = _without_digest(running[latents].node, produced)
            key = early_key(node.settings, inputs)
            if key not in self._finished | {step.key for step in running.values()} and self._is_room(running):
                yield EarlyStep(Step(node, key, None, None, ""), inputs, latents)

    def _is_filled(self, quantize: Node) -> bool:
        done, total = self._board.progress(quantize.id)
        return total > 0 and done / total >= self._resources.finetune.start_at

    def _is_room(self, running: Running) -> bool:
        """Whether one more leaves room for what it waits for: else both would wait for ever."""
        early = sum(step.node.stage == "finetune" and not step.ingredients for step in running.values())
        finetune, quantize = share(self._resources.finetune), share(self._resources.quantize)
        return self._cluster.fits([*[finetune] * (early + 1), quantize])


class Watch:
    """Called again and again while an early finetuning is at work; raises Withdrawn where that has no future.

    What has been done is kept in checkpoints, for when the latents are there.
    """

    def __init__(self, begun: EarlyStep, board: Board) -> None:
        node = begun.step.node
        self._labels = (node.inputs["latents"].node, node.id)
        self._latents, self._board = begun.latents, board
        self._seen: list[tuple[int, int]] = []
        self._since = time.monotonic()

    def __call__(self) -> None:
        if self._latents.done() and self._latents.exception():
            raise Withdrawn("its latents could not be quantized")
        patience_s = WHOLE_PATIENCE_S if self._latents.done() else PATIENCE_S
        seen = [self._board.progress(label) for label in self._labels]
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        elif time.monotonic() - self._since > patience_s:
            raise Withdrawn(
                f"neither it nor its latents have got on for {patience_s:.0f} s: it goes on when all are there"
            )


def _without_digest(quantize: Node, produced: Mapping[str, Record]) -> Output:
    """The latents that a node is to make."""
    reads = {name: produced[i.node]["outputs"][i.output] for name, i in quantize.inputs.items()}
    return {"kind": "latents", "digest": "", "blob": "", "note": {"set": set_key(reads, quantize.settings)}}
