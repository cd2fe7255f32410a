"""Volumes in OME-Zarr groups (metadata 0.4 in Zarr 2, 0.5 in Zarr 3), and bare Zarr arrays.

The chunks are the library's business; this knows the metadata: which level, which axes, how long a voxel is.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.errors import BaseZarrError
from zarr.storage import FsspecStore, LocalStore

from motor_ray.config import ArchiveSettings
from motor_ray.errors import SliceCorruptError, SliceMissingError, StorageError, TomogramError
from motor_ray.storage import IO_ERRORS, filesystem, reason

ANGSTROM = {"angstrom": 1.0, "nanometer": 10.0, "micrometer": 1e4}
"""Length of the units that volumes of this kind are written in."""


class OmeZarrTomogram:
    """One level of an OME-Zarr group."""

    def __init__(self, uri: str, array: Any, voxel_spacing_angstrom: float | None) -> None:
        self.uri = uri
        self.shape: tuple[int, int, int] = array.shape[-3:]
        self.voxel_spacing_angstrom = voxel_spacing_angstrom
        self.chunk_depth: int = array.chunks[-3]
        self._array = array
        self._first = (0,) * (array.ndim - 3)

    def read_slice(self, z: int) -> np.ndarray:
        """`(y, x)` values of slice `z` in the stored type but this machine's byte order.

        Reads every chunk that holds the slice, that is `chunk_depth` slices. A chunk that is not there holds the fill
        value, as the format says. Raises SliceMissingError for a `z` outside the volume, SliceCorruptError if a chunk
        cannot be decoded, StorageError if the storage fails.
        """
        return self.read_slices([z])[0]

    def read_slices(self, zs: Sequence[int]) -> list[np.ndarray]:
        """`(y, x)` values of each of `zs`, reading each chunk once; all slices in between are held meanwhile."""
        low, high = min(zs), max(zs)
        if low < 0 or high >= self.shape[0]:
            wrong = low if low < 0 else high
            raise SliceMissingError(f"{self.uri}: there is no slice {wrong}; the slices are 0 to {self.shape[0] - 1}")
        try:
            block = self._array[(*self._first, slice(low, high + 1))]
        except IO_ERRORS as error:
            raise StorageError(f"{self.uri}: cannot be read ({reason(error)})") from None
        except Exception as error:  # each codec has exceptions of its own
            which = f"slice {low}" if low == high else f"slices {low} to {high}"
            raise SliceCorruptError(
                f"{self.uri}: {which} cannot be read ({type(error).__name__}: {error}); copy the chunk again"
            ) from error
        block = np.asarray(block, dtype=block.dtype.newbyteorder("="))
        return [block[z - low] for z in zs]


def open_ome_zarr(uri: str, settings: ArchiveSettings, level: int = 0) -> OmeZarrTomogram:
    """Open the resolution `level` of the OME-Zarr group `uri`, 0 being the finest, or the bare Zarr array `uri`.

    Raises TomogramError if there is no such group, level or volume, or one that is not a real-valued z, y, x volume.
    """
    node = _open(uri, settings)
    spacing = settings.voxel_spacing_angstrom
    if isinstance(node, zarr.Group):
        image = _image(node, uri)
        datasets = image.get("datasets", [])
        if not 0 <= level < len(datasets):
            raise TomogramError(f"{uri}: has no level {level}; its levels are 0 to {len(datasets) - 1}")
        array = _member(node, str(datasets[level].get("path")), uri)
        spacing = spacing or _spacing(image, datasets[level], uri)
    else:
        array = node
    if array.ndim < 3 or any(size != 1 for size in array.shape[:-3]) or 0 in array.shape:
        raise TomogramError(f"{uri}: has the shape {array.shape}, expected one volume (z, y, x); choose a single image")
    if array.dtype.kind not in "iuf":
        raise TomogramError(f"{uri}: holds values of type {array.dtype}, expected integers or floats; convert it")
    return OmeZarrTomogram(uri, array, spacing)


def _open(uri: str, settings: ArchiveSettings) -> Any:
    files, path = filesystem(uri, anonymous=settings.anonymous)
    try:
        if isinstance(files, LocalFileSystem):
            store: Any = LocalStore(path, read_only=True)
        else:
            store = FsspecStore.from_url(uri, storage_options=dict(files.storage_options), read_only=True)
        return zarr.open(store, mode="r")
    except FileNotFoundError:
        raise TomogramError(f"{uri}: is not a Zarr group: it has no metadata; copy it again") from None
    except (BaseZarrError, OSError, ValueError, KeyError, TypeError) as error:
        raise TomogramError(f"{uri}: cannot be opened as Zarr ({error}); copy it again") from None


def _image(group: zarr.Group, uri: str) -> dict[str, Any]:
    attributes: Any = group.attrs.asdict()
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise TomogramError(f"{uri}: its metadata has no 'multiscales', expected an OME-Zarr image; name its group")
    return dict(images[0])


def _member(group: zarr.Group, path: str, uri: str) -> Any:
    try:
        member = group[path]
    except KeyError:
        member = None
    if not isinstance(member, zarr.Array):
        raise TomogramError(f"{uri}: the array '{path}' that its metadata names is not there; copy it again")
    return member


def _spacing(image: dict[str, Any], dataset: dict[str, Any], uri: str) -> float | None:
    """Voxel spacing in angstrom from the scales of the z, y and x axes, or None without a scale or a unit."""
    axes = image.get("axes", [])
    if len(axes) < 3 or not all(isinstance(axis, dict) for axis in axes):
        return None  # versions before 0.4 have no units
    if [axis.get("name") for axis in axes[-3:]] != ["z", "y", "x"]:
        names = ", ".join(str(axis.get("name")) for axis in axes)
        raise TomogramError(f"{uri}: its axes are {names}, expected them to end in z, y, x; transpose it")
    scale = np.ones(len(axes))
    scaled = False
    for step in [*dataset.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]:
        if step.get("type") == "scale":
            scale, scaled = scale * np.asarray(step["scale"], dtype=float), True
    units = [ANGSTROM.get(str(axis.get("unit")), math.nan) for axis in axes[-3:]]
    edges = scale[-3:] * units
    if not scaled or not np.isfinite(edges).all() or (edges <= 0).any():
        return None
    if edges.max() > 1.01 * edges.min():
        size = " x ".join(f"{edge:g}" for edge in edges)
        raise TomogramError(
            f"{uri}: its voxels are {size} angstrom (z, y, x), expected cubes; "
            "resample it, or state the true spacing as --archive.voxel-spacing-angstrom"
        )
    return float(edges.mean())
