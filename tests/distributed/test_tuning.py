"""Studies: what an ablation and a search try, what they make of it, and that they go on where they stopped."""

import json
import time
from types import SimpleNamespace
from typing import cast

import pytest
import ray
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial

from motor_ray.archive.manifest import make_manifest
from motor_ray.config import RunSettings
from motor_ray.config_values import read_settings, settings_from
from motor_ray.distributed.ablation import (
    PARTS,
    Estimate,
    ablate,
    ablation_trials,
    estimate,
    markdown,
    table_rows,
    variants,
)
from motor_ray.distributed.progress import Board
from motor_ray.distributed.study import SCORES, TOMOGRAM_SCORES, Study, Trial, changed, open_study, outcome
from motor_ray.distributed.trials import Halving, at_a_time
from motor_ray.distributed.tuning import as_yaml, best_trial, search_space, tune, tuning_trials
from motor_ray.distributed.tuning import markdown as tuning_markdown
from motor_ray.errors import ConfigError, RunError
from motor_ray.storage import write_json

NO_SCORES = dict.fromkeys((*SCORES, *TOMOGRAM_SCORES))


def trial(variant="plain", seed=1, score=0.5, **values):
    scores = NO_SCORES | {"mAP@0.5": score}
    changes = {"train": {"seed": seed}}
    told = {"name": f"{variant}-{seed}", "variant": variant, "changes": changes, "status": "done", "scores": scores}
    return Trial.model_validate(told | values)


def wait_until(holds, seconds=30):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.fixture
def quick(settings):
    """Runs of one epoch, and no look at whole tomograms."""
    train = {"epochs": 1, "tomograms": "no", "tensorboard": False, "slices_per_motor": 2}
    return settings_from(settings.model_dump() | {"train": settings.train.model_dump() | train})


@pytest.fixture
def study(archive, settings, tmp_path):
    manifest = make_manifest(archive.uri, settings.archive)
    return Study(str(tmp_path / "study"), "ablation", manifest, archive.labels, settings, (1, 1))


def test_variants_add_one_part_at_a_time_and_end_in_the_recipe():
    recipe = RunSettings()
    made = [changed(recipe, changes) for changes in variants(recipe).values()]
    plain = made[0]
    assert not plain.preprocess.clahe
    assert (plain.augment.poisson_probability, plain.augment.blur_sigma_max) == (0, 0)
    assert (plain.loss.heatmap, plain.loss.giou_weight) == ("bce", 0)
    for part, before, after in zip(PARTS.values(), made[:-1], made[1:], strict=True):
        assert changed(after, part) == before
        assert before != after
    assert made[-1] == recipe


def test_a_part_that_the_settings_lack_cannot_be_added_to_them():
    with pytest.raises(ConfigError, match=r"without CLAHE already \(preprocess.clahe\)"):
        variants(settings_from({"preprocess": {"clahe": False}}))
    half = settings_from({"loss": {"heatmap": "bce"}})
    assert changed(half, variants(half)["+ focal and GIoU"]) == half


def test_trials_of_a_seed_differ_in_parts_only_and_none_in_the_split():
    made = {one.name: changed(RunSettings(), one.changes) for one in ablation_trials(RunSettings(), seeds=2)}
    assert list(made)[:4] == ["plain-420", "clahe-420", "noise-and-blur-420", "focal-and-giou-420"]
    assert made["focal-and-giou-420"] == RunSettings()
    assert {one.train.seed for name, one in made.items() if name.endswith("-421")} == {421}
    assert {one.train.split_seed for one in made.values()} == {RunSettings().train.split_seed}


def test_the_table_tells_means_deviations_and_gains_seed_by_seed():
    trials = [trial("plain", 1, 0.2), trial("plain", 2, 0.4), trial("+ CLAHE", 1, 0.3), trial("+ CLAHE", 2, 0.5)]
    plain, clahe = table_rows(trials)
    assert str(plain.scores["mAP@0.5"]) == "0.300 ± 0.141"
    assert plain.gain is None
    assert str(clahe.gain) == "0.100 ± 0.000"
    text = markdown([plain, clahe], trials)
    assert "| + CLAHE | 0.400 ± 0.141 | - | - | - | - | - | +0.100 ± 0.000 | 2 |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_failed_trial_is_named_with_its_reason_and_left_out_of_the_means():
    failed = trial("+ CLAHE", 2, None, status="failed", reason="the disk is full", scores={})
    trials = [trial("plain", 1, 0.2), trial("plain", 2, 0.9), trial("+ CLAHE", 1, 0.3), failed]
    clahe = table_rows(trials)[1]
    assert (clahe.done, clahe.trials) == (1, 2)
    assert str(clahe.gain) == "0.100"
    text = markdown(table_rows(trials), trials)
    assert "+0.100 | 1 of 2 |" in text
    assert "+ CLAHE-2 failed: the disk is full" in text


