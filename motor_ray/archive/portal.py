"""The layout of the CryoET Data Portal, and of copies of it.

    <dataset>/<run>/Reconstructions/VoxelSpacing<d.ddd>/Tomograms/<id>/<name>.mrc and .zarr

Beside these lie tilt series, movie frames, segmentation masks and pictures, many of them MRC or OME-Zarr as well. They
are no tomograms; it is told by the names of folders, which are the portal's own, and not by what files hold.
"""

import re
from collections import defaultdict
from typing import Any

OTHER_FOLDERS = frozenset(
    [
        "Alignments",
        "Annotations",
        "Frames",
        "Gains",
        "IdentifiedObjects",
        "Images",
        "KeyPhotos",
        "NeuroglancerPrecompute",
        "TiltSeries",
    ]
)
"""What the portal keeps beside tomograms. Elsewhere one called Images or Frames may well hold a tomogram's slices, so
these are passed over only where the layout shows."""

MARKS = frozenset(
    ["Reconstructions", "TiltSeries", "dataset_metadata.json", "deposition_metadata.json", "run_metadata.json"]
)
"""A folder that holds one of these is of this layout."""

_SPACING = re.compile(r"/VoxelSpacing([0-9]+(?:\.[0-9]+)?)(?=/)")
_PLACE = re.compile(r"(?:([^/]+)/)?([^/]+)/Reconstructions/VoxelSpacing([^/]+)/Tomograms/([^/]+)/[^/]+$")

DISAGREEMENT = 0.01
"""Relative difference at which two voxel spacings are no longer the same number, rounded."""


def is_inside(folder: str) -> bool:
    """Whether the path `folder` lies at or below one of the portal's voxel spacings."""
    return _SPACING.search(f"{folder}/") is not None


def likely_spacing(uri: str, stated: float | None, coarseness: float = 1.0) -> float | None:
    """The voxel spacing, in angstrom, of a tomogram that states `stated` itself.

    Where its folder names one, ``VoxelSpacing13.480``, and the two differ by more than 1 %, the folder's is taken: the
    portal's curators have checked it and its annotations rely on it, while headers often hold 0, 1 or the spacing
    before binning. Closer than that, the file's own has more digits. `coarseness` is the edge of the tomogram's
    voxels relative to the finest level's, of which the folder speaks.
    """
    named = _SPACING.findall(uri)
    spacing = float(named[-1]) * coarseness if named else 0.0
    if not spacing:
        return stated
    return spacing if stated is None or abs(stated - spacing) > DISAGREEMENT * spacing else stated


def name_apart(rows: list[dict[str, Any]]) -> None:
    """Lengthen, in place, each ``tomo_id`` that several tomograms of this layout share.

    Such a name gets those parts of its path in which the tomograms of this name differ, and no others, in the order
    dataset, run, name, voxel spacing, tomogram: ``10001-TS_1`` and ``10002-TS_1``, or ``TS_1-100`` and ``TS_1-101``.
    All that share a name are lengthened, so it does not matter which is found first; but one that is alone today has
    a longer name once the archive holds another.
    """
    alike = defaultdict(list)
    for row in rows:
        if place := _PLACE.search(row["uri"]):
            alike[row["tomo_id"]].append((row, place.groups()))
    for name, group in alike.items():
        differs = [len(set(values)) > 1 for values in zip(*(parts for _, parts in group), strict=True)]
        for row, parts in group:
            dataset, run, *below = (part if differ else None for part, differ in zip(parts, differs, strict=True))
            row["tomo_id"] = "-".join(part for part in (dataset, run, name, *below) if part)
