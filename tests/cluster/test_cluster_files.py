"""All that lies under cluster/: read by a test, of one version, with the same names and ports everywhere."""

import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from motor_ray import __version__
from tests.cluster import files
from tests.cluster.files import CLUSTER, ROOT, ray_cluster
from tests.cluster.test_image import PYPROJECT, locked

READERS = {
    "README.md": "tests/cluster/test_cluster_files.py",
    "grafana.json": "tests/distributed/test_serving.py",
    "image/Dockerfile": "tests/cluster/test_image.py",
    "image/launcher.in": "tests/cluster/test_image.py",
    "image/requirements.lock": "tests/cluster/test_image.py",
    "kuberay/base/kustomization.yaml": "tests/cluster/files.py",
    "kuberay/base/networkpolicy.yaml": "tests/cluster/test_kuberay.py",
    "kuberay/base/raycluster.yaml": "tests/cluster/test_kuberay.py",
    "kuberay/base/rayjob-detect.yaml": "tests/cluster/test_kuberay.py",
    "kuberay/base/rayjob-train.yaml": "tests/cluster/test_kuberay.py",
    "kuberay/base/rayservice.yaml": "tests/cluster/test_kuberay.py",
    "kuberay/kueue.yaml": "tests/cluster/test_kuberay.py",
    "kuberay/overlays/dev/kustomization.yaml": "tests/cluster/files.py",
    "kuberay/overlays/prod/kustomization.yaml": "tests/cluster/files.py",
    "kuberay/secrets.example.yaml": "tests/cluster/test_kuberay.py",
    "ray-up/aws.yaml": "tests/cluster/test_ray_up.py",
    "ray-up/gcp.yaml": "tests/cluster/test_ray_up.py",
    "serve.yaml": "tests/distributed/test_serving.py",
    "slurm/detect.sbatch": "tests/cluster/test_slurm.py",
    "slurm/on_ray.sh": "tests/cluster/test_slurm.py",
    "slurm/train.sbatch": "tests/cluster/test_slurm.py",
}
"""Which test reads which file."""

TEXTS = {name: (CLUSTER / name).read_text(encoding="utf-8") for name in READERS}
HOSTS = {
    "127.0.0.1",
    "download.pytorch.org",
    "head",
    "localhost",
    "raw.githubusercontent.com",
    "storage.googleapis.com",
}
README = TEXTS["README.md"]


def test_every_file_is_read_by_a_test():
    there = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    assert there == set(READERS)
    assert all((ROOT / reader).exists() for reader in READERS.values())


def test_base_has_no_file_that_kustomize_does_not_know():
    folder = CLUSTER / "kuberay" / "base"
    [kustomization] = files.documents(folder / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == sorted(
        {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
    )


def test_ray_is_the_same_everywhere():
    [ours] = [Requirement(line) for line in PYPROJECT["dependencies"] if line.startswith("ray[")]
    versions = {(ray_cluster(one) or {})["rayVersion"] for _, one in files.everything() if ray_cluster(one)}
    assert versions == {str(locked()["ray"])}
    assert ours.specifier.contains(Version(versions.pop()))


def test_the_image_is_the_same_everywhere():
    said = {image for text in TEXTS.values() for image in re.findall(r"(?<![\w/-])motor-ray:\d[\w.-]*", text)}
    assert said == {f"motor-ray:{__version__}", f"motor-ray:{__version__}-cpu"}
    for where, one in files.everything():
        suffix = "-cpu" if where.startswith("dev") else ""
        assert {container["image"] for container in files.containers(one)} <= {f"motor-ray:{__version__}{suffix}"}


def test_ports_are_the_same_everywhere():
    names = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080, "serve": 8000}
    for where, one in files.everything():
        for container in files.containers(one):
            for port in container.get("ports", []):
                assert port["containerPort"] == names[port["name"]], where
    flags = {"port": 6379, "dashboard-port": 8265, "metrics-export-port": 8080}
    for name in ("ray-up/aws.yaml", "ray-up/gcp.yaml"):
        given = re.findall(r"--(port|dashboard-port|metrics-export-port)=(\d+)", TEXTS[name])
        assert {(flag, int(port)) for flag, port in given} == set(flags.items())
        assert "$RAY_HEAD_IP:6379" in TEXTS[name]
    assert "RAY_PORT=6379" in TEXTS["slurm/on_ray.sh"]
    assert "port: 8000" in TEXTS["serve.yaml"]
    assert {int(port) for port in re.findall(r"(?:head|127\.0\.0\.1|localhost):(\d+)", README)} <= {8265, 8000}


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_file_names_no_machine_of_ours_and_no_secret(name):
    text = TEXTS[name]
    assert set(re.findall(r"https?://([\w.-]+)", text)) <= HOSTS | (
        {"grafana.com"} if name == "grafana.json" else set()
    )
    assert not re.search(r"/(?:root|work)/", text)
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN", text)


def test_shell_in_the_readme_is_shell():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_the_readme_names_files_that_are_there():
    said = set(re.findall(r"`((?:cluster|jobs|motor_ray|tests)/[\w./-]+)`", README))
    assert said
    assert not [name for name in said if not (ROOT / name).exists()]
    table = README[README.index("| Where you are") : README.index("## ")]
    assert all(folder in table for folder in ("kuberay", "ray-up", "slurm", "serve.yaml"))