def test_scores_that_are_not_defined_are_dashes_and_no_zeros():
    trials = [trial("plain", 1, None), trial("+ CLAHE", 1, 0.3)]
    plain, clahe = table_rows(trials)
    assert plain.scores["mAP@0.5"] is None
    assert clahe.gain is None
    assert estimate([None, 0.5]) == Estimate(0.5, None)
    assert "| plain | - |" in markdown([plain, clahe], trials)


@pytest.mark.parametrize(
    ("nodes", "worker", "workers", "train", "expected"),
    [
        ([{"CPU": 16}], {"CPU": 1}, 1, {}, 5),  # 1 worker and 2 CPUs for reading each
        ([{"CPU": 16}], {"CPU": 4}, 2, {"worker_cpus": 4}, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"CPU": 2}, 1, {"worker_cpus": 2}, 1),
        ([{"CPU": 64, "GPU": 8}], {"CPU": 1, "GPU": 1}, 2, {}, 4),
        ([{"CPU": 64, "GPU": 8}], {"CPU": 1, "GPU": 1}, 3, {"tomograms": "during"}, 2),
        ([{"CPU": 2}], {"CPU": 1}, 4, {}, 1),
    ],
)
def test_as_many_trials_run_beside_one_another_as_the_nodes_hold(nodes, worker, workers, train, expected):
    assert at_a_time(nodes, worker, workers, settings_from({"train": train})) == expected


def test_trials_worse_than_the_best_third_at_the_same_epoch_are_told_to_end():
    told: list[str] = []
    board = SimpleNamespace(count=lambda name, _: told.append(name))
    halving = Halving(cast(Board, board), epochs=9)

    def report(name: str, epochs: int, score: float) -> None:
        one = cast(TuneTrial, SimpleNamespace(trial_id=name, config={"trial": name}))
        if epochs == 1:
            halving.on_trial_add(cast(TuneController, None), one)
        assert halving.on_trial_result(None, one, {"epochs": epochs, "mAP@0.5": score}) == "CONTINUE"

    for name, score in (("a", 0.5), ("b", 0.6), ("c", 0.4), ("d", 0.7)):
        report(name, 1, score)
    assert told == ["c"]
    report("b", 2, 0.1)
    report("b", 3, 0.1)
    assert told == ["c"]  # nobody has got to the third epoch before
    report("d", 3, 0.05)
    assert told == ["c", "d"]


def test_a_search_begins_with_the_settings_as_they_are_and_stays_within_its_ranges():
    recipe = RunSettings()
    space = search_space(recipe, learning_rate=True)
    trials = tuning_trials(space, 33, seed=1)
    assert changed(recipe, trials[0].changes) == recipe
    for one in space:
        values = [each.changes[one.group][one.name] for each in trials[1:]]
        assert all(one.low * 0.99 <= value <= one.high * 1.01 for value in values)
        assert len(set(values)) == len(values)
    weights = [one for one in space if one.group == "loss"]
    assert {one.name for one in weights} == {"size_weight", "offset_weight", "giou_weight", "presence_weight"}
    assert all(one.at(0.5) == pytest.approx(getattr(recipe.loss, one.name)) for one in weights)


def test_more_trials_are_the_same_ones_and_then_others():
    space = search_space(RunSettings(), learning_rate=False)
    few, many = tuning_trials(space, 5, seed=1), tuning_trials(space, 9, seed=1)
    assert many[:5] == few
    assert tuning_trials(space, 5, seed=2) != few


def test_a_weight_that_is_off_is_not_searched():
    space = search_space(settings_from({"loss": {"giou_weight": 0}}), learning_rate=False)
    assert "giou_weight" not in {one.name for one in space}


