"""KubeRay's manifests: valid for its strict definitions, as its operator wants them, and enough for our jobs."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray._private.label_utils import validate_node_label_syntax

from motor_ray.cli import parse
from motor_ray.config import DetectSettings, RunSettings
from motor_ray.config_values import checked, settings_from
from motor_ray.distributed.cluster import holds
from motor_ray.distributed.job_file import entrypoint, read_job
from motor_ray.distributed.preflight import TASKS, plan_pools
from motor_ray.distributed.serve_environment import variables
from motor_ray.distributed.serve_file import check_serve_file
from motor_ray.distributed.team import READERS
from motor_ray.service.settings import ServeSettings, ServiceSettings
from motor_ray.verbs.training import workers_from
from tests.cluster import files
from tests.cluster.files import CLUSTER, CRDS, KUBERAY, OVERLAYS, ROOT, Object, containers, pods, quantity, ray_cluster

EVERYTHING = files.everything()
RAY = [(where, one) for where, one in EVERYTHING if ray_cluster(one) is not None]
SERVICES = [(where, one) for where, one in RAY if one["kind"] == "RayService"]
JOBS = [(where, one) for where, one in RAY if one["kind"] == "RayJob"]
DRIVER_CPUS = 1

DETECTOR_CPUS = 4
"""What a detector beside a GPU takes, unless it is told otherwise."""


def each(objects: list[tuple[str, Object]]) -> Any:
    return pytest.mark.parametrize("one", [one for _, one in objects], ids=[where for where, _ in objects])


def strict(schema: Any) -> Any:
    """The schema, with no other keys than those that it names; as Kubernetes has it but for pruning them silently."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


@cache
def definition(kind: str) -> dict[str, Any]:
    """KubeRay's strict definition of a kind."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"{path} is not there; cluster/README.md says how to fetch it")
    with path.open(encoding="utf-8") as file:
        versions = yaml.load(file, yaml.CSafeLoader)["spec"]["versions"]
    [found] = [one for one in versions if one["name"] == "v1"]
    made: dict[str, Any] = strict(found["schema"]["openAPIV3Schema"])
    return made


@each(RAY)
def test_a_manifest_is_valid_for_kuberays_strict_definition(one):
    errors = Draft202012Validator(definition(one["kind"])).iter_errors(one)
    assert not [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entrypiont"), "python"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "idleTimeout"), 60),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "toleration"), []),
        (("spec", "backoffLimit"), "three"),
    ],
)
def test_the_definition_refuses_what_is_misspelt(path, value):
    job = copy.deepcopy(files.one_of(files.base(), "RayJob", "detect"))
    place: Any = job
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert not Draft202012Validator(definition("RayJob")).is_valid(job)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_what_kubectl_makes_of_it(name):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; the other tests have merged the overlay themselves")
    folder = KUBERAY / "overlays" / name
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    made = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
    assert made == {(one["kind"], one["metadata"]["name"]): one for one in files.overlay(name)}


@each(RAY)
def test_what_the_operator_would_refuse_is_not_asked_of_it(one):
    """The rules of KubeRay's validation.go that no schema tells."""
    cluster, spec = ray_cluster(one) or {}, one["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", one["metadata"]["name"])
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not (
            group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory", "resources"} and "resources" in group
        )
        assert "labels" not in group["rayStartParams"]
        validate_node_label_syntax(group["labels"])
    assert all("restartPolicy" not in pod["spec"] for role, pod in pods(one) if role != "submitter")
    if cluster["enableInTreeAutoscaling"]:
        assert cluster["autoscalerOptions"]["version"] == "v2"
    if one["kind"] != "RayJob":
        return
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    assert bool(rules) != spec.get("shutdownAfterJobFinishes", False)
    assert ("ttlSecondsAfterFinished" in spec) == ("shutdownAfterJobFinishes" in spec)
    assert not any(rule["policy"] == "DeleteWorkers" for rule in rules)
    for status in ("SUCCEEDED", "FAILED"):
        after = {
            rule["policy"]: rule["condition"]["ttlSeconds"]
            for rule in rules
            if rule["condition"]["jobStatus"] == status
        }
        assert after.get("DeleteCluster", 0) <= after.get("DeleteSelf", 10**9)


