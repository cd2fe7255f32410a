"""Reading the files under cluster/: kustomize's overlays, and what a Kubernetes pod is for Ray."""

import copy
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

from motor_ray.distributed.preflight import Room

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
OVERLAYS = ("dev", "prod")

CRDS = Path(os.environ.get("MOTOR_RAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay-crds"))
"""KubeRay's definitions, which cluster/README.md says how to fetch."""

SHELLCHECK = str(Path(sys.executable).parent / "shellcheck")

Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def base() -> list[Object]:
    """What the overlays change."""
    names = documents(KUBERAY / "base" / "kustomization.yaml")[0]["resources"]
    return [one for name in names for one in documents(KUBERAY / "base" / name)]


def overlay(name: str) -> list[Object]:
    """What `kubectl kustomize` makes of an overlay, as far as ours go: a namespace, images, and patches of RFC 6902."""
    [said] = documents(KUBERAY / "overlays" / name / "kustomization.yaml")
    assert set(said) == {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert said["resources"] == ["../../base"]
    objects = copy.deepcopy(base())
    for one in objects:
        one["metadata"]["namespace"] = said["namespace"]
        for container in containers(one):
            container["image"] = renamed(container["image"], said["images"])
        for patch in said["patches"]:
            if all({"kind": one["kind"], **one["metadata"]}[key] == value for key, value in patch["target"].items()):
                jsonpatch.apply_patch(one, yaml.safe_load(patch["patch"]), in_place=True)
    return objects


def renamed(image: str, images: list[dict[str, str]]) -> str:
    """An image's name with the new name and tag that kustomize is told for it."""
    by_name = {one["name"]: f"{one['newName']}:{one['newTag']}" for one in images}
    return by_name.get(image.split(":")[0], image)


def everything() -> list[tuple[str, Object]]:
    """All objects of base and overlays, each with where it stands."""
    return [
        (f"{where}:{one['kind']}/{one['metadata']['name']}", one)
        for where, objects in [("base", base()), *((name, overlay(name)) for name in OVERLAYS)]
        for one in objects
    ]


def one_of(objects: list[Object], kind: str, component: str) -> Object:
    """The object of a kind for `cluster`, `detect`, `train` or `service`."""
    label = "app.kubernetes.io/component"
    [found] = [one for one in objects if one["kind"] == kind and one["metadata"]["labels"][label] == component]
    return found


def ray_cluster(one: Object) -> Object | None:
    """The RayCluster's spec in an object, if it has one."""
    spec: Object = one.get("spec", {})
    if one["kind"] == "RayCluster":
        return spec
    found: Object | None = spec.get({"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(one["kind"], ""))
    return found


def pods(one: Object) -> Iterator[tuple[str, Object]]:
    """The pod templates of an object: of the head, of each worker group by its name, and of the submitter."""
    if (cluster := ray_cluster(one)) is not None:
        yield "head", cluster["headGroupSpec"]["template"]
        yield from ((group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"])
    if one["kind"] == "RayJob":
        yield "submitter", one["spec"]["submitterPodTemplate"]


def containers(one: Object) -> list[Object]:
    """All containers of an object's pods."""
    return [container for _, pod in pods(one) for container in pod["spec"]["containers"]]


def quantity(text: str | int) -> float:
    """A number as Kubernetes writes it: 500m, 7, 28Gi, 10**9 as 1G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(text))
    assert found, text
    factors = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(found[1]) * factors.get(found[2], 1)


def node(group: Object) -> dict[str, float]:
    """What a node of a worker group has for Ray, which KubeRay reads off the limits unless it is told otherwise."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = group["rayStartParams"].get("num-cpus", limits["cpu"])
    gpus, memory = quantity(limits.get("nvidia.com/gpu", 0)), quantity(limits["memory"])
    custom = {name: quantity(number) for name, number in group.get("resources", {}).items()}
    return {"CPU": quantity(cpus), "GPU": gpus, "memory": memory, "object_store_memory": 0.3 * memory, **custom}


def nodes(cluster: Object, number: str) -> list[dict[str, float]]:
    """The nodes of a cluster when every group has as many as its field `number` says."""
    return [node(group) for group in cluster["workerGroupSpecs"] for _ in range(group[number])]


def room(there: list[dict[str, float]]) -> Room:
    """What nodes have together, and each."""
    names = ("CPU", "GPU", "memory", "object_store_memory")
    cpus, gpus, memory, object_store = (int(sum(one[name] for one in there)) for name in names)
    return Room(cpus, gpus, memory, object_store, there)
