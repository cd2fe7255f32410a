import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from tenacity import wait_none

from motor_ray.cli import VERBS, main, parse
from motor_ray.config import RunSettings
from motor_ray.errors import ConfigError
from motor_ray.storage import join, read_table, write_json, write_table
from motor_ray.tables import FAILURES, MANIFEST, MOTORS
from motor_ray.verbs.flags import all_settings
from motor_ray.verbs.training import workers_from

TRAIN = ["train", "--archive", "a", "--labels", "b.csv", "--storage", "c", "--name", "d"]
CARE = ["label-care", "--detections", "nowhere", "--labels", "a.csv", "--out", "o"]

CALIBRATE = ["calibrate", "--detections", "nowhere", "--labels", "a.csv"]


@pytest.fixture
def archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    shape = ["--shape", "16", "64", "64", "--voxel-spacing-angstrom", "30"]
    assert main(["simulate", "--out", str(tmp_path / "sim"), "--tomograms", "2", "--seed", "5", *shape]) == 0
    capsys.readouterr()
    return tmp_path / "sim"


def test_flags_win_over_the_yaml_file_which_wins_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {epochs: 7, batch_size: 2}\nlink: {min_slices: 5}\n")
    settings = all_settings(
        parse([*TRAIN, "--config", str(path), "--train.epochs", "9", "--model.backbone", "resnet50"])
    )
    assert (settings.train.epochs, settings.train.batch_size, settings.link.min_slices) == (9, 2, 5)
    assert settings.model.backbone == "resnet50"
    assert settings.train.learning_rate == RunSettings().train.learning_rate


def test_flags_that_contradict_one_another_are_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"^flags: train\.batch_norm frozen keeps .* there is no train\.start_from; "):
        all_settings(parse([*TRAIN, "--train.batch-norm", "frozen", "--model.pretrained", "none"]))


def test_without_flags_the_settings_are_the_recipe():
    assert all_settings(parse(TRAIN)) == RunSettings()


def test_a_model_is_one_checkpoint_or_several():
    for names in (["a"], ["a", "b", "c"]):
        for verb in ("detect", "plan", "bench"):
            rest = {"detect": ["--archive", "z", "--out", "o"], "plan": ["--archive", "z"], "bench": ["looks"]}[verb]
            asked: Any = parse([verb, *rest, "--model", *names])
            assert asked.model == tuple(names)
        asked = parse(["serve", "--model", *names, "--serve.models", "lab", "d,e", "own", "f"])
        assert asked.all_settings().serve.models == {"default": ",".join(names), "lab": "d,e", "own": "f"}


