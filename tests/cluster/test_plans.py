"""The forecasts in cluster/README.md are what `motor-ray plan` says."""

import json
import re
import shlex
from pathlib import Path

import pytest

from motor_ray.cli import main

README = Path(__file__).parents[2] / "cluster" / "README.md"


def plans():
    """Each row of the table: the command's arguments, and the other cells."""
    table = README.read_text().split("<!-- plans -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return [pytest.param(shlex.split(command.strip("`"))[1:], cells, id=cells[1]) for command, *cells in rows]


@pytest.mark.parametrize(("arguments", "cells"), plans())
def test_a_forecast_is_what_its_command_says(arguments, cells, capsys):
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    hours, requests, terabytes, bottleneck, cpus = cells
    assert said["hours"] == pytest.approx(float(hours), rel=0.03)
    assert said["requests"] == int(re.sub(",", "", requests))
    assert said["bytes"] / 1e12 == pytest.approx(float(terabytes), abs=0.005)
    assert said["bottleneck"] == bottleneck
    assert said["balance"]["cpus_per_gpu"] == pytest.approx(float(cpus), abs=0.5)
