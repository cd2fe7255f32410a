"""Pictures of finished runs; the scores and exports of runs are tested where they are made."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from motor_ray.archive.labels import MOTOR_COLUMNS, TOMOGRAM_COLUMNS, Labels
from motor_ray.archive.manifest import make_manifest
from motor_ray.archive.plan import slab_of
from motor_ray.archive.simulate import simulate_archive
from motor_ray.archive.volumes import Format, write_volume
from motor_ray.config import AugmentSettings, CareSettings, EvaluateSettings, RunSettings
from motor_ray.config_values import settings_from
from motor_ray.distributed.loading import LoadSlab
from motor_ray.errors import ConfigError, ExportError, RunError
from motor_ray.results import care_for_labels, draw_dataset_check, draw_validation
from motor_ray.storage import join, read_table, write_json, write_table
from motor_ray.tables import MOTORS, SLABS
from motor_ray.views import check_row, read_slice

SHAPE, SPACING = (12, 64, 80), 50.0
TRUTH = {"a": [(3.0, 20.0, 30.0), (9.0, 50.0, 70.0)], "b": [(6.0, 10.0, 10.0)], "c": [], "other": [(1.0, 1.0, 1.0)]}
FOUND = [("a", 3, 22, 30, 0.9), ("a", 6, 5, 5, 0.7), ("c", 11.6, 40, 40, 0.4), ("b", 6, 10, 10, 0.1)]
SETTINGS = settings_from({"frame": {"size": 64}, "targets": {"box_pixels": 20, "fade_angstrom": 60}})
EVALUATE = EvaluateSettings(threshold=0.3, radius_angstrom=300)


@pytest.fixture
def manifest(tmp_path: Path) -> pa.Table:
    """Four tomograms of noise, as JPEG slices."""
    for name in TRUTH:
        volume = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
        write_volume(tmp_path / "archive", name, volume, SPACING, "jpeg")
    return make_manifest(str(tmp_path / "archive"), SETTINGS.archive)


@pytest.fixture
def labels() -> Labels:
    tomograms = [(name, *SHAPE, SPACING, len(motors)) for name, motors in TRUTH.items()]
    motors = [(name, *motor) for name, places in TRUTH.items() for motor in places]
    return Labels(pd.DataFrame(tomograms, columns=TOMOGRAM_COLUMNS), pd.DataFrame(motors, columns=MOTOR_COLUMNS))


def finished_run(folder: Path, manifest: pa.Table, found: list[tuple[Any, ...]] = FOUND) -> str:
    """What draws from a run reads of it; it looked at all tomograms but "other"."""
    rows = [dict(zip(("tomo_id", "z", "y", "x", "score"), motor, strict=True)) for motor in found]
    more = {"height": 10.0, "width": 10.0, "n_slices": 3, "voxel_spacing_angstrom": SPACING}
    looked_at = [row for row in manifest.to_pylist() if row["tomo_id"] != "other"]
    write_json(join(str(folder), "run.json"), {"status": "done", "settings": SETTINGS.model_dump(mode="json")})
    write_table(pa.Table.from_pylist(looked_at, manifest.schema), join(str(folder), "tomograms.parquet"))
    write_table(pa.Table.from_pylist([row | more for row in rows], MOTORS), join(str(folder), "motors.parquet"))
    return str(folder)


def height_of(path: Path) -> int:
    picture = cv2.imread(str(path))
    assert picture is not None
    return int(picture.shape[0])


def test_the_page_of_a_validation_counts_what_was_found_missed_and_false(
    manifest: pa.Table, labels: Labels, tmp_path: Path
) -> None:
    run, page = finished_run(tmp_path / "run", manifest), tmp_path / "page.png"
    counts = draw_validation(manifest, labels, run, str(page), EVALUATE)
    assert counts == {"found": 1, "missed": 2, "false": 2}
    few = draw_validation(manifest, labels, run, str(tmp_path / "few.png"), EVALUATE, most=1)
    assert few == counts
    perfect = [(name, *motor, 0.8) for name, motors in TRUTH.items() for motor in motors if name != "other"]
    run = finished_run(tmp_path / "perfect", manifest, perfect)
    assert draw_validation(manifest, labels, run, str(tmp_path / "perfect.png"), EVALUATE) == {
        "found": 3,
        "missed": 0,
        "false": 0,
    }
    assert height_of(tmp_path / "perfect.png") < height_of(page)


def test_motors_on_slices_that_cannot_be_read_are_counted_and_not_drawn(
    manifest: pa.Table, labels: Labels, tmp_path: Path
) -> None:
    run, whole, torn = finished_run(tmp_path / "run", manifest), tmp_path / "whole.png", tmp_path / "torn.png"
    counts = draw_validation(manifest, labels, run, str(whole), EVALUATE)
    (tmp_path / "archive" / "a" / "slice_0003.jpg").unlink()
    (tmp_path / "archive" / "b" / "slice_0006.jpg").write_bytes(b"torn")
    assert draw_validation(manifest, labels, run, str(torn), EVALUATE) == counts
    assert height_of(torn) < height_of(whole)  # nothing to show of the one that was found


def test_a_training_is_not_taken_for_a_detection(manifest: pa.Table, labels: Labels, tmp_path: Path) -> None:
    write_json(str(tmp_path / "first" / "run.json"), {"status": "done", "best": {"epoch": 3}, "settings": {}})
    with pytest.raises(RunError, match=r"first: is a training, expected a detection; .*first/validation/best"):
        draw_validation(manifest, labels, str(tmp_path / "first"), str(tmp_path / "page.png"), EVALUATE)


@pytest.mark.parametrize("format", ["mrc", "zarr"])
def test_motors_in_a_tomogram_that_is_gone_are_counted_and_not_drawn(
    labels: Labels, tmp_path: Path, format: Format
) -> None:
    for name in TRUTH:
        volume = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
        (tmp_path / "volumes").mkdir(exist_ok=True)
        write_volume(tmp_path / "volumes", name, volume, SPACING, format)
    there = make_manifest(str(tmp_path / "volumes"), SETTINGS.archive)
    run = finished_run(tmp_path / "run", there)
    gone = tmp_path / "volumes" / f"a.{format}"
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    counts = draw_validation(there, labels, run, str(tmp_path / "page.png"), EVALUATE)
    assert counts == {"found": 1, "missed": 2, "false": 2}


def test_an_unfinished_run_has_no_page(manifest: pa.Table, labels: Labels, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run\.json"):
        draw_validation(manifest, labels, str(tmp_path / "none"), str(tmp_path / "page.png"), EVALUATE)


@pytest.mark.parametrize("settings", [SETTINGS, settings_from({"frame": {"size": 64}})])
def test_the_check_of_the_data_draws_targets_that_fade_or_do_not(
    manifest: pa.Table, labels: Labels, tmp_path: Path, settings: RunSettings
) -> None:
    drawn = draw_dataset_check(manifest, labels, settings, str(tmp_path / "check.png"))
    assert drawn["tomograms"][0] == "c"
    assert height_of(tmp_path / "check.png") > 500


def test_the_check_of_the_data_shows_what_the_network_sees_of_a_damaged_tomogram(tmp_path: Path) -> None:
    """Bytes that were wrapped are mended before frames are made of them, here as in training."""
    shape = (8, 256, 256)  # fewer pixels show too little of what is wrong
    simulated = simulate_archive(str(tmp_path), 1, 1, shape, voxel_spacing_angstrom=20.0, processes=1)
    [tomogram] = make_manifest(str(tmp_path / "train"), SETTINGS.archive).to_pylist()
    slices = [read_slice(tomogram, z, SETTINGS.archive) for z in range(shape[0])]
    (tmp_path / "torn").mkdir()
    write_volume(tmp_path / "torn", tomogram["tomo_id"], np.stack(slices) ^ np.uint8(128), 20.0, "mrc")
    [torn] = make_manifest(str(tmp_path / "torn"), SETTINGS.archive).to_pylist()
    still = dict.fromkeys(("rotation_degrees", "scaling", "translation_pixels", "poisson_probability"), 0.0)
    drawn = check_row("torn", torn, simulated, SETTINGS, AugmentSettings(blur_sigma_max=0, **still)).augmented
    motors = simulated.motors_of(tomogram["tomo_id"])
    z = round(motors[0, 0]) if len(motors) else shape[0] // 2
    loaded = LoadSlab(SETTINGS).load(slab_of(torn, [z]))
    assert "wrapped" in loaded["loaded"][0]["note"]
    np.testing.assert_array_equal(drawn, loaded["frames"][0, 0])


def with_slabs(run: str) -> str:
    """The slabs of a run that saw nothing on single slices, but could read all."""
    slices: list[dict[str, object]] = [
        {"z": z, "status": "ok", "error": None, "note": None, "presence": 0.0, "detections": []} for z in range(12)
    ]
    rows = [{"slab_id": f"{name}/0", "tomo_id": name, "slices": slices} for name in ("a", "b", "c")]
    write_table(pa.Table.from_pylist(rows, SLABS), join(run, "slabs", "0.parquet"))
    return run


def test_suspect_labels_are_listed_and_drawn_page_by_page(manifest: pa.Table, labels: Labels, tmp_path: Path) -> None:
    run, out = with_slabs(finished_run(tmp_path / "run", manifest)), tmp_path / "care"
    care = CareSettings(missing_score=0.35, radius_angstrom=300, agree_angstrom=80, tiles=2)
    result = care_for_labels(None, labels, run, str(out), care)
    assert result["suspects"] == {"missing": 2, "wrong": 1, "doubtful": 1}
    assert (result["labels"], result["found"], result["not_looked_at"]) == (3, 2, 1)
    table = read_table(join(str(out), "suspects.parquet"))
    assert table["kind"].to_pylist() == ["missing", "wrong", "missing", "doubtful"]
    assert pd.read_csv(out / "suspects.csv")["tomo_id"].tolist() == table["tomo_id"].to_pylist()
    assert result["sheets"] == [join(str(out), f"contact_0{page}.png") for page in (1, 2)]
    assert height_of(out / "contact_01.png") > 300
    with pytest.raises(ExportError, match="is there already"):
        care_for_labels(manifest, labels, run, str(out), care)


def test_suspects_on_slices_that_cannot_be_read_are_listed_and_not_drawn(
    manifest: pa.Table, labels: Labels, tmp_path: Path
) -> None:
    run = with_slabs(finished_run(tmp_path / "run", manifest, [("c", 3, 22, 30, 0.9)]))
    (tmp_path / "archive" / "c" / "slice_0003.jpg").unlink()
    none = labels.motors.iloc[:0]
    result = care_for_labels(manifest, Labels(labels.tomograms, none), run, str(tmp_path / "care"), CareSettings())
    assert (result["suspects"]["missing"], result["sheets"]) == (1, [])


def test_a_run_that_kept_too_little_cannot_say_which_labels_it_does_not_see(
    manifest: pa.Table, labels: Labels, tmp_path: Path
) -> None:
    run = with_slabs(finished_run(tmp_path / "run", manifest))
    with pytest.raises(ConfigError, match=r"kept no detections below 0\.1; give --care\.wrong-score 0\.1, or detect"):
        care_for_labels(manifest, labels, run, str(tmp_path / "care"), CareSettings(wrong_score=0.05))
    little = CareSettings(wrong_score=0.01, missing_score=0.05)
    with pytest.raises(ConfigError, match=r"give --care\.wrong-score 0\.1 --care\.missing-score 0\.1, or detect"):
        care_for_labels(manifest, labels, run, str(tmp_path / "care"), little)
