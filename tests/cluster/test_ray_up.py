"""The cluster launcher's files: valid for Ray's own schema, spot where it may be, and enough for a detection."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config

from motor_ray.config import DetectSettings
from motor_ray.distributed.preflight import Room, plan_pools
from tests.cluster.files import CLUSTER, SHELLCHECK, Object

FILES = sorted((CLUSTER / "ray-up").glob("*.yaml"))
each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
HOSTS_CPUS = {"m6id.4xlarge": 16, "g5.4xlarge": 16, "n2-standard-8": 8, "g2-standard-16": 16}


def read(file: Path) -> Object:
    said: Object = yaml.safe_load(file.read_text())
    return said


def test_there_are_two_clouds():
    assert {file.stem for file in FILES} == {"aws", "gcp"}


@each
def test_ray_takes_it_with_its_defaults_filled_in(file):
    prepared = prepare_config(read(file))
    validate_config(prepared)
    assert prepared["provider"]["type"] == file.stem
    assert not [command for command in prepared["setup_commands"] + prepared["head_setup_commands"] if "pip" in command]


@each
def test_ray_refuses_what_is_misspelt(file):
    said = read(file)
    said["available_node_types"]["gpu"]["max_worker"] = 8
    with pytest.raises(ValidationError):
        validate_config(prepare_config(said))


@each
def test_the_head_stays_and_gpu_nodes_may_go(file):
    types = read(file)["available_node_types"]
    assert read(file)["head_node_type"] == "head"
    spot = {name: "spot" in str(one["node_config"]).lower() for name, one in types.items()}
    assert spot == {"head": False, "cpu": False, "gpu": True}
    assert types["head"]["resources"] == {"CPU": 0}
    machine = types["gpu"]["node_config"].get("InstanceType") or types["gpu"]["node_config"]["machineType"]
    assert types["gpu"]["resources"]["CPU"] <= HOSTS_CPUS[machine] - 2, "for what feeds the GPU"
    for name in ("cpu", "gpu"):
        validate_node_label_syntax(types[name]["labels"])
        assert types[name]["labels"] == {"motor-ray/group": name}


@each
def test_the_fewest_and_the_most_nodes_can_run_a_detection(file):
    types = read(file)["available_node_types"]
    for number in ("min_workers", "max_workers"):
        total = [
            sum(types[name]["resources"].get(what, 0) * types[name][number] for name in ("cpu", "gpu"))
            for what in ("CPU", "GPU", "memory")
        ]
        room = Room(total[0] - 1, total[1], total[2], int(0.3 * total[2]))
        assert plan_pools(room, DetectSettings()).scorers == max(total[1], 1)
    most = sum(types[name]["max_workers"] for name in ("cpu", "gpu"))
    assert read(file)["max_workers"] == most


@each
def test_what_does_not_fit_into_memory_goes_to_the_machines_own_disk(file):
    said = read(file)
    assert any(option.startswith("-v /scratch:/tmp") for option in said["docker"]["run_options"])
    commands = said["initialization_commands"]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        subprocess.run([SHELLCHECK, "--shell=bash", "--severity=warning", "-"], input=command, text=True, check=True)
    assert any("mkfs" in command for command in commands)
    own_disk = {"aws": r"(m6id|g5)\.", "gcp": r"local-ssd"}[file.stem]
    for name in ("cpu", "gpu"):
        assert re.search(own_disk, str(said["available_node_types"][name]["node_config"]))


@each
def test_jobs_need_the_token(file):
    said = read(file)
    assert any(option.startswith("-e RAY_AUTH_MODE=token") for option in said["docker"]["run_options"])
    assert said["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    [start] = [command for command in said["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start, "reached through ssh alone"