def test_the_best_trial_is_one_that_was_trained_to_the_end():
    stopped = trial("a", score=0.9, status="stopped")
    best = trial("c", score=0.6)
    assert best_trial([stopped, trial("b", score=0.5), best, trial("d", score=None)]) == best
    assert best_trial([stopped]) is None


def test_the_table_of_a_search_has_the_best_first_and_failures_last():
    space = search_space(RunSettings(), learning_rate=False)
    first, second, third, fourth = tuning_trials(space, 4, seed=1)
    told = [
        first.model_copy(update={"status": "done", "scores": NO_SCORES | {"mAP@0.5": 0.3}}),
        second.model_copy(update={"status": "stopped", "scores": NO_SCORES | {"mAP@0.5": 0.4}}),
        third.model_copy(update={"status": "done", "scores": NO_SCORES | {"mAP@0.5": 0.5}}),
        fourth.model_copy(update={"status": "failed", "reason": "no"}),
    ]
    lines = [line for line in tuning_markdown(told, space, RunSettings()).splitlines() if line.startswith("| trial-")]
    assert [line.split()[1] for line in lines] == ["trial-002", "trial-000", "trial-001", "trial-003"]
    assert "| 2 | 0.1 | 1 | 1 | 1 | 0.300 |" in lines[1]


def test_the_best_settings_are_a_file_for_config(settings, tmp_path):
    (tmp_path / "best.yaml").write_text(as_yaml(settings))
    assert read_settings(tmp_path / "best.yaml") == settings


def test_what_a_run_says_of_itself_is_what_the_trial_scored(tmp_path):
    best = {**dict.fromkeys(SCORES, 0.5), "epoch": 3}
    run = {"status": "done", "epochs": 7, "best": best, "unread": 2, "validation": {"tomograms": {"f2": 0.8}}}
    waiting = trial(status="waiting", scores={})
    write_json(str(tmp_path / "run.json"), run)
    done = outcome(waiting, str(tmp_path))
    assert (done.status, done.epochs, done.unread) == ("done", 7, 2)
    assert (done.scores["mAP@0.9"], done.scores["tomogram F2"], done.scores["tomogram recall"]) == (0.5, 0.8, None)
    write_json(str(tmp_path / "run.json"), run | {"validation": None})
    assert outcome(waiting, str(tmp_path)).scores["tomogram F2"] is None
    write_json(str(tmp_path / "run.json"), {"status": "running"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(best | {"epoch": epoch}) + "\n" for epoch in range(2)))
    stopped = outcome(waiting, str(tmp_path))
    assert (stopped.status, stopped.epochs, stopped.scores["mAP@0.5"]) == ("stopped", 2, 0.5)


