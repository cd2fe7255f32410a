"""Write a volume as Kaggle's JPEG slices, as MRC or as OME-Zarr, on the local disk; knows nothing of what it shows."""

from pathlib import Path
from typing import Any, Literal

import cv2
import mrcfile
import numpy as np
import zarr
from numpy.typing import NDArray

from motor_ray.errors import ConfigError

Format = Literal["jpeg", "mrc", "zarr"]

JPEG_QUALITY = 92

ZARR_LEVELS = 3
"""Each half as fine as the one before, as the CryoET Data Portal stores them."""


def write_volume(folder: Path, name: str, volume: NDArray[np.uint8], spacing_angstrom: float, format: Format) -> None:
    """Write `(z, y, x)` grey levels as `folder`/`name`/slice_NNNN.jpg, `folder`/`name`.mrc or `folder`/`name`.zarr."""
    if format == "jpeg":
        _write_jpegs(folder / name, volume)
    elif format == "mrc":
        _write_mrc(folder / f"{name}.mrc", volume, spacing_angstrom)
    elif format == "zarr":
        _write_zarr(folder / f"{name}.zarr", volume, spacing_angstrom)
    else:
        raise ConfigError(f"{folder}: cannot write the format {format!r}; choose jpeg, mrc or zarr")


def _write_jpegs(folder: Path, volume: NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for z, image in enumerate(volume):
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (folder / f"slice_{z:04d}.jpg").write_bytes(data.tobytes())


def _write_mrc(path: Path, volume: NDArray[np.uint8], spacing_angstrom: float) -> None:
    # Mode 0 would be signed, and mode 6 is unknown to some readers; mode 1 holds 0 to 255 without a doubt.
    with mrcfile.new(path) as file:
        file.set_data(volume.astype(np.int16))
        file.voxel_size = spacing_angstrom


def _write_zarr(path: Path, volume: NDArray[np.uint8], spacing_angstrom: float) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=2)
    datasets: list[Any] = []
    for level in range(ZARR_LEVELS):
        chunks = tuple(min(size, chunk) for size, chunk in zip(volume.shape, (16, 256, 256), strict=True))
        array = group.create_array(
            str(level),
            shape=volume.shape,
            chunks=chunks,
            dtype=volume.dtype,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        array[...] = volume
        scale = spacing_angstrom * 2**level
        # A coarse voxel's centre lies between its first and last fine voxel.
        shift = (scale - spacing_angstrom) / 2
        transformations = [
            {"type": "scale", "scale": [scale] * 3},
            {"type": "translation", "translation": [shift] * 3},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
        volume = _halve(volume)
    axes: list[Any] = [{"name": name, "type": "space", "unit": "angstrom"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "name": path.stem, "axes": axes, "datasets": datasets}]


def _halve(volume: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average blocks of eight voxels into one; an odd last slice, row or column is dropped."""
    z, y, x = (max(size // 2, 1) for size in volume.shape)
    whole = volume[: 2 * z, : 2 * y, : 2 * x]
    blocks = whole.reshape(z, whole.shape[0] // z, y, whole.shape[1] // y, x, whole.shape[2] // x)
    halved: NDArray[np.uint8] = np.rint(blocks.mean((1, 3, 5))).astype(np.uint8)
    return halved
