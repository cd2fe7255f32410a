from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import FrameSettings
from motor_ray.errors import TomogramError
from motor_ray.slices.frame import MILD_SHRINKING, OVERLAP, Frame, frames_of, resample

FIT = FrameSettings(size=720)
SPACING = FrameSettings(mode="spacing", size=256, spacing_angstrom=16.0)

edges = st.integers(1, 1000)
shapes = st.tuples(edges, edges)


@given(shapes, st.sampled_from([FIT, SPACING]), st.floats(6.5, 25.0), st.integers(0, 2**32))
def test_positions_and_boxes_return_from_the_frame_to_where_they_were(shape, settings, spacing, seed):
    boxes = np.random.default_rng(seed).uniform(0, shape * 2, (5, 4))
    for frame in frames_of(shape, spacing, settings):
        np.testing.assert_allclose(frame.boxes_to_slice(frame.boxes_to_frame(boxes)), boxes, atol=1e-3)


@given(shapes, st.floats(1.0, 20.0))
def test_frames_cover_every_voxel_and_overlap_where_there_are_several(shape, spacing):
    frames = frames_of(shape, spacing, SPACING)
    for axis in (0, 1):
        starts = sorted({frame.origin[axis] for frame in frames})
        assert starts[0] <= 0
        assert starts[-1] + SPACING.size >= frames[0].resampled_shape[axis]
        assert all(after - before <= SPACING.size * (1 - OVERLAP) + 1 for before, after in pairwise(starts))


def test_a_slice_that_fits_at_its_spacing_takes_one_frame_and_the_commonest_public_one_takes_four():
    assert len(frames_of((200, 256), 16.0, SPACING)) == 1
    assert len(frames_of((960, 928), 13.1, FrameSettings(mode="spacing"))) == 4


@pytest.mark.parametrize("shape", [(300, 200), (480, 640), (1912, 1847)], ids=str)
def test_a_bright_spot_is_where_the_frame_says_it_is(shape):
    frame = frames_of(shape, None, FIT)[0]
    y, x = shape[0] * 0.3, shape[1] * 0.6
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    sigma = max(shape) / 60
    spot = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2))
    seen = frame.cut(resample(spot.astype(np.uint8), frame.resampled_shape)).astype(float)
    seen[seen < 60] = 0  # what lies beyond the slice has its mean grey
    moments = cv2.moments(seen)
    centre = moments["m01"] / moments["m00"], moments["m10"] / moments["m00"]
    np.testing.assert_allclose(centre, frame.to_frame([y, x]), atol=0.05)


def test_fit_scales_the_longest_edge_to_the_frame_and_centres_the_other():
    frame = frames_of((960, 480), None, FIT)[0]
    assert frame.resampled_shape == (720, 360)
    np.testing.assert_allclose(frame.to_frame([479.5, 239.5]), [359.5, 359.5])


def test_beyond_the_slice_the_frame_is_the_slices_mean_grey():
    frame = Frame(size=4, slice_shape=(2, 4), resampled_shape=(2, 4), origin=(-1, 0))
    image = np.array([[0, 100, 100, 200], [0, 100, 100, 200]], np.uint8)
    assert frame.cut(image).tolist() == [[100] * 4, *image.tolist(), [100] * 4]


def test_a_fixed_spacing_needs_the_tomograms_own():
    with pytest.raises(TomogramError, match=r"has none.*--archive\.voxel-spacing-angstrom"):
        frames_of((960, 928), None, SPACING)


def test_an_absurd_spacing_is_refused_before_any_memory_is_taken():
    with pytest.raises(TomogramError, match="is the voxel spacing right"):
        frames_of((960, 928), 4000.0, SPACING)


@pytest.mark.parametrize("factor", [MILD_SHRINKING, MILD_SHRINKING - 0.01, 0.5, 1.5])
def test_resampling_keeps_what_is_smooth_whichever_way_it_goes(factor):
    y, x = np.mgrid[0:400, 0:400] + 0.5
    shape = (round(400 * factor),) * 2

    def wave(y, x):
        return 128 + 100 * np.sin(y / 25) * np.cos(x / 40)

    smaller = resample(np.rint(wave(y, x)).astype(np.uint8), shape).astype(float)
    y, x = (np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5) * (400 / shape[0])
    assert np.abs(smaller - wave(y, x))[4:-4, 4:-4].max() < 2
