"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from laboratory import Lab


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ray with 2 CPUs, started once: `Cluster` uses it in this process, and other processes can join it."""
    os.environ["RETRELLIS_SCRATCH"] = str(tmp_path_factory.mktemp("scratch"))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def reference(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The small experiment, run to its end and undisturbed, with MLflow. Not to be changed: `Lab.copy` it."""
    lab = Lab.new(tmp_path_factory.mktemp("reference") / "lab")
    lab.run(tracking=None)
    return lab


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, mounted for the test (which takes root); `laboratory.resize` makes room."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no command to mount a file system")
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
