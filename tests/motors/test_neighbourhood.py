import numpy as np
import pytest

from motor_ray.config import LinkSettings
from motor_ray.errors import RunError
from motor_ray.motors.link import Linked
from motor_ray.motors.neighbourhood import (
    FAR_ANGSTROM,
    GEOMETRY,
    PRESENT,
    STEP_ANGSTROM,
    STEPS,
    neighbourhoods,
    stacked,
)
from motor_ray.motors.tracks import link_candidates

SPACING = 10.0
SHAPE = (100, 400, 500)


def linked(
    zs, y=200.0, x=250.0, *, score=0.8, drift=0.0, features=(), looked_at=range(100), spacing=SPACING, shape=SHAPE
):
    """One motor that is seen on the slices `zs`, with one feature for each of `features` on every slice."""
    zs = np.asarray(list(zs), dtype=float)
    boxes = [np.column_stack([zs, y + drift * (zs - zs[0]), np.full(len(zs), x)]), np.full((len(zs), 2), 40.0)]
    table = np.hstack([*boxes, np.full((len(zs), 1), score), np.tile(features, (len(zs), 1))])
    seen = np.asarray(list(looked_at))
    candidates = link_candidates(table, seen, spacing, LinkSettings())
    assert len(candidates) == 1
    return Linked("tomo", candidates, seen, shape, spacing, True)


def geometry(one):
    return dict(zip(GEOMETRY, neighbourhoods(one).geometry[0].tolist(), strict=True))


def test_features_stand_in_the_part_of_z_where_they_were_seen_and_zeros_elsewhere():
    around = neighbourhoods(linked(range(40, 51), features=(2.0, -1.0))).along_z[0]  # 45 +- 50 angstrom
    assert around.shape == (PRESENT + 2, STEPS)
    middle = STEPS // 2
    seen = np.zeros(STEPS, dtype=bool)
    seen[middle - 1 : middle + 2] = True
    np.testing.assert_allclose(around[PRESENT:, seen], np.tile([[2.0], [-1.0]], 3))
    np.testing.assert_allclose(around[0, seen], 0.8, atol=1e-6)
    assert (around[:2, ~seen] == 0).all()
    assert (around[PRESENT:, ~seen] == 0).all()
    assert (around[2] == 1).all()  # every part was looked at
    assert around[1, middle] == 1


def test_what_was_not_looked_at_is_told_from_what_holds_nothing():
    some = neighbourhoods(linked(range(40, 51), features=(1.0,), looked_at=range(38, 60))).along_z[0]
    first = (38 - 45) * SPACING / STEP_ANGSTROM
    assert some[2].tolist() == [
        float(part - STEPS // 2 >= round(first) and part - STEPS // 2 <= 3) for part in range(STEPS)
    ]


def test_the_voxel_spacing_and_the_stride_change_nothing():
    fine = linked(range(40, 61), y=200, x=250, features=(1.0,), spacing=10.0)
    coarse = linked(
        range(20, 31), y=100, x=125, features=(1.0,), spacing=20.0, shape=(50, 200, 250), looked_at=range(50)
    )
    coarse = coarse._replace(
        candidates=[one._replace(motor=one.motor._replace(height=20, width=20)) for one in coarse.candidates]
    )
    np.testing.assert_allclose(neighbourhoods(fine).along_z[0, 2:], neighbourhoods(coarse).along_z[0, 2:], atol=0.2)
    a, b = geometry(fine), geometry(coarse)
    for name in ("extent", "height", "width", "best", "mean"):
        assert a[name] == pytest.approx(b[name], abs=1e-4), name
    for name in ("edge_y", "edge_x"):
        assert a[name] == pytest.approx(b[name], abs=0.02), name


def test_edges_count_as_far_as_they_matter():
    near = geometry(linked(range(3, 8), y=20.0, x=490.0, features=(1.0,)))
    assert near["edge_z"] == pytest.approx(5 * SPACING / FAR_ANGSTROM, abs=1e-3)
    assert near["edge_y"] == pytest.approx(20 * SPACING / FAR_ANGSTROM)
    assert near["edge_x"] == pytest.approx(9 * SPACING / FAR_ANGSTROM)
    assert geometry(linked(range(45, 55), features=(1.0,)))["edge_x"] == 1


def test_a_motor_that_drifts_in_the_plane_says_so():
    straight, drifting = (geometry(linked(range(40, 60), drift=slope, features=(1.0,))) for slope in (0.0, 2.0))
    assert straight["drift"] == 0
    assert drifting["drift"] == pytest.approx(2 * np.std(np.arange(20)) * SPACING / 100, rel=1e-4)
    assert straight["extent"] == pytest.approx(19 * SPACING / 450)


def test_several_tomograms_stand_one_after_the_other():
    one, two = (neighbourhoods(linked(zs, features=(1.0,))) for zs in (range(10, 20), range(50, 60)))
    both = stacked([one, two])
    assert len(both.along_z) == len(both.geometry) == 2
    np.testing.assert_array_equal(both.geometry[1], two.geometry[0])


def test_without_features_there_is_nothing_to_judge_by():
    with pytest.raises(RunError, match=r"no features to judge candidates by.*with --detect\.features"):
        neighbourhoods(linked(range(10, 20)))
