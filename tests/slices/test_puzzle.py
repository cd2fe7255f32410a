import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motor_ray.config import AugmentSettings, PretrainSettings
from motor_ray.slices.puzzle import hidden_patches, make_puzzle

STILL = AugmentSettings(rotation_degrees=0, scaling=0, translation_pixels=0, poisson_probability=0, blur_sigma_max=0)
SETTINGS = PretrainSettings(mask_pixels=8)


def frame(seed: int = 0) -> np.ndarray:
    """Three slices of noise around one structure."""
    rng = np.random.default_rng(seed)
    structure = 100 + 60 * (np.add.outer(np.arange(64), np.arange(64)) // 16 % 2)
    return np.clip(structure + rng.normal(0, 10, (3, 64, 64)), 0, 255).astype(np.uint8)


@given(st.integers(16, 90), st.integers(4, 40), st.floats(0, 0.95))
def test_the_asked_share_is_hidden_in_whole_patches(size, patch, share):
    settings = PretrainSettings(mask_pixels=patch, mask_share=share)
    mask = hidden_patches(size, settings, np.random.default_rng(1))
    corners = mask[::patch, ::patch]
    assert mask.shape == (size, size)
    assert corners.sum() == round(share * corners.size)
    assert (mask == np.kron(corners, np.ones((patch, patch), bool))[:size, :size]).all()


def test_a_network_that_sees_one_slice_is_to_say_the_next_everywhere():
    three = frame()
    puzzle = make_puzzle(three, 1, np.random.default_rng(0), SETTINGS, None)
    assert (puzzle.image == three[[1]]).all()
    assert (puzzle.target == three[[2]]).all()
    assert puzzle.counted.all()


def test_in_training_either_neighbour_is_asked_for():
    three = frame()
    asked = {
        next(
            z
            for z in (0, 2)
            if (make_puzzle(three, 1, np.random.default_rng(n), SETTINGS, STILL).target == three[z]).all()
        )
        for n in range(20)
    }
    assert asked == {0, 2}


def test_a_network_that_sees_three_slices_is_to_say_the_middle_where_it_is_hidden():
    """Elsewhere it sees the answer."""
    three = frame()
    puzzle = make_puzzle(three, 3, np.random.default_rng(0), SETTINGS, None)
    assert (puzzle.image == three).all()
    assert (puzzle.target == three[[1]]).all()
    assert (puzzle.counted == puzzle.mask).all()


@pytest.mark.parametrize(("unread", "asked"), [((2,), 0), ((0, 2), 1)])
def test_a_slice_does_not_stand_for_its_unreadable_neighbour(unread, asked):
    """LoadSlab puts the slice in its place; copying would then be the perfect answer."""
    three = frame()
    three[list(unread)] = three[1]
    puzzle = make_puzzle(three, 1, np.random.default_rng(0), SETTINGS, None)
    assert (puzzle.target == three[[asked]]).all()
    assert puzzle.counted.all() == (asked != 1)


def test_noise_is_put_on_what_is_shown_and_not_on_the_target():
    three = frame()
    noisy = STILL.model_copy(update={"poisson_probability": 1.0})
    puzzle = make_puzzle(three, 1, np.random.default_rng(0), SETTINGS, noisy)
    assert (puzzle.image != three[[1]]).mean() > 0.5
    assert any((puzzle.target == three[[z]]).all() for z in (0, 2))


def test_what_is_shown_and_what_is_asked_for_are_moved_together():
    three = np.broadcast_to(frame()[1], (3, 64, 64)).copy()
    three[0, 0, 0] ^= 1
    three[2, 0, 1] ^= 1  # so that the neighbours are not taken for the slice itself
    moving = AugmentSettings(flips=True, poisson_probability=0, blur_sigma_max=0)
    for seed in range(5):
        puzzle = make_puzzle(three, 1, np.random.default_rng(seed), SETTINGS, moving)
        assert (puzzle.image != three[[1]]).any()
        assert np.abs(puzzle.image.astype(int) - puzzle.target).max() <= 1
