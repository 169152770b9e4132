"""docs/quantizers.md: its example runs, its numbers are the benchmark's and those of tables made now."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.quantizers import settings
from pipeline.quantizers.lloyd import midpoint_tables
from pipeline.quantizers.trellis import TRELLISES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/quantizers.md").read_text()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, "docs/quantizers.md", "exec"), {})
    bits, error = map(float, capsys.readouterr().out.split())
    assert 0 < bits < 3
    assert 0 < error < 1


def test_gaps_are_the_benchmarks() -> None:
    with (ROOT / "benchmarks/rate_distortion.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        measured.setdefault((row["source"], row["quantizer"]), []).append(f"{float(row['gap_db']):.2f}")
    documented = {}
    for source, table in re.findall(r"^\*\*(\w+)\*\*\n\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        for name, *cells in (line.strip("| ").split(" | ") for line in table.splitlines()[3:]):
            documented[source, name] = cells
    assert documented == measured


@pytest.mark.parametrize(("kind", "context"), [("urq", "quantizer"), ("tcq", "quantizer"), ("tcq", "state")])
def test_sizes_of_tables(kind: str, context: str) -> None:
    kilobytes = round(len(midpoint_tables(settings(kind, context=context)).to_bytes()) / 1000)
    assert f"{kilobytes} kB" in TEXT


def test_every_kind_and_trellis_is_there() -> None:
    for name in ("urq", "deadzone", "rdoq", "tcq", "vvc4", "vvc8", "ungerboeck4", "ungerboeck256"):
        assert f"`{name}`" in TEXT
    assert {trellis.states for trellis in TRELLISES.values()} == {2**n for n in range(2, 9)}
    assert np.isclose(10 * np.log10(2 * np.pi * np.e / 12), 1.533, atol=5e-4)