@each(RAY)
def test_pods_take_what_they_ask_for_and_are_not_root(one):
    for role, pod in pods(one):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, role
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000, role
        assert (
            pod["metadata"]["labels"]["app.kubernetes.io/component"]
            == (one["metadata"]["labels"]["app.kubernetes.io/component"])
        )
        for container in pod["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"], role
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, role
            assert not {"livenessProbe", "readinessProbe"} & container.keys(), "KubeRay's own know Ray better"
            if role != "submitter":
                assert container["envFrom"] == [{"secretRef": {"name": "motor-ray-storage"}}]
                assert {"name": "scratch", "mountPath": "/tmp"} in container["volumeMounts"]
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        assert volumes == {mount["name"] for one in pod["spec"]["containers"] for mount in one.get("volumeMounts", [])}


@each(RAY)
def test_scratch_space_fits_into_what_a_pod_may_write(one):
    for role, pod in pods(one):
        for volume in pod["spec"].get("volumes", []):
            if "emptyDir" in volume:
                limit = pod["spec"]["containers"][0]["resources"]["limits"]["ephemeral-storage"]
                assert quantity(volume["emptyDir"]["sizeLimit"]) < quantity(limit), role


@each(RAY)
def test_only_gpu_workers_may_be_taken_away_and_nothing_else_runs_beside_a_gpu(one):
    head = (ray_cluster(one) or {})["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for role, pod in pods(one):
        spec = pod["spec"]
        asks = "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
        assert asks == (role == "gpu")
        if role == "gpu":
            assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= {one["key"] for one in spec["tolerations"]}
            continue
        assert "tolerations" not in spec
        [term] = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        wanted = {(one["key"], one["operator"]) for one in term["matchExpressions"]}
        assert {("nvidia.com/gpu.present", "DoesNotExist"), ("karpenter.sh/capacity-type", "NotIn")} <= wanted


@each(RAY)
def test_reading_slices_leaves_cores_of_gpu_nodes_free(one):
    for group in (ray_cluster(one) or {})["workerGroupSpecs"]:
        if group["groupName"] == "gpu":
            limit = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
            assert files.node(group)["CPU"] <= limit - 2


@each(JOBS)
def test_a_job_runs_what_its_job_file_says(one):
    verb = one["metadata"]["labels"]["app.kubernetes.io/component"]
    job = read_job(ROOT / "jobs" / f"{verb}.yaml")
    said = one["spec"]["entrypoint"].replace("/etc/motor-ray/settings.yaml", "settings.yaml")
    assert shlex.split(said) == shlex.split(entrypoint(job))


def read_settings_of(verb: str) -> dict[str, Any]:
    settings = read_job(ROOT / "jobs" / f"{verb}.yaml").settings
    assert isinstance(settings, dict), "read_job has read the file"
    return settings


@pytest.mark.parametrize("verb", ["detect", "train"])
def test_the_settings_of_a_job_are_those_of_its_job_file(verb, tmp_path):
    job = files.one_of(files.base(), "RayJob", verb)
    settings = files.one_of(files.base(), "ConfigMap", verb)
    said = yaml.safe_load(settings["data"]["settings.yaml"])
    assert settings_from(said) == settings_from(read_settings_of(verb))
    file = tmp_path / "settings.yaml"
    file.write_text(settings["data"]["settings.yaml"])
    parse(shlex.split(job["spec"]["entrypoint"].replace("/etc/motor-ray/settings.yaml", str(file)))[3:])


@each(JOBS)
def test_the_driver_finds_its_settings_and_is_on_no_gpu_node(one):
    asked = json.loads(one["spec"]["entrypointResources"])
    for group in (ray_cluster(one) or {})["workerGroupSpecs"]:
        there = files.node(group)
        fits = all(there.get(name, 0) >= number for name, number in asked.items())
        assert fits == (group["groupName"] == "cpu")
        if fits:
            assert there["CPU"] >= one["spec"]["entrypointNumCpus"]
            [container] = group["template"]["spec"]["containers"]
            assert "/etc/motor-ray" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"name": one["metadata"]["name"]} in [
                volume.get("configMap") for volume in group["template"]["spec"]["volumes"]
            ]


@each(JOBS)
def test_a_job_that_dies_is_tried_as_often_as_motor_ray_submit_would_and_ends_some_day(one):
    spec = one["spec"]
    verb = one["metadata"]["labels"]["app.kubernetes.io/component"]
    attempts = read_job(ROOT / "jobs" / f"{verb}.yaml").attempts
    assert spec["backoffLimit"] in (0, attempts - 1)
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


@each([(where, one) for where, one in RAY if one["kind"] != "RayService" and "train" not in where])
def test_the_fewest_nodes_can_run_a_detection(one):
    there = files.nodes(ray_cluster(one) or {}, "minReplicas")
    room = files.room(there)
    pools = plan_pools(room._replace(cpus=room.cpus - DRIVER_CPUS), DetectSettings())
    assert pools.scorers == max(room.gpus, 1)


