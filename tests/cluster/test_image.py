"""The image's recipe and its lock: what it copies is there, what it installs is what pyproject.toml asks for."""

import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from motor_ray import __version__
from motor_ray.distributed.serve_environment import variables
from motor_ray.service.settings import ServeSettings
from tests.cluster.files import CLUSTER, ROOT

LOCK = CLUSTER / "image" / "requirements.lock"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, a line each."""
    lines = [line for line in (CLUSTER / "image" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, rest in words]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, the last one's by an empty one."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            current = found[rest.partition(" AS ")[2]] = []
        elif found:
            current.append((word, rest))
    return found


def locked() -> dict[str, Version]:
    """Every package of the lock with its version."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+) \\$", LOCK.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_the_image_is_built_in_stages_that_exist():
    known = {"${BASE}"} | set(stages())
    used = {rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"}
    used |= {source for word, rest in instructions() for source in re.findall(r"--from=(\S+)", rest) if word == "COPY"}
    variants = {one.replace("${VARIANT}", variant) for one in used for variant in ("cuda", "cpu")}
    assert variants <= known
    assert list(stages())[-1] == "", "what is kept comes last"


def test_arguments_are_declared_and_used():
    declared = {rest.split("=")[0] for word, rest in instructions() if word == "ARG"}
    used = set(re.findall(r"\$\{([A-Z_]+)\}", " ".join(rest for _, rest in instructions())))
    assert declared == used == {"BASE", "VARIANT", "TORCH_INDEX", "HATCHLING"}


def test_the_image_runs_as_nobody_of_importance_and_names_its_base():
    final = stages()[""]
    assert [rest for word, rest in final if word == "USER"] == ["1000:1000"]
    assert final.index(("USER", "1000:1000")) > max(i for i, (word, _) in enumerate(final) if word in ("RUN", "COPY"))
    [base] = [rest for word, rest in instructions() if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.\d+-slim-\w+", base)
    assert "latest" not in str(instructions())
    python = PYPROJECT["requires-python"].removeprefix(">=")
    assert f"python:{python}-" in base


def test_what_is_copied_is_there_and_reaches_the_builder():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    ]
    assert sorted(copied) == sorted(let_in), "and nothing is sent there in vain"
    assert all((ROOT / source).exists() for source in copied)
    [wheel] = [PYPROJECT[key] for key in ("readme",)]
    assert {wheel, *PYPROJECT["license-files"]} <= set(copied), "hatchling reads them"


def test_serves_variables_are_set_and_nothing_secret():
    [environment] = [rest for word, rest in stages()[""] if word == "ENV"]
    given = dict(word.split("=", 1) for word in shlex.split(environment))
    assert variables(ServeSettings()).items() <= given.items()
    assert not [name for name in given if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]


def test_the_tags_are_this_version():
    text = (CLUSTER / "image" / "Dockerfile").read_text()
    assert set(re.findall(r"motor-ray:([\w.-]+)", text)) == {__version__, f"{__version__}-cpu"}


def requirements() -> list[Requirement]:
    extras = PYPROJECT["optional-dependencies"]
    listed = [*PYPROJECT["dependencies"], *extras["fast"], *extras["mlflow"]]
    launcher = (CLUSTER / "image" / "launcher.in").read_text().splitlines()
    return [Requirement(line) for line in [*listed, *(line for line in launcher if not line.startswith("#"))]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_lock_has_what_is_asked_for(requirement):
    assert requirement.specifier.contains(locked()[canonicalize_name(requirement.name)])


def test_every_package_of_the_lock_is_exact_and_has_hashes():
    text = LOCK.read_text()
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    assert len(blocks) == len(locked()) > 100
    assert all(re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", block) for block in blocks)
    assert "://" not in text
    assert "motor-ray==" not in text


def test_the_lock_says_by_which_command_it_was_made():
    head = LOCK.read_text().splitlines()[1]
    assert head.endswith("--output-file cluster/image/requirements.lock")
    assert all(word in head for word in ("launcher.in", "--extra fast", "--extra mlflow", "--generate-hashes"))
    command = head.removeprefix("#").strip().replace(" && ", "\n").splitlines()
    readme = " ".join((CLUSTER / "README.md").read_text().replace("\\\n", " ").split())
    assert all(" ".join(line.split()) in readme for line in command)


def test_for_cpus_torch_is_left_to_its_own_index_and_all_else_stays():
    [run] = [rest for word, rest in stages()["packages-cpu"] if word == "RUN"]
    [awk] = re.findall(r"awk '([^']+)'", run)
    [sed] = re.findall(r"sed -nE '([^']+)'", run)
    kept = subprocess.run(["awk", awk, str(LOCK)], capture_output=True, text=True, check=True).stdout
    torch = subprocess.run(["sed", "-nE", sed, str(LOCK)], capture_output=True, text=True, check=True).stdout.split()
    versions = locked()
    left = {canonicalize_name(name) for name in re.findall(r"^(\S+)==", kept, re.MULTILINE)}
    gone = set(versions) - left
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(re.fullmatch(r"torch|torchvision|triton|(nvidia|cuda)-.*", name) for name in gone)
    assert "torchmetrics" in left
    assert torch == [f"{name}=={versions[name]}" for name in ("torch", "torchvision")]
    assert kept.count("--hash=") + LOCK.read_text().count("==") > len(left)


def test_nothing_that_is_let_in_is_a_cache():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert any(fnmatch("motor_ray/slices/__pycache__", rule.replace("**", "*")) for rule in rules[2:])
