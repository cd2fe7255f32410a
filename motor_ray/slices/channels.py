"""Which slices are the channels of an image, and what the frames of a slice weigh."""

from collections.abc import Iterable

from motor_ray.config import RunSettings
from motor_ray.slices.frame import frames_of


def channel_step(voxel_spacing_angstrom: float | None, settings: RunSettings) -> int:
    """How many slices lie between the channels of an image of such a tomogram; 0 if it has but one channel.

    A spacing that is unknown is taken to be ``link.assumed_spacing_angstrom``.
    """
    model = settings.model
    if model.in_slices == 1:
        return 0
    if model.slice_step_angstrom is None:
        return model.slice_step
    spacing = voxel_spacing_angstrom or settings.link.assumed_spacing_angstrom
    return max(round(model.slice_step_angstrom / spacing), 1)


def channels_of(z: int, size_z: int, step: int) -> list[int]:
    """The slices that are the channels of slice `z`, in order; beyond its ends the tomogram goes on as it ended."""
    steps = (-step, 0, step) if step else (0,)
    return [min(max(z + one, 0), size_z - 1) for one in steps]


def with_neighbours(zs: Iterable[int], size_z: int, step: int) -> list[int]:
    """The channels of all of `zs`, in order and each once: what has to be read."""
    return sorted({channel for z in zs for channel in channels_of(z, size_z, step)})


def slice_bytes(shape: tuple[int, int], voxel_spacing_angstrom: float | None, settings: RunSettings) -> int:
    """Bytes of the frames that are made of a slice of such a shape (y, x).

    Raises TomogramError if it cannot be made frames of.
    """
    tiles = len(frames_of(shape, voxel_spacing_angstrom, settings.frame))
    return tiles * settings.detect.contrasts * settings.frame.size**2