@each([(where, one) for where, one in RAY if "detect" in where])
def test_the_most_nodes_keep_their_gpus_busy_with_loaders(one):
    room = files.room(files.nodes(ray_cluster(one) or {}, "maxReplicas"))
    pools = plan_pools(room._replace(cpus=room.cpus - DRIVER_CPUS), DetectSettings())
    assert pools.loaders >= (14 * room.gpus or 1)


@each([(where, one) for where, one in JOBS if "train" in where])
def test_training_fits_from_its_fewest_workers_to_its_most(one):
    fewest, most = workers_from(shlex.split(one["spec"]["entrypoint"].split("--workers ")[1])[0])
    for number, workers in (("minReplicas", fewest), ("maxReplicas", most)):
        there = files.nodes(ray_cluster(one) or {}, number)
        gpus = any(node["GPU"] for node in there)
        train = RunSettings().train
        worker = {"CPU": train.worker_cpus, **({"GPU": 1} if gpus else {})}
        assert holds(there, worker) >= workers
        assert sum(node["CPU"] for node in there) >= workers * train.worker_cpus + READERS + DRIVER_CPUS
        assert plan_pools(files.room(there), DetectSettings()).loaders >= 1, "whole tomograms at the end"


def serve_file(one: Object) -> Any:
    return yaml.safe_load(one["spec"]["serveConfigV2"])


def limits_of(one: Object) -> ServeSettings:
    [application] = serve_file(one)["applications"]
    return checked(ServiceSettings, application["args"], "args").serve


@each([(where, one) for where, one in SERVICES if where.startswith(("base", "prod"))])
def test_the_endpoint_is_that_of_the_serve_file(one):
    assert serve_file(one) == yaml.safe_load((CLUSTER / "serve.yaml").read_text())


@each(SERVICES)
def test_the_endpoints_file_is_one_that_ray_and_we_understand(one):
    check_serve_file(serve_file(one))
    assert limits_of(one).models


@each(SERVICES)
def test_every_ray_container_of_the_endpoint_has_serves_variables_and_the_keys(one):
    wanted, keys = variables(limits_of(one)), limits_of(one).keys_file or ""
    for container in containers(one):
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        assert given == wanted
        [mount] = [one for one in container["volumeMounts"] if one["name"] == "keys"]
        assert keys.startswith(mount["mountPath"] + "/")
        secret = yaml.safe_load_all((KUBERAY / "secrets.example.yaml").read_text())
        [example] = [one for one in secret if one["metadata"]["name"] == "motor-ray-keys"]
        assert keys.removeprefix(mount["mountPath"] + "/") in example["stringData"]


@each(SERVICES)
def test_the_endpoint_has_room_from_its_fewest_processes_to_its_most(one):
    limits, cluster = limits_of(one), ray_cluster(one) or {}
    for number, detectors in (("minReplicas", limits.min_detectors), ("maxReplicas", limits.max_detectors)):
        there = files.nodes(cluster, number)
        gpus = [node for node in there if node["GPU"]]
        cpus = limits.detector_cpus or (DETECTOR_CPUS if gpus else None)
        assert cpus, "without GPUs a detector takes all cores of a machine, which a pod has not: say detector_cpus"
        spare = number == "maxReplicas" and limits.replace == "after"
        assert holds(there, {"CPU": cpus, **({"GPU": 1} if gpus else {})}) >= detectors + spare
        left = sum(node["CPU"] for node in there) - cpus * (detectors + spare)
        assert left >= (limits.ingresses if limits.ingresses > 1 else 0) * (1 + spare)


@each(SERVICES)
def test_the_endpoint_changes_over_without_a_request_failing(one):
    assert one["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert one["spec"]["excludeHeadPodFromServeSvc"] is True
    drain = limits_of(one).drain_seconds
    assert one["spec"]["rayClusterDeletionDelaySeconds"] > drain
    assert all(pod["spec"]["terminationGracePeriodSeconds"] > drain for _, pod in pods(one))


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_lets_through_what_must_pass_and_no_more(name):
    objects = files.overlay(name)
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    rules = definition("RayCluster")["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]
    rules = rules["properties"]["ingressRules"]
    inside, endpoint = sorted(policies, key=lambda one: len(one["spec"]["podSelector"]["matchLabels"]))
    for policy in policies:
        assert set(policy["spec"]) == {"podSelector", "policyTypes", "ingress"}
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        Draft202012Validator(rules).validate(policy["spec"]["ingress"])
        assert all(rule["from"] for rule in policy["spec"]["ingress"]), "an empty one lets everybody in"

    def meant(policy: Object, pod: Object) -> bool:
        return set(policy["spec"]["podSelector"]["matchLabels"].items()) <= set(pod["metadata"]["labels"].items())

    for one in objects:
        for _, pod in pods(one):
            assert meant(inside, pod)
            assert meant(endpoint, pod) == (one["kind"] == "RayService")
    assert {"podSelector": inside["spec"]["podSelector"]} in inside["spec"]["ingress"][0]["from"]


def test_the_heads_of_production_may_die_and_of_no_other():
    redis = {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "motor-ray-redis", "key": "password"}}},
    }
    for where, one in RAY:
        safe = where.startswith("prod") and one["kind"] != "RayJob"
        assert (ray_cluster(one) or {}).get("gcsFaultToleranceOptions") == (redis if safe else None)


