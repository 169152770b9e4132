"""A training loop as a Ray task runs it: resumes, checkpoints, streams metrics. Shared by `train` and `finetune`."""

from __future__ import annotations

import json
import os
import re
import shutil
import sysconfig
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jobs.resources import Resources, TrainResources
from storage.workspace import Workspace

if TYPE_CHECKING:
    from jobs.filling import Seen
    from pipeline.training.group import Group

KEPT_CHECKPOINTS = 2
COMPILED_FROM_STEPS = 2000  # compiling takes as long as some hundred (benchmarks/training_step.txt)
_SEEN = "seen.json"  # beside a checkpoint, what its key does not say
Message = dict[str, Any]
Measure = Callable[[], dict[str, float]]


class Training(Protocol):
    """What a loop drives: BaseTraining or FinetuneTraining."""

    step: int
    group: Group
    remarks: list[str]

    def advance(self) -> dict[str, float]: ...
    def to_bytes(self) -> bytes: ...
    def resume(self, data: bytes) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """How long, and how often to log and to write a checkpoint; all in steps."""

    steps: int
    log_every: int
    checkpoint_every: int


@dataclass(frozen=True)
class Place:
    """Where a training keeps unfinished work."""

    root: str
    stage: str
    key: str
    attempt: str
    early_key: str = ""  # under which one has worked that did not know the key yet

    @property
    def folders(self) -> list[str]:
        """Where checkpoints of all attempts lie."""
        return [f"attempts/{self.stage}/{key}" for key in dict.fromkeys((self.key, self.early_key)) if key]

    def of(self, attempt: str) -> str:
        return f"attempts/{self.stage}/{self.key}/{attempt}"


def compiles(resources: Resources, steps: int) -> bool:
    """Whether a training of so many steps is compiled; torch can where it finds a C++ compiler and Python's headers."""
    assert isinstance(resources, TrainResources)
    if resources.compile != "auto":
        return resources.compile
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return steps >= COMPILED_FROM_STEPS and compiler is not None and headers


def run_loop(
    training: Training,
    schedule: Schedule,
    place: Place,
    measure: Measure | None = None,
    seen: Seen | None = None,
) -> Iterator[Message]:
    """Advance a training to its end from the newest whole checkpoint of any attempt at this key.

    Args:
        measure: metrics that take longer, added to a message about every `checkpoint_every` steps and to the last.
        seen: the data that a checkpoint depends on, where its key does not say it.

    Yields:
        Every `log_every` steps the mean metrics since the last message, with `step` and `steps_per_s`; at the end
        {"metrics": JSON lines of all of them}. {"say": …} tells of checkpoints: what it goes on from, what is damaged.
        Of a group of workers the first alone yields, and keeps checkpoints.
    """
    workspace = Workspace(place.root)
    if training.group.rank:
        _agree(training)
        while training.step < schedule.steps:
            training.advance()
        return
    lines = yield from _resume(training, workspace, place, seen)
    _agree(training)
    sums: dict[str, float] = {}
    since, clock = training.step, time.monotonic()
    while training.step < schedule.steps:
        for name, value in training.advance().items():
            sums[name] = sums.get(name, 0.0) + value
        while training.remarks:
            yield {"say": training.remarks.pop(0)}
        last = training.step == schedule.steps
        if training.step % schedule.log_every == 0 or last:
            count, seconds = training.step - since, time.monotonic() - clock
            message = {name: value / count for name, value in sums.items()}
            # Counted from the message before this one, also in a run that was resumed between the two.
            before = (training.step - 1) // schedule.log_every * schedule.log_every
            is_due = training.step // schedule.checkpoint_every > before // schedule.checkpoint_every
            if measure and (is_due or last):
                message |= measure()
            lines.append(json.dumps({"step": training.step} | message))
            yield {"step": training.step, "steps_per_s": count / seconds, **message}
            sums, since, clock = {}, training.step, time.monotonic()
        if training.step % schedule.checkpoint_every == 0 and not last:
            note = seen.note(training.step) if seen else None
            _checkpoint(training, lines, workspace, place, note)
    yield {"metrics": "".join(line + "\n" for line in lines)}


def _agree(training: Training) -> None:
    """All workers of a group begin with what the first one has: weights, moments, step."""
    group = training.group
    if group.size > 1:
        state = group.from_first(b"" if group.rank else training.to_bytes())
        if group.rank:
            training.resume(state)


def _checkpoint(
    training: Training, lines: list[str], workspace: Workspace, place: Place, note: bytes | None
) -> None:
    """Write a checkpoint whole, then forget all but this attempt's newest two."""
    folder = place.of(place.attempt)
    name = f"{folder}/checkpoint-{training.step:09d}"
    workspace.put(f"{name}/metrics.jsonl", "".join(line + "\n" for line in lines).encode())
    if note:
        workspace.put(f"{name}/{_SEEN}", note)
    workspace.put(f"{name}/state.safetensors", training.to_bytes())
    mine = [step for step, _ in _checkpoints(workspace, [folder])]
    for step in mine[:-KEPT_CHECKPOINTS]:
        workspace.delete(f"{folder}/checkpoint-{step:09d}")


def _resume(
    training: Training, workspace: Workspace, place: Place, seen: Seen | None
) -> Generator[Message, None, list[str]]:
    """Put the newest usable checkpoint of any attempt back; its metric lines (none for a fresh start)."""
    from pipeline.training.optimization import CheckpointError

    for _, name in reversed(_checkpoints(workspace, place.folders)):
        try:
            if seen and not _agrees(workspace, place, name, seen):
                yield {"say": "a checkpoint is of latents that have been replaced since: it is left out"}
                continue
            lines = workspace.get(f"{name}/metrics.jsonl").decode().splitlines()
            training.resume(workspace.get(f"{name}/state.safetensors"))
        except FileNotFoundError:
            continue  # another attempt has just finished and cleared its checkpoints
        except (CheckpointError, UnicodeDecodeError) as error:
            damaged = "metrics.jsonl" if isinstance(error, UnicodeDecodeError) else "state.safetensors"
            file = workspace.path(f"{name}/{damaged}")
            yield {
                "say": f"checkpoint {file} cannot be used: {error}. The one before is tried, if there is any"
            }
            continue
        yield {"say": f"resumed at step {training.step} from a checkpoint", "step": training.step}
        return lines
    return []


def _agrees(workspace: Workspace, place: Place, checkpoint: str, seen: Seen) -> bool:
    """Whether the data is what a checkpoint was trained on, where its key does not say it."""
    if f"/{place.early_key}/" not in checkpoint:
        return True
    try:
        return seen.agrees(workspace.get(f"{checkpoint}/{_SEEN}"))
    except FileNotFoundError:  # whoever clears it has begun with that
        return False


def _checkpoints(workspace: Workspace, folders: list[str]) -> list[tuple[int, str]]:
    """(step, name) of the whole checkpoints below some folders, oldest first; the state is written last."""
    found = []
    for name in [name for folder in folders for name in workspace.list(folder)]:
        if match := re.fullmatch(r"(.*/checkpoint-(\d+))/state\.safetensors", name):
            found.append((int(match[2]), match[1]))
    return sorted(found)
