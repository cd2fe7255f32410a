"""Jobs can be given to a cluster as they stand."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from motor_ray.cli import VERBS, parse
from motor_ray.distributed.job_file import Job, check_command, entrypoint, read_job, submission_id
from motor_ray.errors import ConfigError

JOBS = Path(__file__).parents[1] / "jobs"
SCRIPTS = sorted(JOBS.glob("*.py"))
FILES = sorted(JOBS.glob("*.yaml"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_a_command_that_its_verb_understands(script, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    (command,) = re.findall(r"ray job submit (?:.*\\\n)*.*", text)
    words = shlex.split(command.replace("\\\n", " "))
    given = words[words.index("--") + 1 :]
    assert given[:2] == ["python", f"jobs/{script.name}"]
    assert words[words.index("--submission-id") + 1]
    assert isinstance(parse([script.stem, *given[2:]]), VERBS[script.stem])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_its_verb(script):
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert f"usage: motor-ray {script.stem}" in done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_job_file_gives_a_command_that_its_verb_understands(file, tmp_path, monkeypatch):
    job = read_job(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("{}")
    python, module, cli, verb, *options = shlex.split(entrypoint(job))
    assert (python, module, cli, verb) == ("python", "-m", "motor_ray.cli", file.stem)
    assert isinstance(parse([verb, *options]), VERBS[verb])


def test_every_verb_that_takes_long_has_a_script_and_a_job():
    long = {"train", "detect", "ablate", "tune", "pretrain", "pseudo-label"}
    assert {file.stem for file in FILES} == long
    assert {script.stem for script in SCRIPTS} == long | {"evaluate", "serve"}


def test_the_same_job_has_the_same_id_and_another_another():
    job = Job(command="detect --archive a --model m --out s3://bucket/Found")
    assert submission_id(job) == submission_id(Job(command="detect  --archive a --model 'm' --out s3://bucket/Found"))
    assert re.fullmatch(r"motor-ray-detect-s3-bucket-found-[0-9a-f]{8}", submission_id(job))
    others = [
        Job(command="detect --archive b --model m --out s3://bucket/Found"),
        Job(command=job.command, settings={"detect": {"exhaustive": True}}),
    ]
    assert len({submission_id(one) for one in [job, *others]}) == 3


def test_training_that_is_started_again_goes_on():
    train = Job(command="train --archive a --labels l --storage s --name n")
    assert shlex.split(entrypoint(train))[-1] == "--or-resume"
    assert "--or-resume" not in entrypoint(Job(command="train --archive a --labels l --storage s --name n --resume"))
    assert "resume" not in entrypoint(Job(command="detect --archive a --model m --out o"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command: evaluate --detections d", "command begins with 'evaluate', expected one of train"),
        ("command: ''", "command begins with 'nothing'"),
        ("command: detect 'a", "No closing quotation"),
        ("command: detect --config x.yaml", "put the settings, or the file's name, under settings"),
        ("comand: detect", "did you mean command"),
        ("{command: detect, settings: nowhere.yaml}", "nowhere.yaml: cannot be read"),
        ("{command: detect, attempts: 0}", "attempts"),
        ("- detect", "expected groups of settings"),
    ],
)
def test_a_wrong_job_file_is_refused_before_anything_is_submitted(text, message, tmp_path):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_job(tmp_path / "job.yaml")


def test_the_settings_of_a_job_may_stand_in_it():
    job = Job(command="detect --archive a --model m --out o", settings={"detect": {"exhaustive": True}})
    check_command(job, "job")
    assert job.settings == {"detect": {"exhaustive": True}}
