"""The files that start clusters, as Ray itself reads them, and what must stand in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from jobs.connection import RAY_VARIABLES, WORKER_VARIABLES

ROOT = Path(__file__).parents[1]
FILES = ("ray_cluster.yaml", "deploy/aws.yaml")
VARIABLES = {
    **{
        name: value for name, value in RAY_VARIABLES.items() if "ACCEL" not in name
    },  # it concerns drivers alone
    **WORKER_VARIABLES,
}


def read(name: str) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all((ROOT / name).read_text()))


@pytest.fixture(params=FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    (config,) = read(request.param)
    return config


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    # Ray fills in its own start commands, with an open dashboard, where a key of ours is misspelt.
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts", "auth"):
        assert prepared[key] == config[key]
    assert prepared["worker_setup_commands"] == config["setup_commands"]
    assert prepared["head_setup_commands"] == config["setup_commands"] + config.get("head_setup_commands", [])


def test_what_it_copies_exists_and_suffices_to_install(config: dict[str, Any]) -> None:
    mounts = {remote: local for remote, local in config["file_mounts"].items() if "auth_token" not in remote}
    for remote, local in mounts.items():
        assert (ROOT / local).exists()
        assert remote == f"~/retrellis/{local}"
    for package in ("pipeline", "jobs", "storage"):
        assert package in mounts.values()


def test_start_commands_ask_for_the_token(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    environment = config["setup_commands"][-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert "RAY_AUTH_MODE=token" in environment
    for name, value in VARIABLES.items():
        assert f" {name}={value} " in environment
    for command in commands:
        assert "ray start" not in command or ". ~/retrellis/ray-env" in command
    assert any("--head" in c and "--dashboard-host=127.0.0.1" in c for c in commands)


def test_hosts_that_others_use_keep_their_ray() -> None:
    (config,) = read("ray_cluster.yaml")
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert "ray stop" not in command.split("echo")[0]  # a message may name it


def test_instances_on_aws_are_closed_to_strangers() -> None:
    (config,) = read("deploy/aws.yaml")
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node["SecurityGroupIds"], "Ray makes a group that is open to ssh from everywhere"
        assert node["IamInstanceProfile"], "Ray gives full access to EC2 and S3"
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
    kinds = config["available_node_types"]
    assert kinds["worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds[config["head_node_type"]]["node_config"]
    assert kinds["worker"]["min_workers"] >= 1  # a run looks for a node that its tasks fit


def test_pods_of_the_ray_job_have_what_nodes_have_and_are_closed_to_strangers() -> None:
    job, policy = read("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pinned = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert f"ray=={cluster['rayVersion']}" in pinned
    assert cluster["authOptions"] == {"mode": "token", "secretName": "retrellis-ray-token"}
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for template in templates:
        (container,) = template["spec"]["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert VARIABLES.items() <= environment.items()
        places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert environment["RETRELLIS_SCRATCH"] == places["scratch"]
        assert places.keys() == {volume["name"] for volume in template["spec"]["volumes"]}
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert f"--workspace {places['shared']}/" in job["spec"]["entrypoint"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for rule in policy["spec"]["ingress"]:
        assert rule["from"]
