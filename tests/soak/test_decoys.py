"""A Ray of its own: where a command is started decides nothing, and workers have variables that the driver has not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from laboratory import Lab

from jobs.connection import WORKER_VARIABLES


def test_folders_of_our_names_where_it_is_started_are_not_ours(reference: Lab, tmp_path: Path) -> None:
    decoys = tmp_path / "decoys"
    for name in ("jobs", "storage", "pipeline"):
        (decoys / name).mkdir(parents=True)
        (decoys / name / "__init__.py").write_text(f"raise ImportError('the wrong {name}')\n")
    lab = reference.beside(tmp_path / "workspace")
    run = lab.start("quantize", lab.file, "--only", "quantizer=tcq4", cwd=decoys)  # with a Ray of its own
    assert run.finish() == 0, run.text
    assert lab.content().items() <= reference.content().items()
    assert len(lab.parts()) > 0


OF_ITS_OWN = """
import os
from jobs.cluster import Cluster
from jobs.connection import WORKER_VARIABLES
from jobs.shares import Share

cluster = Cluster("local")
workers = cluster.run(lambda names: [name for name in names if name in os.environ], (list(WORKER_VARIABLES),), Share())
cluster.stop()
print(workers == list(WORKER_VARIABLES), [name for name in WORKER_VARIABLES if name in os.environ])
"""


def test_workers_of_an_embedded_ray_have_variables_that_the_driver_has_not() -> None:
    plain = {name: value for name, value in os.environ.items() if name not in WORKER_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", OF_ITS_OWN], env=plain, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True []\n", done.stderr
