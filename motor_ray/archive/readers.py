"""One way to read every kind of tomogram.

It knows which format is which, not what the values mean: grey levels come as they are stored.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from motor_ray.archive.jpeg_stack import JpegStack
from motor_ray.archive.mrc import open_mrc
from motor_ray.config import ArchiveSettings
from motor_ray.errors import MotorRayError, OutageError, TomogramError

FORMATS = ("jpeg_stack", "mrc", "ome_zarr")
"""What the manifest's column `format` may say. A stack may hold JPEG or PNG images."""


class TomogramReader(Protocol):
    """A tomogram that is open. Several threads may read it at once."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its size in voxels along z, y, x."""

    @property
    def voxel_spacing_angstrom(self) -> float | None:
        """Edge of a voxel; None where the files do not say it."""

    def read_slice(self, z: int) -> np.ndarray:
        """`(y, x)` values of slice `z` in the stored type; perhaps read-only.

        Raises SliceMissingError, SliceCorruptError or StorageError, which concern this slice alone, and OutageError.
        """


@runtime_checkable
class ReadsTogether(Protocol):
    """A reader for which neighbouring slices together cost less than one by one."""

    def read_slices(self, zs: Sequence[int]) -> list[np.ndarray | MotorRayError]:
        """The slices `zs`, in order, or what `read_slice` would raise; raises OutageError."""


def open_tomogram(uri: str, format: str, shape: tuple[int, int, int], settings: ArchiveSettings) -> TomogramReader:
    """Open the tomogram that a row of the manifest describes.

    `uri`, `format` and `shape` (z, y, x) are the manifest's; a stack of images is opened without any request. Raises
    TomogramError if the file is unreadable or no longer of that shape, StorageError if the storage fails.
    """
    reader: TomogramReader
    if format == "jpeg_stack":
        return JpegStack(uri, shape, settings)
    if format == "mrc":
        reader = open_mrc(uri, settings)
    elif format == "ome_zarr":
        from motor_ray.archive.ome_zarr import open_ome_zarr  # zarr takes long to import

        reader = open_ome_zarr(uri, settings)
    else:
        raise TomogramError(f"{uri}: is of the unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    if reader.shape != tuple(shape):
        raise TomogramError(
            f"{uri}: is {' x '.join(map(str, reader.shape))} voxels (z, y, x), the manifest says "
            f"{' x '.join(map(str, shape))}; make the manifest again"
        )
    return reader


def read_slices(reader: TomogramReader, zs: Sequence[int], threads: int) -> list[np.ndarray | MotorRayError]:
    """Read the slices `zs` on up to `threads` threads.

    Returns one entry for each of `zs`, in order: the `(y, x)` array, or the error that this slice ended with. Raises
    OutageError if the storage does not answer: that says nothing about a slice.
    """
    if isinstance(reader, ReadsTogether):
        return reader.read_slices(zs)

    def attempt(z: int) -> np.ndarray | MotorRayError:
        try:
            return reader.read_slice(z)
        except OutageError:
            raise
        except MotorRayError as error:
            return error

    if threads == 1 or len(zs) < 2:
        return [attempt(z) for z in zs]
    with ThreadPoolExecutor(min(threads, len(zs))) as pool:
        return list(pool.map(attempt, zs))
