"""What stages share: the node of the graph, the task handed to a stage, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.cluster import Cluster
from jobs.shares import Share
from storage.workspace import Workspace

if TYPE_CHECKING:
    from jobs.resources import Resources

Output = dict[str, Any]  # {"kind", "digest", "blob", "note"}; see docs/design/structure.md


@dataclass(frozen=True)
class Input:
    """What a node reads: an output of another node."""

    node: str  # its id
    output: str
    part: str = "digest"  # what of the output enters the key: its digest, or a field of its note
    keyed: bool = True  # False: needed for the work, but without influence on the result


@dataclass(frozen=True)
class Node:
    """One stage instance."""

    stage: str
    axes: Mapping[str, Any]  # lmbda, quantizer, arm, seed, effort: those that apply
    settings: Mapping[str, Any]  # enter the key
    inputs: Mapping[str, Input] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)  # needed for the work, enter no key

    @property
    def id(self) -> str:
        """The label people see: the stage and its axes."""
        return " ".join([self.stage, *(f"{name}={value}" for name, value in self.axes.items())])


@dataclass(frozen=True)
class Task:
    """A node that is being computed, with what it may use. It enters no worker: workers get plain values."""

    node: Node
    key: str
    inputs: Mapping[str, Output]
    workspace: Workspace
    cluster: Cluster
    resources: Resources
    attempt: str  # uuid of this try
    progress: Callable[[int, int, str], None]  # done, total, what is counted and how it stands
    say: Callable[[str], None]  # a line for the user
    watch: Callable[[], None] = lambda: (
        None
    )  # called now and then by what can be withdrawn; raises where it is

    @property
    def share(self) -> Share:
        """What one Ray task of this stage occupies."""
        return share(self.resources)


def share(resources: Resources) -> Share:
    """What one task occupies, as the experiment file has it."""
    workers = getattr(resources, "workers", 1)  # of trainings alone
    return Share(resources.num_cpus, resources.num_gpus, resources.in_flight, workers)


@dataclass(frozen=True)
class Outcome:
    """What a stage commits: outputs by name, and the numbers a person wants to see."""

    outputs: dict[str, Output]
    summary: dict[str, Any]
    seen: bytes | None = None  # of its inputs, where they had no digest yet
    early_key: str = ""  # under which an attempt may have begun