QUEUES = {(one["kind"], one["metadata"]["name"]): one for one in files.documents(KUBERAY / "kueue.yaml")}


@each([(where, one) for where, one in JOBS if where.startswith("prod")])
def test_kueue_can_admit_a_job_of_production_as_it_stands(one):
    cluster = ray_cluster(one) or {}
    assert one["spec"]["shutdownAfterJobFinishes"] is True
    assert cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster
    assert len(cluster["workerGroupSpecs"]) <= 6
    local = QUEUES["LocalQueue", one["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]]
    assert local["metadata"]["namespace"] == one["metadata"]["namespace"]
    queue = QUEUES["ClusterQueue", local["spec"]["clusterQueue"]]["spec"]
    assert queue["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == one["metadata"]["namespace"]
    [group] = queue["resourceGroups"]
    flavors = {
        flavor["name"]: {one["name"]: quantity(one["nominalQuota"]) for one in flavor["resources"]}
        for flavor in group["flavors"]
    }
    assert all(("ResourceFlavor", name) in QUEUES for name in flavors)
    assert all(set(quota) == set(group["coveredResources"]) for quota in flavors.values())
    replicas = {group["groupName"]: group["replicas"] for group in cluster["workerGroupSpecs"]}
    for role, pod in pods(one):
        quota = flavors["motor-ray-gpu" if role == "gpu" else "motor-ray-cpu"]
        for name, number in pod["spec"]["containers"][0]["resources"]["requests"].items():
            quota[name] -= replicas.get(role, 1) * quantity(number)
    assert all(left >= 0 for quota in flavors.values() for left in quota.values()), flavors


@pytest.mark.parametrize("name", OVERLAYS)
def test_elsewhere_no_job_waits_for_a_queue(name):
    waits = {
        "kueue.x-k8s.io/queue-name" in one["metadata"]["labels"]
        for one in files.overlay(name)
        if one["kind"] == "RayJob"
    }
    assert waits == {name == "prod"}


def test_the_example_names_every_secret_and_holds_no_value():
    examples = {one["metadata"]["name"]: one["stringData"] for one in files.documents(KUBERAY / "secrets.example.yaml")}
    assert not [value for example in examples.values() for value in example.values() if value]
    said = json.dumps([one for _, one in EVERYTHING])
    used = set(re.findall(r'"secretRef": {"name": "([^"]+)"', said))
    used |= set(re.findall(r'"secretName": "([^"]+)"', said))
    used |= set(re.findall(r'"secretKeyRef": {"name": "([^"]+)"', said))
    assert used == set(examples)
    assert not [where for where, one in EVERYTHING if one["kind"] == "Secret"]


def test_a_detection_in_production_has_tasks_to_spare():
    job = files.one_of(files.overlay("prod"), "RayJob", "detect")
    room = files.room(files.nodes(ray_cluster(job) or {}, "replicas"))
    pools = plan_pools(room._replace(cpus=room.cpus - DRIVER_CPUS), DetectSettings())
    assert pools.scorers == 8
    assert pools.scorers + pools.loaders + TASKS + DRIVER_CPUS <= room.cpus


@each([(where, one) for where, one in JOBS if "train" in where])
def test_the_recipes_decoded_frames_fit_on_a_node(one):
    heads = [
        " ".join(path.read_text().replace("#", " ").split()) for path in (ROOT / "jobs" / "recipes").glob("*.yaml")
    ]
    said = [int(number) for head in heads for number in re.findall(r"(\d+) GB of each node's own", head)]
    assert said
    for group in (ray_cluster(one) or {})["workerGroupSpecs"]:
        [scratch] = [volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "scratch"]
        assert quantity(scratch["emptyDir"]["sizeLimit"]) > max(said) * 1e9
