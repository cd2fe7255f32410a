"""A recipe opens with the command that runs it, and the command can be given as it stands."""

import re
import shlex
from pathlib import Path

import pytest

from motor_ray.cli import parse
from motor_ray.config import RunSettings
from motor_ray.config_values import read_settings
from motor_ray.verbs.training import Train, workers_from

RECIPES = sorted((Path(__file__).parents[1] / "jobs" / "recipes").glob("*.yaml"))


def head_of(recipe: Path) -> str:
    lines = recipe.read_text().splitlines()
    return "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))


def commands_of(recipe: Path) -> list[list[str]]:
    """The commands in a recipe's head, as a shell would split them."""
    joined = head_of(recipe).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in joined.splitlines() if line.strip().startswith("motor-ray ")]


def test_there_are_recipes():
    assert {"resnet101", "kaggle", "quick"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_its_command_what_it_needs_and_what_to_expect(recipe, monkeypatch):
    monkeypatch.chdir(recipe.parents[2])
    verbs = [parse(command) for command in commands_of(recipe)]
    [train] = [verb for verb in verbs if isinstance(verb, Train)]
    assert train.config == f"jobs/recipes/{recipe.name}"
    fewest, most = workers_from(train.workers)
    assert 1 <= fewest <= most
    assert train.settings.train == read_settings(recipe).train
    assert re.search(r"^ Needs +\w", head_of(recipe), re.MULTILINE)
    assert re.search(r"^ Expect +\w", head_of(recipe), re.MULTILINE)
    assert "QUICK_EXPECT" not in head_of(recipe)


def test_the_published_recipe_is_the_default():
    recipe = read_settings(Path(__file__).parents[1] / "jobs" / "recipes" / "resnet101.yaml")
    assert recipe == RunSettings()
