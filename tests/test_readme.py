"""What the README tells people to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

from motor_ray.cli import VERBS, parse

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^ *```\w*\n(.*?)^ *```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.strip().startswith("motor-ray ") and "..." not in line
]


def test_there_are_commands():
    assert {command.split()[1] for command in COMMANDS} >= {"train", "detect", "serve", "calibrate", "pseudo-label"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # it names recipes
    verb, *arguments = shlex.split(command)[1:]
    assert isinstance(parse([verb, *arguments]), VERBS[verb])
