"""What the metadata of an OME-Zarr image say: its levels, its axes, how long a voxel is. Opens no file."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from motor_ray.errors import TomogramError

ANGSTROM = {"picometer": 0.01, "angstrom": 1.0, "nanometer": 10.0, "micrometer": 1e4, "millimeter": 1e7, "meter": 1e10}
"""Length of the units, as the format spells them, that volumes of this kind are written in."""

Image = Mapping[str, Any]


def image_of(attributes: Mapping[str, Any], uri: str) -> Image:
    """The first multiscale image in a group's attributes. Raises TomogramError if there is none."""
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise TomogramError(f"{uri}: its metadata has no 'multiscales', expected an OME-Zarr image; name its group")
    return dict(images[0])


def level_of(image: Image, level: int, uri: str) -> Mapping[str, Any]:
    """The entry of a resolution level. Raises TomogramError if the image has no such level."""
    levels = image.get("datasets", [])
    if not 0 <= level < len(levels):
        there = f"its levels are 0 to {len(levels) - 1}" if len(levels) > 1 else f"it has {len(levels)}"
        raise TomogramError(f"{uri}: has no level {level}; {there}, choose one with --archive.zarr-level")
    return dict(levels[level])


def spacing_of(image: Image, level: int, uri: str) -> float | None:
    """Voxel spacing of a level in angstrom, or None without a scale or a known unit.

    Raises TomogramError if the axes are not z, y, x, or voxels no cubes.
    """
    axes = image.get("axes", [])
    scale = _scale(image, level, uri)
    if len(axes) < 3 or not all(isinstance(axis, dict) for axis in axes):
        return None  # versions before 0.4 have no units
    if [axis.get("name") for axis in axes[-3:]] != ["z", "y", "x"]:
        names = ", ".join(str(axis.get("name")) for axis in axes)
        raise TomogramError(f"{uri}: its axes are {names}, expected them to end in z, y, x; transpose it")
    units = [ANGSTROM.get(str(axis.get("unit")).lower(), math.nan) for axis in axes[-3:]]
    if scale is None or not np.isfinite(units).all():
        return None
    edges = scale * units
    if edges.max() > 1.01 * edges.min():
        size = " x ".join(f"{edge:g}" for edge in edges)
        raise TomogramError(
            f"{uri}: its voxels are {size} angstrom (z, y, x), expected cubes; "
            "resample it, or state the true spacing as --archive.voxel-spacing-angstrom"
        )
    return float(f"{edges.mean():.9g}")  # the mean of 26.96, 26.96 and 26.96 would be 26.959999999999997


def coarseness_of(image: Image, level: int, uri: str) -> float:
    """Edge of the voxels of `level` relative to the finest's: about 2 to the power of `level`.

    Raises TomogramError if the scales do not say it, or if it is not the same along z, y and x.
    """
    if level == 0:
        return 1.0
    scale, finest = _scale(image, level, uri), _scale(image, 0, uri)
    if scale is None or finest is None:
        raise TomogramError(f"{uri}: does not say how coarse its level {level} is; leave out --archive.zarr-level")
    ratios = scale / finest
    if ratios.max() > 1.01 * ratios.min():
        times = " x ".join(f"{ratio:g}" for ratio in ratios)
        raise TomogramError(
            f"{uri}: the voxels of its level {level} are {times} times as long (z, y, x) as the finest, expected the "
            "same along each axis; choose another --archive.zarr-level"
        )
    return float(ratios.mean())


def _scale(image: Image, level: int, uri: str) -> np.ndarray | None:
    """Edges of a voxel along z, y, x in the image's own units; None where they are not said or make no sense."""
    scales = [
        np.asarray(step["scale"], dtype=float)[-3:]
        for part in (level_of(image, level, uri), image)
        for step in part.get("coordinateTransformations", [])
        if step.get("type") == "scale"
    ]
    scale = np.prod(scales, axis=0) if scales else np.zeros(3)
    sensible = scale.shape == (3,) and np.isfinite(scale).all() and (scale > 0).all()
    return scale if sensible else None
