"""What a checkpoint learns from a run: here runs are tables, and the detector has random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from motor_ray.archive.labels import MOTOR_COLUMNS, TOMOGRAM_COLUMNS, Labels
from motor_ray.config import USUAL_THRESHOLD, EvaluateSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import load_checkpoint, save_checkpoint
from motor_ray.detector.description import (
    CALIBRATION,
    RESCORED_CALIBRATION,
    RESCORER,
    describe_checkpoint,
    rescorer_hash,
)
from motor_ray.detector.model import build_model
from motor_ray.distributed.learned import rescoring
from motor_ray.distributed.serving import model_cards
from motor_ray.errors import MetricError, RunError
from motor_ray.motors.calibration import Calibration, calibration_at, origin_of
from motor_ray.motors.link import link_slabs
from motor_ray.refining import FOLDS, calibrate_run, folds, rescore_run
from motor_ray.results import decided, evaluate_run, export_run, motors_told
from motor_ray.service.backend import ModelCard
from motor_ray.service.settings import ServiceSettings
from motor_ray.storage import join, read_json, read_table, write_json, write_table
from motor_ray.tables import FAILURES, MANIFEST, MOTORS, PLAN, SLABS

SPACING = 10.0
SETTINGS = settings_from(
    {
        "frame": {"size": 64},
        "targets": {"box_pixels": 20},
        "model": {"backbone": "resnet18", "pretrained": "none", "neck_channels": 8, "head_channels": 8},
    }
)
SCORES = {f"with{n}": 0.3 + 0.05 * n for n in range(8)} | {f"without{n}": 0.05 + 0.05 * n for n in range(6)}
PLACE = (5.0, 10.0, 10.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    uri = str(tmp_path_factory.mktemp("model") / "best")
    save_checkpoint(uri, build_model(SETTINGS.model), SETTINGS, {})
    return uri


@pytest.fixture(autouse=True)
def nothing_learned(model: str) -> None:
    for name in (CALIBRATION, RESCORED_CALIBRATION, RESCORER):
        Path(model, name).unlink(missing_ok=True)


def labels_of(names: list[str]) -> Labels:
    tomograms = [(name, 12, 64, 80, SPACING, int("without" not in name)) for name in names]
    motors = [(name, *PLACE) for name in names if "without" not in name]
    return Labels(pd.DataFrame(tomograms, columns=TOMOGRAM_COLUMNS), pd.DataFrame(motors, columns=MOTOR_COLUMNS))


LABELS = labels_of(list(SCORES))


def make_run(folder: Path, sha256: str, scores: dict[str, float] = SCORES, **more: Any) -> str:
    """A finished run that found a motor at its PLACE in every tomogram."""
    run = str(folder)
    tomogram = {
        "uri": "u",
        "format": "mrc",
        "size_z": 12,
        "size_y": 64,
        "size_x": 80,
        "voxel_spacing_angstrom": SPACING,
    }
    place = dict(zip("zyx", PLACE, strict=True))
    motor = {**place, "height": 10.0, "width": 10.0, "n_slices": 3, "voxel_spacing_angstrom": SPACING}
    motors = [motor | {"tomo_id": name, "score": score} for name, score in scores.items()]
    slices: list[dict[str, Any]] = [{"z": 5, "status": "ok", "detections": []}]
    tables = {
        "tomograms": ([tomogram | {"tomo_id": name} for name in scores], MANIFEST),
        "motors": (motors, MOTORS),
        "failures": ([], FAILURES),
        "plan": ([tomogram | {"slab_id": name, "tomo_id": name, "zs": [5]} for name in scores], PLAN),
        "slabs": ([{"slab_id": name, "tomo_id": name, "slices": slices} for name in scores], SLABS),
    }
    for name, (rows, schema) in tables.items():
        write_table(pa.Table.from_pylist(rows, schema=schema), join(run, f"{name}.parquet"))
    (folder / "slabs").mkdir()
    (folder / "slabs.parquet").rename(folder / "slabs" / "0.parquet")
    described = {"status": "done", "settings": SETTINGS.model_dump(mode="json"), "model_sha256": sha256}
    write_json(join(run, "run.json"), described | more)
    return run


@pytest.fixture
def run(tmp_path: Path, model: str) -> str:
    return make_run(tmp_path / "run", describe_checkpoint(model).sha256)


def learn(run: str, model: str | None, labels: Labels = LABELS, method: Any = "fitted", **settings: Any) -> Any:
    picture = join(run, "calibration.png")
    return calibrate_run(run, labels, EvaluateSettings(**settings), method, 0.5, model=model, picture=picture)


def kept_of(model: str) -> Calibration | None:
    """The calibration in a checkpoint of the scores that detection with it gives."""
    sha256, rescorer = describe_checkpoint(model).sha256, rescorer_hash(model)
    name = RESCORED_CALIBRATION if rescorer else CALIBRATION
    return calibration_at(join(model, name), origin_of(SETTINGS, sha256, rescorer))


def test_what_is_learned_goes_into_the_checkpoint_which_is_still_one(run: str, model: str) -> None:
    told = learn(run, model)
    json.dumps(told, allow_nan=False)
    kept = kept_of(model)
    assert kept is not None
    assert (told["threshold"], told["written"]) == (kept.threshold, join(model, CALIBRATION))
    assert (told["n_tomograms"], told["n_with_motor"]) == (14, 8)
    assert Path(told["picture"]).stat().st_size > 10_000
    load_checkpoint(model)
    save_checkpoint(model, load_checkpoint(model), SETTINGS, {})  # training goes on
    assert kept_of(model) is None


def test_without_a_model_it_is_only_told(run: str, model: str) -> None:
    assert learn(run, None)["written"] is None
    assert not Path(model, CALIBRATION).exists()


def test_tomograms_that_were_not_looked_at_do_not_count(run: str, model: str) -> None:
    assert learn(run, model, labels_of([*SCORES, "elsewhere"]))["n_tomograms"] == 14


def test_a_calibration_travels_with_a_run_to_evaluate_and_export_unless_a_threshold_is_given(
    run: str, model: str, tmp_path: Path
) -> None:
    learn(run, model)
    kept = read_json(join(model, CALIBRATION))
    another = make_run(tmp_path / "another", "x", calibration=kept)
    asked, usual = EvaluateSettings(threshold=0.4), EvaluateSettings()
    for settings, where, threshold, origin in (
        (asked, another, 0.4, "settings"),
        (usual, another, kept["threshold"], "calibration (fitted)"),
        (usual, run, USUAL_THRESHOLD, "usual"),
    ):
        scores = evaluate_run(where, LABELS, settings)
        told = export_run(where, "csv", str(tmp_path / f"{origin}.csv"), settings, relion=5)
        assert scores["threshold_from"] == told["threshold_from"] == origin
        assert scores["tomograms"]["threshold"] == scores["motors"]["threshold"] == told["threshold"] == threshold
        assert told["motors"] == sum(score >= threshold for score in SCORES.values())
        if settings is usual:
            assert motors_told(where) == {name: told[name] for name in ("motors", "threshold", "threshold_from")}


def test_several_models_keep_no_calibration_but_are_told_one(tmp_path: Path, model: str) -> None:
    together = make_run(tmp_path / "both", "x", models=[{"model": model}, {"model": "another"}])
    with pytest.raises(RunError, match=r"both: 2 models answered together.*without --model.*--evaluate\.threshold"):
        learn(together, model)
    assert learn(together, None)["written"] is None


def test_a_quantile_is_taken_of_the_run_at_hand(run: str, model: str, tmp_path: Path) -> None:
    told = learn(run, model, method="quantile")
    kept = read_json(join(model, CALIBRATION))
    scores = {name: score / 10 for name, score in SCORES.items()}
    another = make_run(tmp_path / "another", "x", scores, calibration=kept)
    settings, origin = decided(another, read_table(join(another, "motors.parquet")), EvaluateSettings())
    assert origin == "calibration (quantile)"
    assert settings.threshold == pytest.approx(told["threshold"] / 10)
    exported = export_run(another, "csv", str(tmp_path / "a.csv"), EvaluateSettings(), relion=5)
    assert exported["motors"] == 7


def test_the_endpoint_tells_the_threshold_that_was_learned(run: str, model: str) -> None:
    settings = ServiceSettings.model_validate({"serve": {"models": {"default": model}}})

    def threshold() -> float:
        return settings_from(model_cards(settings)["default"][2]).evaluate.threshold_or_usual

    assert threshold() == USUAL_THRESHOLD
    told = learn(run, model)
    assert threshold() == told["threshold"]


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (sorted(SCORES)[1:], MetricError, "1 of 14 tomograms that were looked at have no labels, such as with0"),
        ([f"{name}without" for name in SCORES], MetricError, "14 of 14 tomograms.*have no labels"),
    ],
)
def test_labels_of_other_tomograms_are_refused(
    run: str, model: str, names: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        learn(run, model, labels_of(names))
    assert not Path(model, CALIBRATION).exists()


def test_tomograms_of_one_kind_a_run_of_another_model_and_one_that_is_not_finished_are_refused(
    tmp_path: Path, model: str
) -> None:
    sha256 = describe_checkpoint(model).sha256
    kind = {name: score for name, score in SCORES.items() if "without" in name}
    with pytest.raises(MetricError, match="kind: 6 labelled tomograms were looked at, and none of them has a motor"):
        learn(make_run(tmp_path / "kind", sha256, kind), model)
    with pytest.raises(RunError, match=f"made by the model x, and .* is {sha256[:12]}; scores differ"):
        learn(make_run(tmp_path / "other", "x"), model)
    with pytest.raises(RunError, match="has not finished"):
        learn(make_run(tmp_path / "begun", sha256, status="running"), model)
    assert not Path(model, CALIBRATION).exists()
    assert not list(tmp_path.rglob("*.png"))


BEAD = (5.0, 53.0, 69.0)
"""As far from the edges as PLACE."""


def make_seen_run(folder: Path, sha256: str, *, told: float = 1.0, names: Any = SCORES, features: bool = True) -> str:
    """A finished run in whose tomograms a bead scores as high as a motor; if `told`, their features differ."""
    rng = np.random.default_rng(0)
    run = make_run(folder, sha256, dict.fromkeys(names, 0.5))
    rows = []
    for name in names:
        places = [(BEAD, -told), *([(PLACE, told)] if "without" not in name else [])]
        best = rng.uniform(0.3, 0.8, size=len(places))
        slices = []
        for z in range(12):
            found = []
            for (place, kind), score in zip(places, best, strict=True):
                seen = rng.normal(size=4).astype(np.float16)
                seen[1] += kind
                box = {"y": place[1], "x": place[2], "height": 10.0, "width": 10.0, "score": score}
                found.append(box | ({"features": seen.tobytes()} if features else {}))
            slices.append({"z": z, "status": "ok", "detections": found})
        rows.append({"slab_id": name, "tomo_id": name, "slices": slices})
    write_table(pa.Table.from_pylist(rows, schema=SLABS), join(run, "slabs", "0.parquet"))
    return run


def rescore(run: str, model: str, labels: Labels = LABELS, *, force: bool = False) -> Any:
    return rescore_run(run, labels, EvaluateSettings(), model=model, force=force)


def test_a_head_learns_from_a_run_and_gives_its_motors_better_scores(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motor_ray.detector.inference.FEATURES", 2)
    sha256 = describe_checkpoint(model).sha256
    run = make_seen_run(tmp_path / "run", sha256)
    told = rescore(run, model)
    json.dumps(told, allow_nan=False)
    assert (told["candidates"], told["motors"], told["better"]) == (22, 8, True)
    assert told["after"]["average_precision"] > told["before"]["average_precision"]
    assert told["written"] == join(model, RESCORER)
    load_checkpoint(model)
    slabs, manifest = (read_table(join(run, name)) for name in ("slabs", "tomograms.parquet"))
    plain = link_slabs(slabs, manifest).to_pandas()
    again = link_slabs(slabs, manifest, rescore=rescoring(model, sha256)).to_pandas()
    assert (
        again.drop(columns="score")
        .sort_values(["tomo_id", "y"], ignore_index=True)
        .equals(plain.drop(columns="score").sort_values(["tomo_id", "y"], ignore_index=True))
    )
    motors = again["y"] == PLACE[1]
    assert again.loc[motors, "score"].min() > again.loc[~motors, "score"].median()
    best_first = again.groupby("tomo_id")["score"].apply(lambda own: own.is_monotonic_decreasing)
    assert best_first.all()


def test_a_head_that_is_no_better_is_kept_only_by_force(tmp_path: Path, model: str) -> None:
    run = make_seen_run(tmp_path / "run", describe_checkpoint(model).sha256, told=0.0)
    told = rescore(run, model)
    assert (told["better"], told["written"]) == (False, None)
    assert rescorer_hash(model) is None
    assert rescore(run, model, force=True) == told | {"written": join(model, RESCORER)}
    assert rescorer_hash(model) is not None


def test_scores_before_and_after_the_second_look_have_a_calibration_each(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motor_ray.detector.inference.FEATURES", 2)  # as many as the runs here have
    sha256 = describe_checkpoint(model).sha256
    plain = learn(make_run(tmp_path / "plain", sha256), model)
    settings = ServiceSettings.model_validate({"serve": {"models": {"default": model}}})
    before = ModelCard(*model_cards(settings)["default"])
    rescore(make_seen_run(tmp_path / "seen", sha256), model)
    kept = kept_of(model)
    assert kept is not None
    assert kept.threshold != plain["threshold"]
    after = ModelCard(*model_cards(settings)["default"])
    thresholds = [settings_from(card.settings).evaluate.threshold for card in (before, after)]
    assert thresholds == [plain["threshold"], kept.threshold]


def test_the_calibration_that_comes_with_a_head_is_of_scores_by_heads_that_did_not_know_the_tomograms(
    tmp_path: Path, model: str
) -> None:
    told = rescore(make_seen_run(tmp_path / "seen", describe_checkpoint(model).sha256), model)
    kept = kept_of(model)
    assert kept is not None
    assert kept.threshold == told["after"]["best_threshold"]
    assert kept.f2 == told["after"]["f2"]


def test_a_head_is_calibrated_on_other_tomograms_than_it_learned_from(tmp_path: Path, model: str) -> None:
    sha256 = describe_checkpoint(model).sha256
    rescore(make_seen_run(tmp_path / "seen", sha256), model)
    rescorer, before = rescorer_hash(model), kept_of(model)
    with pytest.raises(RunError, match="14 tomograms, such as with0, are by a head that learned from these very"):
        learn(make_run(tmp_path / "same", sha256, rescorer_sha256=rescorer), model)
    with pytest.raises(RunError, match=r"judged by another head than .* has now; give its motor-ray detect"):
        learn(make_run(tmp_path / "before", sha256, rescorer_sha256="x" * 64), model)
    assert kept_of(model) == before
    others = {f"{name}-2": score for name, score in SCORES.items()}
    told = learn(make_run(tmp_path / "others", sha256, others, rescorer_sha256=rescorer), model, labels_of([*others]))
    kept = kept_of(model)
    assert kept is not None
    assert kept.threshold == told["threshold"]
    assert told["written"] == join(model, RESCORED_CALIBRATION)


def test_a_head_that_only_saw_tomograms_with_motors_comes_without_calibration(tmp_path: Path, model: str) -> None:
    sha256 = describe_checkpoint(model).sha256
    rescore(make_seen_run(tmp_path / "all", sha256), model)
    names = [name for name in SCORES if "without" not in name]
    before = rescorer_hash(model)
    rescore(make_seen_run(tmp_path / "seen", sha256, names=names), model, labels_of(names))
    assert rescorer_hash(model) not in (None, before)
    assert not Path(model, RESCORED_CALIBRATION).exists()


def test_folds_hold_whole_tomograms_and_motors_each() -> None:
    names = pd.Series([name for name in SCORES for _ in range(2)])
    is_motor = np.array([number % 2 == 0 and "without" not in name for number, name in enumerate(names)])
    fold_of = folds(names, is_motor, seed=1)
    assert pd.Series(fold_of).groupby(names).nunique().max() == 1
    assert all(is_motor[fold_of == fold].any() for fold in range(FOLDS))
    np.testing.assert_array_equal(fold_of, folds(names, is_motor, seed=1))
    assert (fold_of != folds(names, is_motor, seed=2)).any()


def test_what_nothing_can_be_learned_from_is_refused_with_the_reason(tmp_path: Path, model: str) -> None:
    sha256 = describe_checkpoint(model).sha256
    few = [*sorted(SCORES)[:3], "without0", "without1"]
    with pytest.raises(MetricError, match=r"3 tomograms have a candidate that is a motor and 5 one.*at least 5"):
        rescore(make_seen_run(tmp_path / "few", sha256, names=few), model)
    with pytest.raises(RunError, match=r"no features to judge candidates by.*--detect\.features"):
        rescore(make_seen_run(tmp_path / "blind", sha256, features=False), model)
    with pytest.raises(RunError, match="made by the model x"):
        rescore(make_seen_run(tmp_path / "other", "x"), model)
    with pytest.raises(MetricError, match="1 of 14 tomograms that were looked at have no labels"):
        rescore(make_seen_run(tmp_path / "run", sha256), model, labels_of(sorted(SCORES)[1:]))
    with pytest.raises(MetricError, match="nothing was found in any tomogram"):
        rescore(make_run(tmp_path / "empty", sha256), model)
    assert rescorer_hash(model) is None
