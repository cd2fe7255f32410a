"""Jobs on a real Ray head with its dashboard: handed in, looked after, killed, and started again."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobDetails, JobStatus

from motor_ray.distributed.job_file import read_job
from motor_ray.distributed.serve_environment import free_port
from motor_ray.distributed.submit import DONE_WITH_LOSSES, connect, is_worth_another
from motor_ray.errors import ConfigError, RunError
from motor_ray.storage import read_table

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address at which a cluster takes jobs, whose ``python`` is this one, as in an image of ours."""
    here = pytest.MonkeyPatch()
    here.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    port = free_port()
    head = {
        "num_cpus": 8,
        "include_dashboard": True,
        "dashboard_port": port,
        "dashboard_agent_listen_port": free_port(),
        "object_store_memory": 200 * 10**6,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()
    cluster.shutdown()
    here.undo()


def job_file(folder: Path, command: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps({"command": command, "environment": ["HOME"]}))
    return path


def submit(file: Path, address: str, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "motor_ray.cli", "submit", str(file), "--address", address, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(happens: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Wait for something that comes as long as `process` goes on."""
    ends = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < ends
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def drivers(out: Path) -> list[psutil.Process]:
    """Processes of jobs that write to `out`."""
    found = []
    for one in psutil.process_iter(["cmdline"]):
        words = one.info["cmdline"] or []
        if "motor_ray.cli" in words and "detect" in words and str(out) in words and words[0].endswith("python"):
            found.append(one)
    return found


@pytest.mark.slow
def test_a_job_that_is_killed_is_started_again_and_a_second_submit_looks_after_the_first(
    dashboard, archive, checkpoint, tmp_path
):
    out = tmp_path / "found"
    file = job_file(tmp_path, f"detect --archive {archive.uri} --model {checkpoint} --out {out}")
    with submit(file, dashboard) as first:
        until(lambda: (out / "run.json").exists(), first)
        with submit(file, dashboard) as second:
            for one in drivers(out):
                os.kill(one.pid, signal.SIGKILL)
            said, complaint = first.communicate(timeout=240)
            assert first.returncode == 0, complaint
            said_too, complaint_too = second.communicate(timeout=60)
            assert second.returncode == 0, complaint_too
    result = json.loads(said)
    assert (result["status"], result["attempts"]) == ("SUCCEEDED", 2)
    assert json.loads(said_too)["job"] == result["job"]
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    assert len(set(read_table(str(out / "slabs"))["slab_id"].to_pylist())) == len(read_table(str(out / "slabs")))
    with submit(file, dashboard) as again:
        said, _ = again.communicate(timeout=60)
        assert json.loads(said) == result
    assert os.environ["HOME"] not in complaint.replace(str(tmp_path), "")


def test_wrong_input_is_not_tried_again(dashboard, tmp_path):
    file = job_file(tmp_path, f"detect --archive {tmp_path}/nothing --model m --out {tmp_path}/found")
    with submit(file, dashboard) as process:
        said, complaint = process.communicate(timeout=120)
    assert (process.returncode, said) == (2, "")
    assert "there is nothing here" in complaint
    assert "its command or its input is wrong" in complaint
    assert "-2: " not in complaint


def test_ctrl_c_leaves_the_job_and_stop_ends_it(dashboard, archive, checkpoint, tmp_path):
    out = tmp_path / "found"
    file = job_file(tmp_path, f"detect --archive {archive.uri} --model {checkpoint} --out {out}")
    with submit(file, dashboard) as process:
        until(lambda: drivers(out), process)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on; the same command looks after it again" in complaint
    with submit(file, dashboard, "--stop") as process:
        said, complaint = process.communicate(timeout=60)
    assert json.loads(said)["status"] == "STOPPED", complaint
    _, alive = psutil.wait_procs(drivers(out), timeout=30)
    assert not alive


@pytest.mark.slow
def test_a_job_that_ends_with_losses_is_done_and_not_tried_again(dashboard, damaged, checkpoint, tmp_path):
    file = job_file(tmp_path, f"detect --archive {damaged} --model {checkpoint} --out {tmp_path}/found")
    with submit(file, dashboard) as process:
        said, complaint = process.communicate(timeout=240)
    assert process.returncode == 1, complaint
    result = json.loads(said)
    assert (result["status"], result["attempts"]) == ("SUCCEEDED, but something could not be read; see its log", 1)


@pytest.mark.parametrize(
    ("code", "again"),
    [(None, True), (-9, True), (1, True), (DONE_WITH_LOSSES, False), (2, False)],
    ids=["its node died", "it was killed", "it could not go on", "something was lost", "it was wrong"],
)
def test_only_a_job_that_did_not_come_to_its_end_is_tried_again(tmp_path, code, again):
    job = read_job(str(job_file(tmp_path, "detect --archive a --model m --out o")))
    ended = JobDetails(type="SUBMISSION", entrypoint="", status=JobStatus.FAILED, driver_exit_code=code)
    assert is_worth_another(ended, 1, job) == again
    assert not is_worth_another(ended, job.attempts, job)
    assert is_worth_another(ended, 0, job)  # what came before may have been put right


@pytest.mark.parametrize(
    ("status", "complaint"), [(401, "asks for a token"), (403, "asks for a token"), (502, "no Ray cluster answers")]
)
def test_a_cluster_that_does_not_let_us_in_is_named(status, complaint):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(RunError, match=f"^{address}: .*{complaint}"):
            connect(address)
        server.shutdown()


def test_what_is_no_dashboards_address_is_refused():
    with pytest.raises(ConfigError, match=r"--address head:8265: give the address of .* such as http://head:8265"):
        connect("head:8265")


def test_a_cluster_that_does_not_answer_is_named(tmp_path):
    file = job_file(tmp_path, "detect --archive a --model m --out o")
    with submit(file, f"http://127.0.0.1:{free_port()}") as process:
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "no Ray cluster answers" in complaint
