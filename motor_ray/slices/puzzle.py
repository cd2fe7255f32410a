"""What a network can learn from slices that nobody has labelled: to say what is there where parts are hidden.

The truth it is compared with is the next slice, not the one that it sees. Adjacent slices show nearly the same
structure while their noise is nearly independent, so that the best answer is the structure without the noise (Lehtinen
et al. 2018, "Noise2Noise", arXiv 1803.04189; for tomograms Buchholz et al. 2019, "Cryo-CARE", arXiv 1810.05420), and
hidden patches have to be filled in from what surrounds them (He et al. 2022, "Masked Autoencoders", arXiv 2111.06377).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from motor_ray.config import AugmentSettings, PretrainSettings
from motor_ray.slices.augment import blur, poisson_noise, random_transform, warp


class Puzzle(NamedTuple):
    """A frame to be made whole."""

    image: NDArray[np.uint8]
    """``(in_slices, y, x)`` what is shown; what lies under the mask is not."""

    target: NDArray[np.uint8]
    """``(1, y, x)`` what is to be said."""

    mask: NDArray[np.bool_]
    """``(1, y, x)`` what is hidden."""

    counted: NDArray[np.bool_]
    """``(1, y, x)`` where the answer counts."""


def make_puzzle(
    frame: NDArray[np.uint8],
    in_slices: int,
    rng: np.random.Generator,
    settings: PretrainSettings,
    changes: AugmentSettings | None,
) -> Puzzle:
    """A puzzle from a frame and its neighbours, ``(3, y, x)``.

    A network that sees one slice is to say either neighbour, everywhere. One that sees all three is to say the middle
    one, and so is any where neighbours could not be read and the slice itself stands in their place; the answer then
    counts under the mask alone, for elsewhere the slice, noise and all, only had to be copied.

    With `changes` the frame is moved as in training, and what is shown gets noise and blur that the target is spared.
    Without them the puzzle is the same each time but for `rng`'s mask.
    """
    size = frame.shape[-1]
    mask = hidden_patches(size, settings, rng)[None]
    step = 1 if changes is None or rng.random() < 0.5 else -1
    if changes is not None:
        frame = warp(frame, random_transform(size, rng, changes))
    others = [] if in_slices == 3 else [frame[[1 + one]] for one in (step, -step)]
    neighbour = next((other for other in others if not np.array_equal(other, frame[[1]])), None)
    target = frame[[1]] if neighbour is None else neighbour
    counted = mask if neighbour is None else np.ones_like(mask)
    image = frame if in_slices == 3 else frame[[1]]
    if changes is not None:
        image = poisson_noise(image, rng) if rng.random() < changes.poisson_probability else image
        image = blur(image, rng.uniform(0, changes.blur_sigma_max))
    return Puzzle(image, target, mask, counted)


def hidden_patches(size: int, settings: PretrainSettings, rng: np.random.Generator) -> NDArray[np.bool_]:
    """``(size, size)``, true in the asked share of square patches, which are chosen at random."""
    edge = -(-size // settings.mask_pixels)
    hidden = np.zeros(edge * edge, np.bool_)
    hidden[rng.permutation(edge * edge)[: round(settings.mask_share * edge * edge)]] = True
    whole = hidden.reshape(edge, edge).repeat(settings.mask_pixels, axis=0).repeat(settings.mask_pixels, axis=1)
    return np.asarray(whole[:size, :size])
