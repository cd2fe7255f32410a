import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from motor_ray.config import EvaluateSettings
from motor_ray.errors import MetricError
from motor_ray.motors.evaluate import boxes_on_slices, evaluate
from motor_ray.motors.link import link_slabs
from motor_ray.tables import MANIFEST, MOTORS, SLABS

SPACING = 10.0
REACH = 60.0
EDGES = {"with": (40.0, 44.0), "without": (40.0, 44.0)}
TRUTH_MOTORS = pd.DataFrame({"tomo_id": ["with", "unseen"], "z": [20, 1], "y": [100, 1], "x": [120, 1]})
TRUTH_TOMOGRAMS = pd.DataFrame({"tomo_id": ["with", "without", "unseen"], "voxel_spacing_angstrom": SPACING})


def slabs(found: dict[str, tuple[float, float, float]], bad: tuple[int, ...] = (), score: float = 0.9) -> pa.Table:
    """Two tomograms of 40 slices; `found` has the z, y, x of the motor that is seen within reach of z in each."""
    rows: list[dict[str, Any]] = []
    for tomo_id in ("with", "without"):
        z0, y, x = found.get(tomo_id, (-100, 0, 0))
        box = {"y": y, "x": x, "height": 40, "width": 44, "score": score}
        for start in (0, 20):
            slices = [
                {
                    "z": z,
                    "status": "corrupt" if z in bad else "ok",
                    "error": "cut short" if z in bad else None,
                    "note": None,
                    "presence": 0.5,
                    "detections": [box] if abs(z - z0) * SPACING <= REACH and z not in bad else [],
                }
                for z in range(start, start + 20)
            ]
            rows.append({"slab_id": f"{tomo_id}-{start}", "tomo_id": tomo_id, "slices": slices})
    return pa.Table.from_pylist(rows, schema=SLABS)


def scores(table: pa.Table, **change: Any) -> dict[str, Any]:
    row = {"uri": "u", "format": "mrc", "size_z": 40, "size_y": 300, "size_x": 300, "voxel_spacing_angstrom": SPACING}
    manifest = pa.Table.from_pylist([row | {"tomo_id": name} for name in EDGES], schema=MANIFEST)
    given: dict[str, Any] = {
        "truth_motors": TRUTH_MOTORS,
        "truth_tomograms": TRUTH_TOMOGRAMS,
        "box_edges": EDGES,
        "reach_angstrom": REACH,
        **change,
    }
    result = evaluate(table, link_slabs(table, manifest), **given)
    json.dumps(result, allow_nan=False)
    return result


def test_a_perfect_run_scores_one_on_slices_tomograms_and_motors() -> None:
    result = scores(slabs({"with": (20, 100, 120)}))
    assert result["slices"]["mAP@0.9"] == pytest.approx(1)
    assert result["slices"]["f1"] == result["tomograms"]["f2"] == result["motors"]["f2"] == 1
    assert (result["slices"]["n_slices"], result["slices"]["n_boxes"]) == (80, 13)
    assert result["motors"]["localisation_error_angstrom_median"] == pytest.approx(0, abs=1e-4)
    assert result["tomograms"]["n_not_looked_at"] == 1


def test_a_false_alarm_costs_precision_everywhere() -> None:
    result = scores(slabs({"with": (20, 100, 120), "without": (20, 100, 120)}))
    for level in ("slices", "tomograms", "motors"):
        assert result[level]["precision"] == 0.5
        assert result[level]["recall"] == 1


def test_a_shifted_motor_is_a_hit_in_space_but_not_on_slices() -> None:
    result = scores(slabs({"with": (20, 130, 120)}))
    assert result["slices"]["recall"] == 0
    assert result["tomograms"]["recall"] == 1
    assert result["motors"]["localisation_error_angstrom_median"] == pytest.approx(300, abs=1e-3)
    near = scores(slabs({"with": (20, 130, 120)}), settings=EvaluateSettings(radius_angstrom=200))
    assert near["tomograms"]["recall"] == near["motors"]["recall"] == 0


def test_unreadable_slices_are_told_and_not_judged() -> None:
    result = scores(slabs({"with": (20, 100, 120)}, bad=(18, 30)))
    assert result["slices"]["n_unreadable"] == 4
    assert (result["slices"]["n_slices"], result["slices"]["n_boxes"]) == (76, 12)
    assert result["slices"]["recall"] == result["tomograms"]["recall"] == 1


def test_the_threshold_of_the_settings_decides() -> None:
    result = scores(slabs({"with": (20, 100, 120)}, score=0.6), settings=EvaluateSettings(threshold=0.7))
    for level in ("slices", "tomograms", "motors"):
        assert result[level]["threshold"] == 0.7
        assert result[level]["recall"] == 0
        assert result[level]["precision"] is None
    assert result["tomograms"]["best"]["recall"] == 1


def test_a_run_that_found_nothing_in_tomograms_without_motors_is_scored() -> None:
    result = scores(slabs({}), truth_motors=TRUTH_MOTORS.iloc[:0])
    for level in ("slices", "tomograms", "motors"):
        assert result[level]["precision"] is result[level]["recall"] is None


def test_no_run_at_all_is_scored_as_nothing() -> None:
    nothing = {"box_edges": EDGES, "reach_angstrom": REACH}
    result = evaluate(SLABS.empty_table(), MOTORS.empty_table(), TRUTH_MOTORS, TRUTH_TOMOGRAMS, **nothing)  # type: ignore[arg-type]
    assert result["tomograms"]["n_tomograms"] == 0
    assert result["slices"]["mAP@0.5"] is None


def test_tomograms_without_labels_or_boxes_are_named() -> None:
    table = slabs({})
    with pytest.raises(MetricError, match=r"1 of 2 tomograms that were looked at have no labels, such as without"):
        scores(table, truth_tomograms=TRUTH_TOMOGRAMS[TRUTH_TOMOGRAMS["tomo_id"] != "without"])
    with pytest.raises(MetricError, match=r"have no box sizes, such as with"):
        scores(table, box_edges={})


def test_a_true_box_is_drawn_on_the_slices_within_reach_only() -> None:
    motors = np.array([[10.0, 50, 60], [14, 90, 95]])
    boxes = boxes_on_slices(np.arange(20), motors, (40.0, 44.0), reach_voxels=3)
    assert [len(on_slice) for on_slice in boxes] == [0] * 7 + [1] * 4 + [2] * 3 + [1] * 4 + [0] * 2
    np.testing.assert_array_equal(boxes[8], [[50, 60, 40, 44]])
