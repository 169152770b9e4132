"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray
from laboratory import Lab, patiently

from storage.objects import Objects

if TYPE_CHECKING:
    from s3_server import S3Server

pytest_plugins = ["latent_sets"]
# Trainings are compared to the bit, which they are on a CPU alone.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two test processes may run beside each other, each with copies of its own."""
    os.environ["RETRELLIS_SCRATCH"] = str(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def ray_address(s3_server: S3Server) -> Iterator[str]:
    """Ray with 2 CPUs, started once: `Cluster` uses it in this process, and other processes can join it."""
    os.environ |= s3_server.environment  # workers have the environment in which Ray was started
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = patiently(
        lambda: ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's, as in workers of one core: other numbers of threads sum in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server on loopback, with no bucket yet."""
    from s3_server import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket's URL, which this process and those that it starts can reach. The server's faults are mended."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    s3_server.make_bucket(name)
    for variable, value in s3_server.environment.items():
        monkeypatch.setenv(variable, value)
    yield f"s3://{name}"
    s3_server.mend()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The root of a new store: what is promised of one holds in a local folder and on an S3 server alike."""
    folder = request.param == "folder"
    return str(tmp_path / "root") if folder else f"{request.getfixturevalue('bucket')}/root"


@pytest.fixture
def objects(place: str) -> Objects:
    """The objects of a new store."""
    return Objects(place)


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
