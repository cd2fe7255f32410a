"""The endpoint as a user starts it, on a real Ray Serve behind a real HAProxy, asked over HTTP."""

import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
import yaml

from motor_ray.archive.simulate import simulate_archive
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.model import build_model
from motor_ray.distributed.serve_environment import free_port
from tests.distributed.asking import Address, Hammer, assert_same, command, direct, until_answered

pytestmark = pytest.mark.ray

SECONDS_TO_START = 120

CLUSTER = Path(__file__).parents[2] / "cluster"


@dataclass(frozen=True, kw_only=True)
class Endpoint(Address):
    """An endpoint that these tests have started."""

    process: "subprocess.Popen[str]"
    log: Path


@pytest.fixture(scope="module")
def other_checkpoint(settings, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A detector of other weights than `checkpoint`."""
    torch.manual_seed(1)
    uri = str(tmp_path_factory.mktemp("model") / "other")
    save_checkpoint(uri, build_model(settings.model), settings, {})
    return uri


@pytest.fixture(scope="module")
def endpoint(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder, port = tmp_path_factory.mktemp("endpoint"), free_port()
    keys = ["--serve.keys-file", str(folder / "keys")]
    made = subprocess.run(command("--new-key", "alice", *keys), capture_output=True, text=True, check=True)
    asked = command("--model", checkpoint, "--port", str(port), *keys, "--serve.storage", str(folder / "storage"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        started = Endpoint(port, json.loads(made.stdout)["key"], process=process, log=log)
        try:
            wait_until_ready(started)
            yield started
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(endpoint: Endpoint) -> None:
    ends = time.monotonic() + SECONDS_TO_START
    while "is ready" not in endpoint.log.read_text():
        assert endpoint.process.poll() is None, endpoint.log.read_text()
        assert time.monotonic() < ends, endpoint.log.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def images(archive) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(archive.uri).glob("*/slice_0010.jpg"))]


def test_images_that_come_at_once_get_each_what_the_model_says_of_it(endpoint, checkpoint, images):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: endpoint.ask("POST", "/v1/slices?threshold=0", image), images))
    assert [status for status, _ in answers] == [200] * len(images)
    for (_, answer), expected in zip(answers, direct(checkpoint, images), strict=True):
        assert_same(answer, expected)


def test_a_stranger_gets_nothing_but_the_page_and_its_health(endpoint, images):
    assert endpoint.ask("GET", "/healthz", key="")[0] == 200
    assert endpoint.ask("GET", "/readyz", key="")[0] == 200
    for method, path in [("GET", "/v1/model"), ("POST", "/v1/slices"), ("GET", "/v1/tomograms/x")]:
        status, problem = endpoint.ask(method, path, images[0] if method == "POST" else None, key="wrong")
        assert (status, problem["title"]) == (401, "Unauthorized")


def test_a_tomogram_comes_back_with_its_motors(endpoint, tmp_path):
    simulate_archive(str(tmp_path), 1, 3, (20, 96, 96), "mrc", voxel_spacing_angstrom=24.0, motor_counts=[1])
    (volume,) = (tmp_path / "train").glob("*.mrc")
    status, job = endpoint.ask("POST", "/v1/tomograms?name=mine.mrc", volume.read_bytes())
    assert (status, job["status"], job["size_z"]) == (202, "queued", 20)
    ends = time.monotonic() + 60
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < ends
        time.sleep(0.2)
        status, job = endpoint.ask("GET", f"/v1/tomograms/{job['id']}")
    assert (job["status"], job["problem"], job["slices_done"]) == ("done", None, job["slices_planned"])
    assert job["failures"] == []
    assert endpoint.ask("DELETE", f"/v1/tomograms/{job['id']}") == (204, None)
    assert endpoint.ask("GET", f"/v1/tomograms/{job['id']}")[0] == 404


def test_all_figures_of_the_dashboard_are_there(endpoint, images):
    assert endpoint.ask("POST", "/v1/slices?threshold=0", images[0])[1]["detections"]
    said = endpoint.log.read_text().split("http://")[2].split("/metrics")[0]
    host, port = said.rsplit(":", 1)
    wanted = set(re.findall(r"ray_[a-z_]+", (CLUSTER / "grafana.json").read_text()))
    missing, ends = wanted, time.monotonic() + 60
    while missing and time.monotonic() < ends:
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("GET", "/metrics")
        missing = wanted - set(re.findall(r"^ray_[a-z_]+", connection.getresponse().read().decode(), re.MULTILINE))
        connection.close()
        time.sleep(1)
    assert missing == set()


def test_a_large_image_comes_through(endpoint):
    """Larger than what gRPC, which Serve's processes speak with one another, takes by default."""
    ok, data = cv2.imencode(".tiff", np.random.default_rng(0).integers(0, 2**16, (1800, 1800), dtype=np.uint16))
    assert ok
    assert data.nbytes > 5 * 2**20
    status, answer = endpoint.ask("POST", "/v1/slices", data.tobytes())
    assert (status, answer["height"]) == (200, 1800)


def test_bad_input_is_the_clients_fault(endpoint):
    status, problem = endpoint.ask("POST", "/v1/slices", b"no image")
    assert (status, problem["status"]) == (422, 422)
    assert "expected a JPEG, PNG or TIFF" in problem["detail"]


def test_a_killed_detector_is_replaced_and_no_request_fails(endpoint, checkpoint, images):
    with Hammer(endpoint, images, [direct(checkpoint, images)]) as hammer:
        for _ in range(2):
            until_answered(hammer, 5)
            (detector,) = detectors(endpoint)
            detector.send_signal(signal.SIGKILL)
            detector.wait(10)
        until_answered(hammer, 5)
    assert hammer.wrong == []


def detectors(endpoint: Endpoint) -> list[psutil.Process]:
    below = psutil.Process(endpoint.process.pid).children(recursive=True)
    return [one for one in below if one.is_running() and "motor_ray:Detector" in " ".join(one.cmdline())]


def test_another_model_takes_over_without_a_failed_request_and_keys_stay(
    endpoint, checkpoint, other_checkpoint, images
):
    ways = [direct(checkpoint, images), direct(other_checkpoint, images)]
    with Hammer(endpoint, images, ways) as hammer:
        until_answered(hammer, 5)
        asked = command("--model", other_checkpoint, "--port", str(endpoint.port))
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        until_answered(hammer, 5)
    assert hammer.wrong == []
    assert hammer.models[-1] == ways[1][0]["model"]
    assert endpoint.ask("GET", "/v1/model")[1]["sha256"].startswith(ways[1][0]["model"])
    assert endpoint.ask("GET", "/v1/model", key="")[0] == 401


def test_the_running_endpoint_is_not_changed_by_the_way(endpoint, checkpoint):
    asked = command("--model", checkpoint, "--port", str(endpoint.port), "--serve.queue", "100")
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "serve.queue is 64, not 100; stop it first" in done.stderr


def test_it_stops_when_it_is_told_to_and_leaves_nothing_behind(endpoint):
    """The last test of this file."""
    below = psutil.Process(endpoint.process.pid).children(recursive=True)
    done = subprocess.run(command("--stop", "--port", str(endpoint.port)), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["stopped"] == endpoint.process.pid
    said, _ = endpoint.process.communicate(timeout=60)
    assert endpoint.process.returncode == 0
    assert json.loads(said)["stopped"]
    _, alive = psutil.wait_procs(below, timeout=20)
    assert [one.name() for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


def test_a_misspelt_setting_in_a_serve_file_is_refused(checkpoint):
    from motor_ray.distributed.serving import build
    from motor_ray.errors import ConfigError

    with pytest.raises(ConfigError, match=r"args: serve\.max_detector: unknown setting; did you mean max_detectors"):
        build({"serve": {"models": {"default": checkpoint}, "max_detector": 3}})


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"detector_cpus": 4}, "1 detectors are wanted, each of 4 CPUs and 0 GPUs of one node, .* nodes hold 0"),
        ({"detector_cpus": 2, "min_detectors": 3, "max_detectors": 3}, "3 detectors .* nodes hold 2"),
    ],
)
def test_detectors_that_no_node_can_hold_are_refused_though_all_together_could(flags, complaint, monkeypatch):
    """Serve would wait for ever for such a node."""
    from motor_ray.distributed import endpoint, serving
    from motor_ray.errors import RunError
    from motor_ray.service.settings import ServeSettings, ServiceSettings

    monkeypatch.setattr(serving, "gpus", lambda: 0)
    monkeypatch.setattr(endpoint, "possible_nodes", lambda: [{"CPU": 3.0}, {"CPU": 2.0}, {"memory": 1e9}])
    with pytest.raises(RunError, match=f"serve.min_detectors: {complaint}"):
        endpoint.require_detectors(ServiceSettings(serve=ServeSettings(**flags)))
    endpoint.require_detectors(ServiceSettings(serve=ServeSettings(detector_cpus=2, min_detectors=2, max_detectors=8)))


def test_the_serve_file_of_the_repository_is_what_its_own_settings_give():
    from motor_ray.distributed.serve_file import serve_file
    from motor_ray.service.settings import ServiceSettings

    text = (CLUSTER / "serve.yaml").read_text()
    (application,) = yaml.safe_load(text)["applications"]
    assert serve_file(ServiceSettings.model_validate(application["args"])) == text


def test_a_key_that_ray_would_ignore_is_noticed():
    from motor_ray.distributed.serve_file import check_serve_file

    values = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    check_serve_file(values)
    for place in (values, values["http_options"], values["applications"][0]):
        with pytest.raises(ValueError, match="max_queue: unknown to Ray Serve"):
            check_serve_file(_with(values, place, "max_queue", 3))


def _with(values: dict[str, Any], place: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of `values` in which `place` has one more entry."""
    place[name] = value
    changed = json.loads(json.dumps(values))
    del place[name]
    return dict(changed)
