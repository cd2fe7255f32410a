"""Rounds of pseudo-labels: what each is given, with training and detection stood in for; and one on a real Ray."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from motor_ray.archive.labels import Labels, read_labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.simulate import simulate_archive
from motor_ray.config_values import settings_from
from motor_ray.detector.description import describe_checkpoint
from motor_ray.distributed import pseudo_steps
from motor_ray.distributed.pseudo import begin, prepare, pseudo_label, require_possible, require_unseen
from motor_ray.distributed.pseudo_steps import Model, chosen, one_round
from motor_ray.errors import ConfigError, LabelsError, ManifestError, RunError, UnfinishedError
from motor_ray.motors.pseudo import Sure
from motor_ray.storage import join, read_json, read_table, write_json, write_table
from motor_ray.tables import FAILURES, MANIFEST, MOTORS

NONE = FAILURES.empty_table()
SCORES = {"mAP@0.5": 0.5, "mAP@0.7": 0.4, "mAP@0.9": 0.1, "f2": 0.5, "precision": 0.5, "recall": 0.5}


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """Three tomograms of which nobody tells what is in them."""
    folder = tmp_path_factory.mktemp("unlabelled")
    simulate_archive(str(folder), 3, 77, (20, 96, 96), voxel_spacing_angstrom=24.0, motor_counts=[1, 0, 1], processes=1)
    return str(folder / "train")


@pytest.fixture
def manifest(archive, settings):
    return make_manifest(archive.uri, settings.archive)


@pytest.fixture
def others(unlabelled, settings):
    return make_manifest(unlabelled, settings.archive)


def changed(settings, **groups):
    values = settings.model_dump()
    return settings_from(values | {group: values[group] | own for group, own in groups.items()})


@pytest.fixture
def data(manifest, archive, others, settings, tmp_path):
    given = changed(settings, pseudo={"positive_score": 0.7, "negative_score": 0.2})
    return prepare(manifest, archive.labels, others, NONE, given, str(tmp_path / "run"), (1, 1))


def motors_in(names, *found):
    """MOTORS, each as (place of the tomogram's name, z, score)."""
    more = {"y": 50.0, "x": 50.0, "height": 32.0, "width": 32.0, "n_slices": 9, "voxel_spacing_angstrom": 24.0}
    return pa.Table.from_pylist([{"tomo_id": names[at], "z": z, "score": s} | more for at, z, s in found], MOTORS)


class StandIns:
    """Detection that finds what it is told to, and training that notes what it was given."""

    def __init__(self, monkeypatch, finds, scores):
        self.finds, self.scores, self.trained, self.detected = list(finds), list(scores), [], []
        for name in ("detect", "train", "validated"):
            monkeypatch.setattr(pseudo_steps, name, getattr(self, name))

    def detect(self, _manifest, _unusable, model, out, _settings):
        self.detected.append(model)
        write_table(self.finds.pop(0), join(out, "motors.parquet"))
        write_table(NONE, join(out, "failures.parquet"))
        return {"counts": {"failures": 0}}

    def train(self, manifest, labels, settings, storage, name, **_):
        self.trained.append((manifest, labels, settings))
        return {"model": join(storage, name, "best")}

    def validated(self, data, number, model):
        found = join(data.uri, f"validation-{number}")
        looked_at(data, found)
        return Model(model, SCORES | {"mAP@0.5": self.scores.pop(0)}, found)


def looked_at(data, found, *motors):
    """A run on the labelled tomograms that found `motors`, see motors_in; returns where it is."""
    write_table(data.manifest, join(found, "tomograms.parquet"))
    write_table(motors_in(data.manifest["tomo_id"].to_pylist(), *motors), join(found, "motors.parquet"))
    return found


@pytest.fixture
def teacher(data, tmp_path):
    return Model("teacher", SCORES, looked_at(data, str(tmp_path / "looked")))


def test_a_round_teaches_labels_and_what_is_sure_and_starts_from_the_best(data, teacher, monkeypatch):
    names = data.unlabelled["tomo_id"].to_pylist()
    found = motors_in(names, (0, 10.0, 0.9), (0, 3.0, 0.4), (1, 10.0, 0.05), (2, 10.0, 0.5))
    stands = StandIns(monkeypatch, [found], [0.6])
    choice, after, line = one_round(data, 1, teacher, None)
    assert (after.uri, after.scores["mAP@0.5"]) == (line["model"], 0.6)
    [(manifest, labels, settings)] = stands.trained
    assert stands.detected == ["teacher"]
    assert settings.train.start_from == "teacher"
    assert set(manifest["tomo_id"].to_pylist()) == {*data.manifest["tomo_id"].to_pylist(), names[0], names[1]}
    assert labels.guessed == {names[0], names[1]}
    assert labels.motors_of(names[0]).tolist() == [[10, 50, 50]]
    assert labels.doubtful_of(names[0]).tolist() == [[3, 50, 50]]
    added = read_labels(line["labels"])
    assert added.tomograms["tomo_id"].tolist() == names[:2]
    assert added.motors_of(names[1]).shape == (0, 3)
    assert (line["motors"], line["tomograms_without"], line["doubtful_motors"], line["undecided"]) == (1, 1, 1, 1)
    assert line["kept"]
    assert choice.with_motor == [names[0]]


def test_no_motor_that_is_sure_is_refused_with_the_reason(data, teacher, monkeypatch):
    names = data.unlabelled["tomo_id"].to_pylist()
    stands = StandIns(monkeypatch, [motors_in(names, (0, 10.0, 0.65), (1, 10.0, 0.01))], [])
    with pytest.raises(
        UnfinishedError, match=r"sure of no motor in 3 unlabelled .* best scores 0\.65, .* takes 0\.7 on 4"
    ):
        one_round(data, 1, teacher, None)
    assert not stands.trained


def test_what_a_model_is_sure_of_is_learned_from_what_it_said_of_labelled_tomograms(data, tmp_path):
    free = data._replace(settings=changed(data.settings, pseudo={"positive_score": None, "negative_score": None}))
    names = data.manifest["tomo_id"].to_pylist()
    [first, *_] = motors = [
        (name, *data.labels.motors_of(name)[0]) for name in names if len(data.labels.motors_of(name))
    ]
    empty = next(name for name in names if not len(data.labels.motors_of(name)))
    more = {"height": 32.0, "width": 32.0, "n_slices": 9, "voxel_spacing_angstrom": 24.0}
    rows = [
        {"tomo_id": name, "z": z, "y": y, "x": x, "score": 0.4 if name == first[0] else 0.6} for name, z, y, x in motors
    ]
    rows.append({"tomo_id": empty, "z": 3.0, "y": 50.0, "x": 50.0, "score": 0.5})
    found = looked_at(free, str(tmp_path / "seen"))
    write_table(pa.Table.from_pylist([row | more for row in rows], MOTORS), join(found, "motors.parquet"))
    assert pseudo_steps.sure_of(free, found).positive == 0.6
    assert pseudo_steps.sure_of(free, found).negative == 0.4


def test_what_was_found_beyond_the_last_voxel_is_a_label_that_can_be_read(data, tmp_path):
    names = data.unlabelled["tomo_id"].to_pylist()
    write_table(motors_in(names, (0, 19.6, 0.9)), str(tmp_path / "found" / "motors.parquet"))
    write_table(NONE, str(tmp_path / "found" / "failures.parquet"))
    labels = pseudo_steps.as_labels(
        chosen(data, str(tmp_path / "found"), Sure(0.7, 0.2)), data.unlabelled, data.settings
    )
    assert labels.motors["z"].tolist() == [19]


def test_rounds_go_on_while_they_are_no_worse_and_the_best_model_is_told(
    manifest, archive, others, settings, checkpoint, tmp_path, monkeypatch
):
    names = sorted(others["tomo_id"].to_pylist())
    found = [motors_in(names, *[(place, 10.0, 0.9) for place in places]) for places in ([0], [0, 2], [0, 2])]
    stands = StandIns(monkeypatch, found, [0.5, 0.6, 0.6, 0.2])
    settings = changed(settings, pseudo={"positive_score": 0.7, "negative_score": 0.2})
    monkeypatch.setattr("motor_ray.distributed.pseudo.connected", lambda _: __import__("contextlib").nullcontext())
    run = pseudo_label(
        manifest, archive.labels, others, NONE, settings, str(tmp_path), "run", rounds=5, workers=(1, 1),
        model=checkpoint,
    )  # fmt: skip
    assert [line["kept"] for line in run["rounds"]] == [True, True, False]
    assert stands.detected == [checkpoint, *(str(tmp_path / "run" / f"round-{n}" / "best") for n in (1, 2))]
    assert run["model"] == str(tmp_path / "run" / "round-2" / "best")
    assert run["rounds"][1]["changes"]["motors_added"] == 1
    assert json.loads((tmp_path / "run" / "pseudo.json").read_text()) == run
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.count("| kept |") == 2
    assert "0.600 -> 0.200" in report


def test_other_settings_or_labels_are_refused(data):
    begin(data, None)
    begin(data, None)
    other = data._replace(settings=changed(data.settings, pseudo={"positive_score": 0.9}))
    with pytest.raises(RunError, match=r"pseudo\.positive_score was 0\.7, is 0\.9"):
        begin(other, None)
    fewer = Labels(data.labels.tomograms, data.labels.motors.iloc[1:])
    with pytest.raises(RunError, match="was started with other labels or tomograms"):
        begin(data._replace(labels=fewer), None)


def test_fewer_rounds_than_are_done_take_none_away(data):
    assert begin(data, None) == 0
    where = join(data.uri, "pseudo.json")
    write_json(where, read_json(where) | {"rounds": [{}, {}, {}]})
    assert begin(data, None) == 3


def test_a_model_that_learned_from_a_tomogram_which_validates_is_refused(tmp_path):
    write_json(str(tmp_path / "run.json"), {"split": {"train": ["b", "c", "d"], "validation": ["a"]}})
    model = str(tmp_path / "best")
    require_unseen(model, ["a", "e"])
    with pytest.raises(LabelsError, match="was trained on b and 1 others that validate here"):
        require_unseen(model, ["a", "b", "d"])
    require_unseen(str(tmp_path / "copied" / "best"), ["b"])


def test_a_folder_of_something_else_is_left_alone(data):
    write_json(join(data.uri, "run.json"), {})
    with pytest.raises(RunError, match=r"is there already and holds no pseudo\.json"):
        begin(data, None)


def test_a_name_in_both_archives_is_refused(manifest, archive, settings, tmp_path):
    with pytest.raises(ManifestError, match="two tomograms are called"):
        prepare(manifest, archive.labels, manifest, NONE, settings, str(tmp_path), (1, 1))


def test_a_labelled_tomogram_is_not_taken_for_an_unlabelled_one(manifest, archive, settings, tmp_path):
    with pytest.raises(LabelsError, match="is among the unlabelled tomograms, but the labels speak of it"):
        prepare(manifest.slice(1), archive.labels, manifest.slice(0, 1), NONE, settings, str(tmp_path), (1, 1))


def test_without_another_archive_the_unlabelled_are_those_that_the_labels_do_not_mention(
    manifest, archive, settings, tmp_path
):
    names = archive.labels.tomograms["tomo_id"].tolist()
    few = Labels(archive.labels.tomograms[:8], archive.labels.motors[archive.labels.motors["tomo_id"].isin(names[:8])])
    data = prepare(manifest, few, None, NONE, settings, str(tmp_path), (1, 1))
    assert set(data.manifest["tomo_id"].to_pylist()) == set(names[:8])
    assert set(data.unlabelled["tomo_id"].to_pylist()) == set(names[8:])
    with pytest.raises(LabelsError, match="all 12 tomograms of the archive are labelled; give unlabelled ones"):
        prepare(manifest, archive.labels, None, NONE, settings, str(tmp_path), (1, 1))


def test_thresholds_that_nobody_could_tell_are_refused(data):
    blind = data._replace(settings=changed(data.settings, detect={"score_threshold": 0.3}))
    with pytest.raises(
        ConfigError, match=r"pseudo\.negative_score 0\.2: detections below detect\.score_threshold 0\.3"
    ):
        require_possible(blind, None)


def test_a_spacing_that_is_unknown_is_the_one_that_detection_assumes(settings):
    row = {"tomo_id": "a", "uri": "u", "format": "mrc", "size_z": 4, "size_y": 5, "size_x": 6}
    manifest = pa.Table.from_pylist([row], MANIFEST)
    assert pseudo_steps.spacings_of(manifest, settings) == {"a": settings.link.assumed_spacing_angstrom}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_rounds_on_a_real_ray_go_on_where_they_stopped(manifest, archive, others, settings, tmp_path):
    """The detector is hardly trained, so that anything is sure enough."""
    easy = changed(
        settings,
        train={"epochs": 1},
        pseudo={"positive_score": 0.02, "negative_score": 0.01, "min_slices": 1},
    )

    def run(rounds):
        return pseudo_label(
            manifest, archive.labels, others, NONE, easy, str(tmp_path), "run", rounds=rounds, workers=(1, 1)
        )

    first = run(1)
    [line] = first["rounds"]
    folder = tmp_path / "run"
    untouched = (folder / "round-1" / "metrics.jsonl").stat().st_mtime_ns
    again = run(2)
    assert (folder / "round-1" / "metrics.jsonl").stat().st_mtime_ns == untouched
    assert again["rounds"][0] == line
    trained = json.loads((folder / "round-1" / "run.json").read_text())
    alone = json.loads((folder / "round-0" / "run.json").read_text())
    assert {part: trained["split"][part] for part in ("validation", "test")} == {
        part: alone["split"][part] for part in ("validation", "test")
    }
    believed = set(trained["split"]["train"]) - set(alone["split"]["train"])
    assert 0 < len(believed) == line["tomograms_with_motors"] + line["tomograms_without"]
    assert believed <= set(others["tomo_id"].to_pylist())
    assert describe_checkpoint(folder / "round-1" / "best").settings.train.start_from == line["teacher"]
    assert np.isfinite(line["after"]["mAP@0.5"])
    assert set(read_table(str(folder / "found-1" / "motors.parquet"))["tomo_id"].to_pylist()) <= set(
        others["tomo_id"].to_pylist()
    )
    assert isinstance(pd.read_csv(Path(line["labels"])), pd.DataFrame)
