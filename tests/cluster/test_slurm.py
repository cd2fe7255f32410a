"""The Slurm files: sound shell, requeued when time is up, and going on where they stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import torch

from motor_ray.archive.simulate import simulate_archive
from motor_ray.cli import VERBS, parse
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.model import build_model
from tests.cluster.files import CLUSTER, ROOT, SHELLCHECK
from tests.machines import DEVICE, machines

SLURM = CLUSTER / "slurm"
BATCHES = sorted(SLURM.glob("*.sbatch"))
each = pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.stem)

NODES = ("mr-slurm-1", "mr-slurm-2")
NETWORK = "10.77.6"
ADDRESSES = (f"{NETWORK}.1", f"{NETWORK}.2")
JOB_ID = str(os.getpid())

SMALL = settings_from(
    {
        "frame": {"size": 96},
        "targets": {"box_pixels": 32},
        "model": {"backbone": "resnet18", "pretrained": "none", "neck_channels": 8, "head_channels": 8},
        # One worker on each node, for two do not fit on one.
        "train": {"epochs": 12, "batch_size": 4, "slices_per_motor": 3, "tomograms": "no", "worker_cpus": 3},
        "detect": {"score_threshold": 0.01, "slab_slices": 1, "exhaustive": True, "loaders": 1, "scorers": 1},
    }
)

SRUN = """\
#!/bin/bash
# Stands in for Slurm's srun: the command on both nodes, the first of which this is.
[ "$(readlink /proc/self/ns/pid)" != "$OUTSIDE" ] || exit 97  # else Ray would end the Ray of others
while [[ $1 == --* ]]; do shift; done
{ export -p; printf '%q ' "$@"; } > "$STEPS/step.tmp"
mv "$STEPS/step.tmp" "$STEPS/step.sh"
"$@"
code=$?
while [ -e "$STEPS/step.sh" ]; do sleep 0.2; done
exit "$code"
"""

SLURMD = """\
#!/bin/bash
# Stands in for Slurm's daemon on the second node: runs what srun leaves for it, with a /tmp/ray-... of its own.
mkdir -p "/tmp/ray-$SLURM_JOB_ID"
mount -t tmpfs none "/tmp/ray-$SLURM_JOB_ID"
while true; do
    while [ ! -e "$STEPS/step.sh" ]; do sleep 0.2; done
    bash "$STEPS/step.sh" >> "$STEPS/second.log" 2>&1
    rm "$STEPS/step.sh"
done
"""

SCONTROL = """\
#!/bin/bash
# Stands in for Slurm's scontrol: says what it was asked; the test then does as Slurm would.
echo "$@" >> "$SCONTROL_LOG"
"""


def directives(batch: Path) -> dict[str, str]:
    """What the head of a batch file asks of Slurm."""
    said = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", batch.read_text(), re.MULTILINE)
    return dict(said)


def test_there_is_a_batch_for_what_takes_long():
    assert {batch.stem for batch in BATCHES} == {"train", "detect"}


@pytest.mark.parametrize("file", [*BATCHES, SLURM / "on_ray.sh"], ids=lambda file: file.name)
def test_it_is_sound_shell(file):
    subprocess.run([SHELLCHECK, "--shell=bash", "--severity=warning", "-x", str(file)], cwd=ROOT, check=True)


@each
def test_slurm_starts_it_again_and_tells_it_in_time(batch):
    asked = directives(batch)
    assert "requeue" in asked
    assert "exclusive" in asked, "Ray finds any other Ray on the machine, and refuses"
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])
    assert asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == "1"
    lines = batch.read_text().splitlines()
    assert all(
        line.startswith("#") for line in lines[: 1 + max(i for i, line in enumerate(lines) if "#SBATCH" in line)]
    )


@each
def test_its_command_is_one_that_the_verb_understands(batch, monkeypatch):
    """Bash itself fills in the command."""
    monkeypatch.chdir(ROOT)
    text = batch.read_text().replace('source "${MOTOR_RAY_ENV:-.venv}/bin/activate"', "")
    text = text.replace("source cluster/slurm/on_ray.sh", "on_ray() { printf '%s\\n' \"$@\"; }")
    environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "4", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
    python, module, cli, verb, *options = done.stdout.splitlines()
    assert (python, module, cli, verb) == ("python", "-m", "motor_ray.cli", batch.stem)
    assert isinstance(parse([verb, *options]), VERBS[verb])
    assert ("--or-resume" in options) == (verb == "train")


class Job(NamedTuple):
    """A batch file as Slurm would start it on two nodes."""

    first: subprocess.Popen[bytes]
    second: subprocess.Popen[bytes]
    folder: Path

    @property
    def log(self) -> str:
        return "\n".join((self.folder / name).read_text()[-5000:] for name in ("job.log", "second.log"))

    @property
    def requeued(self) -> list[str]:
        asked = self.folder / "scontrol.log"
        return asked.read_text().splitlines() if asked.exists() else []

    def script(self) -> int:
        """The process id of the batch script, which is the first process of the node's namespace."""
        [child] = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        return int(child)

    def end(self) -> None:
        """As Slurm ends a job: all that it has started, on both nodes."""
        for node in (self.first, self.second):
            node.kill()  # with it goes the namespace, and whatever is in it
            node.wait(timeout=30)
        (self.folder / "step.sh").unlink(missing_ok=True)


