"""How many cores a process may use, told by control groups that are files of the test's own."""

import math
import os

import pytest

from motor_ray import machine
from motor_ray.machine import cores, granted_cpus


@pytest.fixture
def told(tmp_path):
    """Makes control groups by name, of which the process is in the last, and has the machine ask them."""

    def tell(**limits: str) -> tuple[str, str]:
        group = tmp_path / "groups"
        for name, limit in limits.items():
            group = group if name == "root" else group / name
            group.mkdir(parents=True, exist_ok=True)
            (group / "cpu.max").write_text(f"{limit}\n")
        inside = str(group).removeprefix(str(tmp_path / "groups")) or "/"
        (tmp_path / "membership").write_text(f"1:cpu:/else\n0::{inside}\n")
        return str(tmp_path / "membership"), str(tmp_path / "groups")

    return tell


@pytest.mark.parametrize(
    ("limits", "cpus"),
    [
        ({"root": "200000 100000"}, 2),  # as a container sees itself
        ({"pod": "max 100000", "container": "50000 100000"}, 0.5),
        ({"pod": "300000 100000", "container": "max 100000"}, 3),
        ({"pod": "300000 100000", "container": "800000 100000"}, 3),
        ({"pod": "max 100000"}, math.inf),
        ({"pod": "not what it should be"}, math.inf),
    ],
    ids=str,
)
def test_the_tightest_limit_of_all_groups_above_holds(told, limits, cpus):
    assert granted_cpus(*told(**limits)) == cpus


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert granted_cpus(str(tmp_path / "none"), str(tmp_path / "none")) == math.inf


def test_a_group_that_is_out_of_sight_leaves_what_the_container_sees(tmp_path, told):
    membership, groups = told(root="200000 100000")
    (tmp_path / "membership").write_text("0::/../far/away\n")
    assert granted_cpus(membership, groups) == 2


@pytest.mark.parametrize(("granted", "used"), [(math.inf, 8), (16.0, 8), (3.0, 3), (1.5, 2), (0.2, 1)])
def test_a_container_has_the_cores_it_was_given_and_a_share_of_one_counts_as_one(monkeypatch, granted, used):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "granted_cpus", lambda: granted)
    assert cores() == used
