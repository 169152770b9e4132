"""`ray_cluster.yaml` as Ray itself reads it, and what must stand in it."""

from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from jobs.cluster import RAY_VARIABLES, WORKER_VARIABLES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    # Ray fills in its own start commands, with a bare `ray stop`, where a key of ours is misspelt.
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts"):
        assert prepared[key] == config[key]
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == config["setup_commands"]


def test_what_it_copies_exists_and_suffices_to_install(config: dict[str, Any]) -> None:
    mounts = {remote: local for remote, local in config["file_mounts"].items() if "auth_token" not in remote}
    for remote, local in mounts.items():
        assert (ROOT / local).exists()
        assert remote == f"~/retrellis/{local}"
    for package in ("pipeline", "jobs", "storage"):
        assert package in mounts.values()


def test_start_commands_ask_for_the_token_and_stop_nobody(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    environment = config["setup_commands"][-1]
    assert "RAY_AUTH_MODE=token" in environment
    ours = {
        name: value for name, value in RAY_VARIABLES.items() if "ACCEL" not in name
    }  # it concerns drivers alone
    for name, value in (ours | WORKER_VARIABLES).items():
        assert f" {name}={value} " in environment
    for command in commands:
        words = command.split("echo")[0]  # a message may name `ray stop`
        assert "ray stop" not in words
        assert "ray start" not in words or ". ~/retrellis/ray-env" in words
    assert any("--head" in c and "--dashboard-host=127.0.0.1" in c for c in commands)
