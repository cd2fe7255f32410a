from collections.abc import Callable

import numpy as np
import pytest

from motor_ray.archive.readers import read_slices
from motor_ray.errors import MotorRayError, OutageError, SliceCorruptError, SliceMissingError, StorageError


class Stub:
    """A tomogram of ten slices, each full of its z, of which slice 3 fails."""

    shape = (10, 2, 2)
    voxel_spacing_angstrom = None

    def __init__(self, failure: Callable[[str], MotorRayError]) -> None:
        self.failure = failure

    def read_slice(self, z: int) -> np.ndarray:
        if z == 3:
            raise self.failure("slice 3")
        return np.full((2, 2), z)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("failure", [SliceMissingError, SliceCorruptError, StorageError])
def test_a_slice_that_cannot_be_read_is_an_error_in_its_place_and_the_others_are_there(
    failure: type[MotorRayError], threads: int
) -> None:
    slices = read_slices(Stub(failure), [4, 3, 9], threads)
    assert [type(values) for values in slices] == [np.ndarray, failure, np.ndarray]
    assert [np.max(np.asarray(slices[place])) for place in (0, 2)] == [4, 9]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("zs", [[3], [4, 3, 9]])
def test_a_storage_that_is_out_is_no_error_of_a_slice(zs: list[int], threads: int) -> None:
    with pytest.raises(OutageError, match="slice 3"):
        read_slices(Stub(OutageError), zs, threads)
