"""What the soak's scenarios share, and the table they end in. `make soak` runs them; plain pytest does not."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from laboratory import Lab
from nodes import Nodes
from trial import RUN_S, STAGES, Trial, new_lab

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from machine import machine

TIMES = int(os.environ.get("RETRELLIS_SOAK_TIMES", "1"))  # how often each fault is tried


@dataclass
class Row:
    """One line of the table."""

    fault: str
    stage: str
    what: str
    seconds: list[float]
    passed: int = 0


ROWS: dict[tuple[str, str], Row] = {}


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, str], None]]:
    """Say what is tried: fault, stage, and what happens. It stands in the table with the time that it took."""
    began = time.monotonic()
    rows: list[Row] = []

    def enter(fault: str, stage: str, what: str) -> None:
        rows.append(ROWS.setdefault((fault, stage), Row(fault, stage, what, [])))

    yield enter
    for row in rows:
        row.seconds.append(time.monotonic() - began)
        row.passed += request.node.stash.get(PASSED, False)


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "time_" in metafunc.fixturenames:
        metafunc.parametrize("time_", range(TIMES))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    write(machine("retrellis", "ray", "torch", "zarr", "obstore", "mlflow"))
    write("")
    write("| fault | stage | as expected | what happens | seconds, each |")
    write("|---|---|---|---|---|")
    for row in ROWS.values():
        mean = sum(row.seconds) / len(row.seconds)
        write(f"| {row.fault} | {row.stage} | {row.passed} of {len(row.seconds)} | {row.what} | {mean:.0f} |")
    write("")


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["RETRELLIS_SCRATCH"] = str(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def nodes(scratch: None) -> Iterator[Nodes]:
    with Nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The experiment, run to its end in peace. Not to be changed."""
    lab = new_lab(tmp_path_factory.mktemp("undisturbed") / "lab")
    trial = Trial(lab, nodes, lab)
    run = trial.start()
    assert run.finish(RUN_S) == 0, run.text
    trial.check()
    return lab


@pytest.fixture
def trial_from(undisturbed: Lab, nodes: Nodes, tmp_path: Path) -> Callable[..., Trial]:
    """Begins a trial at a stage: a copy of the workspace as if neither it nor what follows had ever run."""

    def begin(
        stage: str, root: Path = tmp_path / "workspace", on: Nodes = nodes, lab: Lab | None = None
    ) -> Trial:
        lab = lab or undisturbed.copy(root, without=STAGES[STAGES.index(stage) :])
        return Trial(lab, on, undisturbed)

    return begin