def test_a_study_is_not_overwritten_nor_mixed_with_another(study):
    planned = ablation_trials(study.settings, 1)
    with pytest.raises(RunError, match="there is no ablation to resume"):
        open_study(study, planned, resume=True)
    opened, trials = open_study(study, planned, resume=False)
    assert trials == planned
    done, failed = trial(status="done").model_dump(), trial(status="failed", reason="no").model_dump()
    told = [
        planned[0].model_dump() | {"status": "done", "scores": done["scores"]},
        planned[1].model_dump() | {"status": "failed", "reason": failed["reason"]},
        *(one.model_dump() for one in planned[2:]),
    ]
    content = {
        "settings": study.settings.model_dump(mode="json"),
        "data_hash": study.data_hash,
        "frames": opened.frames,
        "trials": told,
    }
    write_json(study.record, content)
    with pytest.raises(RunError, match="is there already; give another --name, or --resume"):
        open_study(study, planned, resume=False)
    again, trials = open_study(study, planned, resume=True)
    assert again == opened
    assert [one.status for one in trials] == ["done", "waiting", "waiting", "waiting"]
    assert trials[1].reason is None
    assert len(open_study(study, ablation_trials(study.settings, 2), resume=True)[1]) == 8
    with pytest.raises(RunError, match=r"has 4 trials, of which 1 are not among those asked for, such as focal-and-g"):
        open_study(study, planned[:3], resume=True)
    other = settings_from(study.settings.model_dump() | {"targets": {"sigma": 3}})
    with pytest.raises(RunError, match=r"other settings: .*targets.sigma was 2.0, is 3.0"):
        open_study(study._replace(settings=other), planned, resume=True)
    with pytest.raises(RunError, match="other labels or tomograms"):
        open_study(study._replace(manifest=study.manifest.slice(1)), planned, resume=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_an_ablation_leaves_a_run_for_each_trial_and_is_not_repeated(study, archive, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("motor_ray.distributed.ablation.PARTS", {"CLAHE": PARTS["CLAHE"]})

    def run(*, resume: bool):
        data = (study.manifest, archive.labels, quick, str(tmp_path), "study")
        return ablate(*data, seeds=1, workers=(1, 1), resume=resume)

    first = run(resume=False)
    names = ["plain-420", "clahe-420"]
    assert (first["trials"], first["failed"], first["unread"]) == (2, {}, 0)
    runs = [json.loads((tmp_path / "study" / name / "run.json").read_text()) for name in names]
    assert [one["status"] for one in runs] == ["done", "done"]
    assert [one["settings"]["preprocess"]["clahe"] for one in runs] == [False, True]
    assert runs[0]["split"] == runs[1]["split"]
    assert (tmp_path / "study" / "ablation.md").read_text().count("\n| ") == 2
    assert (tmp_path / "study" / "ablation.png").stat().st_size > 5000
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        "ablation.json",
        "ablation.md",
        "ablation.png",
        "lock",
        *names,
    }
    written = [(tmp_path / "study" / name / "metrics.jsonl").stat().st_mtime_ns for name in names]
    assert run(resume=True) == first
    assert written == [(tmp_path / "study" / name / "metrics.jsonl").stat().st_mtime_ns for name in names]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_search_names_what_failed_and_tries_it_again_when_it_goes_on(study, archive, quick, tmp_path, monkeypatch):
    wild, fine = tuning_trials(search_space(quick, learning_rate=False), 2, seed=quick.train.seed)
    wild = wild.model_copy(update={"changes": {"train": {"learning_rate": 1e30}}})
    monkeypatch.setattr("motor_ray.distributed.tuning.tuning_trials", lambda *_: [wild, fine])

    def run(*, resume: bool):
        data = (study.manifest, archive.labels, quick, str(tmp_path), "study")
        return tune(*data, trials=2, learning_rate=False, workers=(1, 1), resume=resume)

    first = run(resume=False)
    assert list(first["failed"]) == ["trial-000"]
    assert "is not finite" in first["failed"]["trial-000"]
    assert (first["best"]["trial"], first["best"]["changes"]) == ("trial-001", fine.changes)
    assert read_settings(first["config"]) == changed(quick, fine.changes)
    assert (tmp_path / "study" / "tuning.png").stat().st_size > 5000
    written = (tmp_path / "study" / "trial-001" / "run.json").stat().st_mtime_ns
    assert run(resume=True) == first
    assert written == (tmp_path / "study" / "trial-001" / "run.json").stat().st_mtime_ns


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_trial_that_is_halted_frees_what_it_held_and_stays_halted(study, archive, quick, tmp_path, monkeypatch):
    class HaltsTheSecond(Halving):
        def on_trial_result(self, tune_controller, trial, result):
            if trial.config["trial"] == "trial-001":
                self.halted.count("trial-001", 1)
            return super().on_trial_result(tune_controller, trial, result)

    monkeypatch.setattr("motor_ray.distributed.trials.Halving", HaltsTheSecond)
    longer = settings_from(quick.model_dump() | {"train": quick.train.model_dump() | {"epochs": 6}})
    before = ray.available_resources()["CPU"]

    def run(trials: int, *, resume: bool):
        data = (study.manifest, archive.labels, longer, str(tmp_path), "study")
        result = tune(*data, trials=trials, learning_rate=False, workers=(1, 1), resume=resume)
        told = json.loads((tmp_path / "study" / "tuning.json").read_text())["trials"]
        return result, {one["name"]: (one["status"], one["epochs"]) for one in told}

    first, told = run(2, resume=False)
    assert (first["stopped"], first["failed"]) == (1, {})
    assert told["trial-000"] == ("done", 6)
    status, epochs = told["trial-001"]
    assert status == "stopped"
    assert 1 <= epochs < 6
    wait_until(lambda: ray.available_resources()["CPU"] == before)
    second, again = run(3, resume=True)
    assert (second["trials"], second["stopped"]) == (3, 1)
    assert again == told | {"trial-002": ("done", 6)}
