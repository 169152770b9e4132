"""What one task of a stage occupies, and whether a cluster has that: Ray would wait for ever for what no node has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class InfeasibleResources(ValueError):
    """A stage asks for more than any node has; Ray would wait for ever."""


@dataclass(frozen=True)
class Share:
    """What one task of a stage occupies, how many are in flight, and on how many workers each runs at once."""

    num_cpus: float = 1.0  # of each worker
    num_gpus: float = 0.0
    in_flight: int = 64
    workers: int = 1

    @property
    def threads(self) -> int:
        """Of one task: as many as its whole cores."""
        return max(1, int(self.num_cpus))


def require_feasible(ray: Any, share: Share, stage: str) -> None:
    """Make sure that some node has room for a task, and all together for its workers.

    Args:
        stage: whose tasks these are, for the message.

    Raises:
        InfeasibleResources: says which setting to lower, and to what.
    """
    nodes = _nodes(ray)
    for resource, wanted in (("CPU", share.num_cpus), ("GPU", share.num_gpus)):
        most = max((float(node.get(resource, 0)) for node in nodes), default=0.0)
        if wanted > most:
            option = f"resources.{stage}.num_{resource.lower()}s"
            raise InfeasibleResources(
                f"{option}: a task wants {wanted:g}, but no node has more than {most:g}: Ray would wait for ever. "
                f"Lower it, as in --set {option}={most:g}, or add a node"
            )
    if share.workers > (room := places(ray, share)):
        raise InfeasibleResources(
            f"resources.{stage}.workers: {share.workers} are to work at once, each with num_cpus {share.num_cpus:g} "
            f"and num_gpus {share.num_gpus:g}, but all nodes together have room for {room}: Ray would wait for "
            f"ever. Lower it, as in --set resources.{stage}.workers={room}, or what each occupies, or add a node"
        )


def fit_together(ray: Any, shares: list[Share]) -> bool:
    """Whether one task of each share can run at the same time, the largest placed first."""
    free = [{name: float(node.get(name, 0)) for name in ("CPU", "GPU")} for node in _nodes(ray)]
    wanted = [
        {"CPU": share.num_cpus, "GPU": share.num_gpus} for share in shares for _ in range(share.workers)
    ]
    for amounts in sorted(wanted, key=lambda amounts: (-amounts["GPU"], -amounts["CPU"])):
        node = next((n for n in free if all(n[name] >= amounts[name] - 1e-9 for name in amounts)), None)
        if node is None:
            return False
        for name, amount in amounts.items():
            node[name] -= amount
    return True


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def places(ray: Any, share: Share) -> int:
    """How many tasks of a share all nodes together have room for, each on one node."""
    wanted = {"CPU": share.num_cpus, "GPU": share.num_gpus}
    return sum(
        min(int(node.get(resource, 0) / amount + 1e-9) for resource, amount in wanted.items() if amount)
        for node in _nodes(ray)
    )