@pytest.fixture
def two_nodes() -> Iterator[None]:
    """Two machines with a network between them."""
    if not shutil.which("unshare"):
        pytest.skip("takes unshare, to make two machines out of one")
    with machines(list(NODES), NETWORK):
        yield


def start(batch: str, folder: Path, places: dict[str, str], options: list[str], restarts: int) -> Job:
    """Start a batch file on the first node. Each node sees its own processes alone: Ray ends all that it sees."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("slurmd", SLURMD)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    activate = folder / "env" / "bin" / "activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.write_text(f"export PATH={tools}:{Path(sys.executable).parent}:$PATH\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    environment |= places | {
        "MOTOR_RAY_ENV": str(folder / "env"),
        "MOTOR_RAY_INTERFACE": DEVICE,  # both machines have the name of the real one
        "OUTSIDE": os.readlink("/proc/self/ns/pid"),
        "STEPS": str(folder),
        "SCONTROL_LOG": str(folder / "scontrol.log"),
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_MEM_PER_NODE": "4000",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_RESTART_COUNT": str(restarts),
        "RAY_USAGE_STATS_ENABLED": "0",
    }

    def on(node: str, log: str, *command: str) -> subprocess.Popen[bytes]:
        inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", *command]
        with (folder / log).open("ab") as file:
            return subprocess.Popen(["ip", "netns", "exec", node, *inside], env=environment, stdout=file, stderr=file)

    second = on(NODES[1], "second.log", str(tools / "slurmd"))
    return Job(on(NODES[0], "job.log", str(SLURM / f"{batch}.sbatch"), *options), second, folder)


def wait_for(what: str, happens, job: Job, seconds: float) -> None:
    """Wait until something has happened; AssertionError, with what the job said, if the job or the time ends before."""
    ends = time.monotonic() + seconds
    while not happens():
        assert job.first.poll() is None, f"ended before {what}:\n{job.log}"
        assert time.monotonic() < ends, f"no {what} in {seconds} s:\n{job.log}"
        time.sleep(0.1)


def twice(batch: str, folder: Path, places: dict[str, str], options: list[str], begun: str) -> Job:
    """Run a batch file whose time is up once something matches `begun`, and again as Slurm does; the second, ended."""
    job = start(batch, folder, places, options, restarts=0)
    try:
        wait_for(begun, lambda: any(folder.glob(begun)), job, 300)
        os.kill(job.script(), signal.SIGUSR1)
        wait_for("being queued again", lambda: job.requeued, job, 60)
    finally:
        job.end()
    assert job.requeued == [f"requeue {JOB_ID}"]
    again = start(batch, folder, places, options, restarts=1)
    try:
        wait_for("end", lambda: again.first.poll() is not None, again, 400)
    finally:
        again.end()
    assert again.first.returncode == 0, again.log
    assert len(again.requeued) == 1, "none but that of the first"
    second = (folder / "second.log").read_text()
    assert second.count("Ray runtime started") == 2, "the second node was there both times"
    assert not list(Path("/tmp").glob(f"ray-{JOB_ID}/*")), "cleared away after success"
    return again


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_nodes")
def test_a_detection_on_two_nodes_whose_time_is_up_goes_on_when_slurm_starts_it_again(tmp_path):
    simulate_archive(str(tmp_path / "archive"), 40, 1, (20, 96, 96), voxel_spacing_angstrom=24.0, processes=1)
    torch.manual_seed(0)
    save_checkpoint(str(tmp_path / "model"), build_model(SMALL.model), SMALL, {})
    (tmp_path / "settings.yaml").write_text(json.dumps({"detect": SMALL.detect.model_dump(mode="json")}))
    out = tmp_path / "found"
    places = {"ARCHIVE": str(tmp_path / "archive" / "train"), "MODEL": str(tmp_path / "model"), "OUT": str(out)}
    options = ["--config", str(tmp_path / "settings.yaml")]

    twice("detect", tmp_path, places, options, "found/slabs/**/*.parquet")
    slabs = pq.read_table(out / "slabs").column("slab_id").to_pylist()
    assert len(slabs) == len(set(slabs)) == 40 * 20
    assert (out / "motors.parquet").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_nodes")
def test_a_training_on_two_nodes_whose_time_is_up_goes_on_when_slurm_starts_it_again(tmp_path):
    archive, counts = str(tmp_path / "archive"), [1, 0, 2, 1, 0, 1, 1, 0, 1, 1, 1, 2]
    simulate_archive(archive, 12, 1, (20, 96, 96), voxel_spacing_angstrom=24.0, motor_counts=counts, processes=1)
    (tmp_path / "settings.yaml").write_text(json.dumps(SMALL.model_dump(mode="json")))
    places = {
        "ARCHIVE": str(tmp_path / "archive" / "train"),
        "LABELS": str(tmp_path / "archive" / "train_labels.csv"),
        "STORAGE": str(tmp_path / "runs"),
        "NAME": "small",
        "CONFIG": str(tmp_path / "settings.yaml"),
    }
    again = twice("train", tmp_path, places, [], "runs/small/best/model.safetensors")
    log = (again.folder / "job.log").read_text()
    assert all(log.count(f"(ip={address}, pid=") >= 2 for address in ADDRESSES), "a worker on each, both times"
    run = json.loads((tmp_path / "runs" / "small" / "run.json").read_text())
    assert run["epochs"] == 12
    went_on = log.partition("queued again")[2]
    assert "of 12, loss" in went_on
    assert " epoch 1 of 12" not in went_on
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