@pytest.mark.parametrize(("text", "workers"), [("4", (4, 4)), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers_are_a_number_or_a_range(text, workers):
    assert workers_from(text) == workers


@pytest.mark.parametrize("text", ["0", "-1", "8:2", "0:2", "2:", ":2", "2:4:8", "two", ""])
def test_workers_that_are_neither_are_refused_with_examples(text):
    with pytest.raises(ConfigError, match=f"--workers {text}: expected a number such as 4, or .* such as 2:8"):
        workers_from(text)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"usage: motor-ray {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_all_verbs(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["detct"], "unknown verb 'detct'; did you mean detect?"),
        ([*TRAIN, "--name", "e"], "--name: given more than once"),
        ([*TRAIN, "--train.batch_size", "2", "--train.batch-size", "3"], "--train.batch-size: given more than once"),
        ([*TRAIN, "--train.mixed-precision", "--train.no-mixed-precision"], "mixed-precision: given more than once"),
        (["simulate", "--out", "s", "--seed", "-1"], "seed -1"),
        (["simulate", "--out", "s", "--signal-to-noise", "0"], "signal_to_noise 0: expected"),
        (["simulate", "--out", "s", "--clutter", "nan"], "clutter nan: expected"),
        (["demo", "--out", __file__], "cannot be made a folder"),
        (["soup", "--models", "m/best", "--out", "o"], "m/best: alone is its own average"),
        (["soup", "--models", "m/snapshots", "--out", "o"], "m/snapshots: holds no checkpoints"),
        (["serve", "--model", "a,b"], "--model a,b: give several checkpoints one after the other, without commas"),
        (["detect", "--model", "m", "--out", "o"], "give either --archive or --manifest"),
        (["manifest", "--archive", "nowhere", "--out", "m.parquet"], "nowhere"),
        (["evaluate", "--detections", "nowhere", "--labels", "a.csv"], "a.csv: cannot be read"),
        (
            [*CARE, "--archive", "a", "--manifest", "m"],
            "give --archive or --manifest",
        ),
        (["export", "--detections", "nowhere", "--to", "csv", "--out", "a.csv"], "nowhere: holds no run.json"),
        ([*TRAIN, "--config", "none.yaml"], "none.yaml: cannot be read"),
        ([*TRAIN, "--config"], "--config: expected one argument; give the YAML file of settings"),
        (["serve", "--model", "a", "--port", "0"], "serve.port: Input should be greater than or equal to 1, got 0"),
        (["evaluate", "--detections", "a", "--labels", "http://host/a.csv"], "http:// is not read; give a local path"),
        (
            ["simulate", "--out", "s", "--tomograms", "1", "--shape", "8", "24", "24"],
            "holds no cell; give at least 600",
        ),
        ([*CALIBRATE, "--quantile", "0.4"], "--quantile is of --method quantile; leave it out with fitted"),
        ([*CALIBRATE, "--evaluate.threshold", "0.4"], "--evaluate.threshold is of --method fixed"),
        ([*CALIBRATE, "--method", "quantile", "--quantile", "1"], "--quantile 1: expected a share from 0 to below 1"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments, complaint, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("motor-ray: ")
    assert complaint in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--train.epoks", "3"], "--train.epochs"), (["--train.epochs", "0"], "greater than or equal to 1")],
)
def test_a_wrong_flag_is_refused_with_a_hint(flags, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TRAIN, *flags])
    assert complaint in capsys.readouterr().err


def test_the_result_is_one_json_object_on_stdout_and_nothing_else(archive, tmp_path, capsys):
    assert main(["manifest", "--archive", str(archive), "--out", str(tmp_path / "m.parquet")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tomograms"], result["slices"], result["unusable"]) == (2, 32, [])
    assert read_table(str(tmp_path / "m.parquet")).schema == MANIFEST


def test_a_tomogram_that_cannot_be_used_is_named_and_makes_exit_code_1(archive, tmp_path, capsys):
    (archive / "train" / "torn.mrc").write_bytes(b"\0" * 64)
    assert main(["manifest", "--archive", str(archive), "--out", str(tmp_path / "m.parquet")]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["tomograms"] == 2
    assert "torn.mrc" in result["unusable"][0]


def test_the_figure_of_the_training_data_is_a_picture(archive, tmp_path, capsys):
    out = tmp_path / "check.png"
    flags = ["--archive", str(archive), "--labels", str(archive / "train_labels.csv"), "--frame.size", "64"]
    assert main(["figure", *flags, "--targets.box-pixels", "20", "--out", str(out)]) == 0
    assert len(json.loads(capsys.readouterr().out)["tomograms"]) == 3
    picture = cv2.imread(str(out))
    assert picture is not None
    assert len(np.unique(picture)) > 50


def test_an_export_tells_what_it_wrote_and_is_not_written_over(tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "submission.csv")
    row = {"tomo_id": "a", "uri": "u", "format": "mrc", "size_z": 4, "size_y": 5, "size_x": 6}
    write_json(join(run, "run.json"), {"status": "done", "settings": RunSettings().model_dump(mode="json")})
    write_table(pa.Table.from_pylist([row], schema=MANIFEST), join(run, "tomograms.parquet"))
    write_table(MOTORS.empty_table(), join(run, "motors.parquet"))
    write_table(FAILURES.empty_table(), join(run, "failures.parquet"))
    command = ["export", "--detections", run, "--to", "kaggle", "--out", out, "--evaluate.threshold", "0.3"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tomograms"], result["motors"], result["threshold"], result["files"]) == (1, 0, 0.3, [out])
    assert main(command) == 2
    assert f"{out}: is there already" in capsys.readouterr().err


def test_ctrl_c_is_not_a_traceback(monkeypatch, capsys):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VERBS["demo"], "run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "motor-ray: stopped\n"


@pytest.mark.parametrize("asked", ["detect --help", "--help"])
def test_a_reader_who_has_read_enough_is_no_reason_to_complain(asked):
    reads, writes = os.pipe()
    os.close(reads)
    program = [sys.executable, "-m", "motor_ray.cli", *asked.split()]
    done = subprocess.run(program, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")


def test_wrong_usage_is_one_even_if_nobody_reads_the_complaint():
    reads, writes = os.pipe()
    os.close(reads)
    program = [sys.executable, "-m", "motor_ray.cli", "detect", "--bogus", "3"]
    assert subprocess.run(program, stdout=writes, stderr=writes, check=False).returncode == 2
    os.close(writes)


def test_an_unknown_setting_in_the_yaml_file_is_refused_with_the_nearest_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("detect: {score_treshold: 0.4}\n")
    with pytest.raises(ConfigError, match="did you mean score_threshold"):
        parse([*TRAIN, "--config", str(path)])


def test_the_demo_deletes_only_what_a_demo_made(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "was not made by a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("verb", "flag", "value", "complaint"),
    [
        ("train", "--workers", "0", "--workers 0: expected a number such as 4"),
        ("train", "--name", "", "expected letters"),
        ("train", "--name", "a/b", "expected letters"),
        ("ablate", "--name", "a/b", "expected letters"),
        ("ablate", "--seeds", "0", "--seeds 0: expected 1 or more"),
        ("tune", "--workers", "2:1", "--workers 2:1: expected a number such as 4"),
        ("tune", "--trials", "1", "--trials 1: expected 2 or more"),
    ],
)
def test_a_run_that_cannot_be_named_or_staffed_is_refused_before_anything_is_written(
    archive, tmp_path, capsys, verb, flag, value, complaint
):
    labels, runs = str(archive / "train_labels.csv"), tmp_path / "runs"
    options = {"--archive": str(archive), "--labels": labels, "--storage": str(runs), "--name": "a", flag: value}
    assert main([verb, *(word for pair in options.items() for word in pair)]) == 2
    assert complaint in capsys.readouterr().err
    assert not runs.exists()


def test_a_bucket_that_does_not_answer_is_one_sentence(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr("motor_ray.retry.PAUSE", wait_none())
    for arguments in (
        ["manifest", "--archive", "s3://lab/tomograms", "--out", str(tmp_path / "m.parquet")],
        ["manifest", "--archive", str(archive), "--out", "s3://lab/m.parquet"],
        ["evaluate", "--detections", "s3://lab/found", "--labels", str(archive / "train_labels.csv")],
    ):
        assert main(arguments) == 1  # the same command may succeed another time
        assert capsys.readouterr().err.startswith("motor-ray: s3://lab/")


@pytest.mark.ray
def test_the_verbs_make_one_story_in_a_shell(tmp_path):
    """Simulate, train, detect, evaluate as processes of their own, with relative paths, each starting its own Ray."""

    def motor_ray(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "motor_ray.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        result: dict[str, object] = json.loads(done.stdout)
        return result

    (tmp_path / "small.yaml").write_text(
        "frame: {size: 96}\ntargets: {box_pixels: 32}\ntrain: {epochs: 1, slices_per_motor: 2}\n"
        "model: {backbone: resnet18, pretrained: none, neck_channels: 8, head_channels: 8}\n"
    )
    shape = ["--shape", "20", "96", "96", "--voxel-spacing-angstrom", "24"]
    motor_ray("simulate", "--out", "sim", "--tomograms", "24", *shape, "--format", "mrc")
    labels = ["--labels", "sim/train_labels.csv"]
    trained = motor_ray(
        "train", "--archive", "sim", *labels, "--storage", "runs", "--name", "a", "--config", "small.yaml"
    )
    detect = ["detect", "--archive", "sim", "--model", "runs/a/best", "--out", "found"]
    detected = motor_ray(*detect, "--detect.score-threshold", "0.001")
    assert trained["epochs"] == 1
    assert isinstance(detected["counts"], dict)
    assert detected["counts"]["ok"] == 24 * 20
    scores = motor_ray("evaluate", "--detections", "found", *labels)
    assert set(scores) == {"slices", "tomograms", "motors", "threshold_from"}
    assert isinstance(scores["tomograms"], dict)
    assert scores["tomograms"]["n_tomograms"] == 24
    for to in ("kaggle", "star", "copick", "ndjson", "csv"):
        exported = motor_ray("export", "--detections", "found", "--to", to, "--out", to, "--evaluate.threshold", "0")
        assert exported["tomograms"] == 24
