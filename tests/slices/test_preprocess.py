import numpy as np
import pytest

from motor_ray.config import FrameSettings, PreprocessSettings
from motor_ray.errors import SliceCorruptError
from motor_ray.slices.frame import frames_of
from motor_ray.slices.preprocess import equalise, make_frames, to_uint8

RECIPE = PreprocessSettings()
NOISE = np.random.default_rng(0).normal(128, 30, (300, 200)).clip(0, 255)


def test_eight_bit_slices_keep_their_grey_levels():
    image = NOISE.astype(np.uint8)
    assert to_uint8(image, RECIPE) is image


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, np.float32])
@pytest.mark.parametrize(("scale", "shift"), [(0.3, 0.0), (0.2, -60.0)])
def test_other_types_become_the_same_picture_whatever_their_units(dtype, scale, shift):
    image = NOISE * scale + shift * (np.dtype(dtype).kind != "u")
    ends = np.percentile(NOISE, RECIPE.clip_percentiles)
    expected = np.interp(NOISE, ends, (0, 255))
    one_level = 255 / (ends[1] - ends[0]) / scale if np.dtype(dtype).kind in "iu" else 1
    np.testing.assert_allclose(to_uint8(image.astype(dtype), RECIPE), expected, atol=1.5 * one_level)


def test_a_few_wild_voxels_do_not_take_the_contrast():
    image = NOISE.astype(np.float32)
    wild = image.copy()
    wild[:2, :3] = [1e9, -1e9, np.nan]
    difference = to_uint8(wild, RECIPE)[2:].astype(int) - to_uint8(image, RECIPE)[2:]
    assert np.abs(difference).max() <= 1


def test_a_constant_slice_is_black_and_one_without_a_finite_voxel_is_corrupt():
    assert not to_uint8(np.full((9, 9), 7.5), RECIPE).any()
    with pytest.raises(SliceCorruptError, match="9 x 9"):
        to_uint8(np.full((9, 9), np.nan), RECIPE)


def test_the_extremes_of_int16_and_infinities_end_up_at_the_ends():
    image = NOISE.astype(np.int16)
    image[0, :3] = [-32768, 32767, 0]
    assert to_uint8(image, RECIPE)[0, :3].tolist() == [0, 255, 0]
    whole = np.linspace(-32768, 32767, 90000).reshape(300, 300).astype(np.int16)
    np.testing.assert_allclose(to_uint8(whole, RECIPE), np.interp(whole, (-32440, 32439), (0, 255)), atol=1)
    for dtype in (np.float16, np.float32, np.float64):
        image = NOISE.astype(dtype)
        image[0, :3] = [-np.inf, np.inf, np.nan]
        assert to_uint8(image, RECIPE)[0, :3].tolist() == [0, 255, 0]


def test_a_slice_of_random_bits_is_corrupt_and_a_single_wild_float64_is_clipped():
    bits = (np.random.default_rng(0).uniform(-1, 1, (200, 200)) * 3e38).astype(np.float32)
    with pytest.raises(SliceCorruptError, match=r"200 x 200 voxels: none is finite, or they lie 1e\+38 apart"):
        to_uint8(bits, RECIPE)
    image = NOISE.astype(np.float64)
    image[1, 1] = 1e300
    assert to_uint8(image, RECIPE)[1, 1] == 255


def test_preprocessing_leaves_its_input_alone():
    image = NOISE.astype(np.float32)
    before = image.copy()
    make_frames(image, frames_of(image.shape, None, FrameSettings(size=64)), RECIPE)
    np.testing.assert_array_equal(image, before)


def test_clahe_lifts_faint_detail_out_of_a_gradient_and_can_be_switched_off():
    image = (np.linspace(60, 180, 256)[:, None] + NOISE[:256, :200] * 0.05).astype(np.uint8)
    assert equalise(image, RECIPE).std(axis=1).mean() > 1.5 * image.std(axis=1).mean()
    frames = frames_of(image.shape, None, FrameSettings(size=256))
    plain = make_frames(image, frames, RECIPE.model_copy(update={"clahe": False}))[0]
    np.testing.assert_array_equal(frames[0].cut(image), plain)
