"""A hundred `kill -9` at random times across one run, of random victims: workers, nodes, the driver."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from laboratory import Lab, Running
from nodes import Nodes
from trial import FUNCTIONS, RUN_S, Trial, new_lab

SEED = 5
KILLS = 100
WORK_S = 8.0  # at most, from the first sign of work to the next kill
VICTIMS = ("worker", "node", "driver")
# Long, but for tuning, which begins again when it is hit and would never end
LONG = ("train.steps=2500", "quantizers.tcq4.tune=false", "arms.paper.steps=4000")
SETS = tuple(word for override in LONG for word in ("--set", override))
LATENT_IMAGES = 2000


class Killer:
    """Kills, restarts what must run, and keeps count."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.random = trial, random.Random(SEED)
        self.kills: Counter[str] = Counter()
        self.ended: Counter[int] = Counter()  # exit codes of drivers that ended by themselves
        self.run: Running = trial.start(*SETS)

    def step(self) -> bool:
        """Let some work be done, kill somebody, restart what is gone; False once the run is complete."""
        self.pause(lambda: not self.working())
        end = time.monotonic() + self.random.uniform(0, WORK_S)
        self.pause(lambda: time.monotonic() < end)
        code = self.run.process.poll()
        if code is None:
            self.kill(self.random.choice(VICTIMS))
            return True
        self.ended[code] += 1
        if code != 0:
            self.run = self.trial.start(*SETS)
        return code != 0

    def pause(self, longer: Callable[[], bool]) -> None:
        while self.run.process.poll() is None and longer():
            time.sleep(0.1)

    def working(self) -> list[psutil.Process]:
        return self.trial.nodes.workers(FUNCTIONS.values())

    def kill(self, victim: str) -> None:
        nodes = self.trial.nodes
        if victim == "worker":
            workers = self.working()
            if not workers:
                return
            self.random.choice(workers).kill()
        elif victim == "node":
            nodes.kill(self.random.randrange(len(nodes.nodes)))
            nodes.add()
        else:
            self.run.process.kill()
            self.run.finish()
            self.run = self.trial.start(*SETS)
        self.kills[victim] += 1


@pytest.fixture
def peaceful(nodes: Nodes, tmp_path: Path) -> Lab:
    """The same long run, undisturbed."""
    lab = new_lab(tmp_path / "lab", LATENT_IMAGES)
    run = lab.start("run", lab.file, *SETS, address=nodes.address)
    assert run.finish(RUN_S) == 0, run.text
    return lab


def test_a_hundred_random_kills(entry: Callable[[str, str, str], None], peaceful: Lab, nodes: Nodes) -> None:
    trial = Trial(peaceful.beside(Path(peaceful.root).with_name("killed")), nodes, peaceful)
    killer = Killer(trial)
    began = time.monotonic()
    while killer.kills.total() < KILLS and killer.step():
        pass
    while killer.run.finish(RUN_S) != 0:
        assert killer.step()
    struck = killer.kills.total()
    counts = ", ".join(f"{count} of a {victim}" for victim, count in sorted(killer.kills.items()))
    entry(
        f"{struck} random `kill -9`: {counts}",
        "all, one run",
        f"{killer.kills['driver'] + sum(killer.ended.values())} drivers started again, {killer.ended[1]} of them after "
        f"one that gave up; complete {time.monotonic() - began:.0f} s after it began",
    )
    trial.check()
    assert "nothing to compute" in trial.complete(*SETS)
    assert struck == KILLS, f"as expected, but complete after {struck} kills: give it more work"
