"""What is a tomogram by its name, and what its first bytes say.

``name.mrc`` and ``name.zarr`` side by side are one tomogram, stored twice, as the CryoET Data Portal does. The MRC file
is taken: of it a slice costs a slice, of the other a whole layer of chunks. Only where `zarr_level` asks for coarser
voxels is the OME-Zarr taken, since an MRC file has none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from motor_ray.archive import portal
from motor_ray.archive.jpeg_stack import IMAGE_SUFFIXES, MAX_SLICES, escape_pattern, read_image_size, stack_pattern
from motor_ray.archive.listing import Entry
from motor_ray.archive.mrc import read_header
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, SliceCorruptError
from motor_ray.storage import open_source

MRC_SUFFIXES = (".mrc", ".rec", ".map")
PACKED_SUFFIXES = tuple(suffix + packed for suffix in MRC_SUFFIXES for packed in (".gz", ".bz2"))
"""Looked at as well, so that they are refused and not overlooked."""

ZARR_SUFFIX = ".zarr"
ZARR_FILES = frozenset(["zarr.json", ".zgroup", ".zarray", ".zattrs"])

SIZE_ATTEMPTS = 5
"""Images asked for a stack's size, should the first be damaged."""

Row = dict[str, Any]
Kind = Literal["folder", "image", "mrc", "ome_zarr", "packed"]

_SUFFIXES: dict[Kind, tuple[str, ...]] = {"image": IMAGE_SUFFIXES, "mrc": MRC_SUFFIXES, "packed": PACKED_SUFFIXES}


class Candidate(NamedTuple):
    """What seems to be a tomogram, by its name."""

    tomo_id: str
    uri: str
    describe: Callable[[], Row]
    """The remaining columns of MANIFEST, and `uri` again if it has to be another; may raise a MotorRayError."""


def kind_of(entry: Entry) -> Kind | None:
    """What `entry` seems to be; None for what has nothing to do with tomograms. A compressed MRC file is 'packed'."""
    name = entry.name.lower()
    if name.startswith("."):
        return None  # what file managers leave behind, such as ._slice_0001.jpg
    if entry.is_folder:
        return "ome_zarr" if name.endswith(ZARR_SUFFIX) else "folder"
    return next((kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)


def once_each(volumes: list[tuple[Kind, str]], settings: ArchiveSettings) -> list[tuple[Kind, str]]:
    """`volumes`, all of one folder, without those that lie there in a better format, see the top of this file."""
    order: list[Kind] = ["ome_zarr", "mrc", "packed"] if settings.zarr_level else ["mrc", "ome_zarr", "packed"]
    best: dict[str, int] = {}
    for kind, path in volumes:
        best[_stem(path)] = min(order.index(kind), best.get(_stem(path), len(order)))
    return [(kind, path) for kind, path in sorted(volumes) if order.index(kind) == best[_stem(path)]]


def file_candidate(files: fsspec.AbstractFileSystem, path: str, settings: ArchiveSettings) -> Candidate:
    """A file that the user named: one tomogram, whatever lies beside it. Raises ManifestError for another kind."""
    uri = uri_of(files, path)
    kind = kind_of(Entry(path, _name(path), is_folder=False))
    if kind is None:
        known = ", ".join(MRC_SUFFIXES + IMAGE_SUFFIXES)
        raise ManifestError(f"{uri}: is not a tomogram, expected a folder or a {known} file; convert it")
    if kind != "image":
        return volume_candidate(files, kind, path, settings)
    return Candidate(_stem(path), uri, partial(_describe_stack, escape_pattern(uri), [0], 1, settings))


def volume_candidate(files: fsspec.AbstractFileSystem, kind: Kind, path: str, settings: ArchiveSettings) -> Candidate:
    """The MRC file or OME-Zarr group at `path`."""
    uri = uri_of(files, path)
    describe = _describe_zarr if kind == "ome_zarr" else _describe_mrc
    return Candidate(_stem(path), uri, partial(describe, uri, settings))


def stack_candidate(
    files: fsspec.AbstractFileSystem, folder: str, images: list[str], settings: ArchiveSettings
) -> Candidate:
    """The stack of the files `images` in `folder`, of which more than MAX_SLICES are too many."""
    uri = uri_of(files, folder)
    try:
        pattern, zs = _pattern(images, uri)
    except ManifestError as error:
        return Candidate(_name(folder), uri, partial(_raise, error))
    pattern = f"{escape_pattern(uri)}/{pattern}"
    first, size_z = zs[:SIZE_ATTEMPTS], zs[-1] + 1
    return Candidate(_name(folder), uri, partial(_describe_stack, pattern, first, size_z, settings))


def _pattern(images: list[str], folder: str) -> tuple[str, list[int]]:
    if len(images) > MAX_SLICES:
        raise ManifestError(
            f"{folder}: holds more than {MAX_SLICES} images, expected the slices of one tomogram; "
            "give each tomogram a folder of its own"
        )
    return stack_pattern(images, folder)


def _raise(error: ManifestError) -> Row:
    raise error


def _describe_mrc(uri: str, settings: ArchiveSettings) -> Row:
    header = read_header(uri, settings)
    return _columns("mrc", header.shape, _spacing(uri, header.voxel_spacing_angstrom, settings))


def _describe_zarr(uri: str, settings: ArchiveSettings) -> Row:
    from motor_ray.archive.ome_zarr import open_ome_zarr  # zarr takes long to import

    tomogram = open_ome_zarr(uri, settings)
    spacing = _spacing(uri, tomogram.voxel_spacing_angstrom, settings, tomogram.coarseness)
    return _columns("ome_zarr", tomogram.shape, spacing, tomogram.chunk_depth)


def _describe_stack(uri_pattern: str, zs: list[int], size_z: int, settings: ArchiveSettings) -> Row:
    """The columns of a stack; `zs` are its first slices. A gap is a missing slice later, not an error now."""
    source = open_source(uri_pattern, settings)
    for z in zs:
        try:
            size = read_image_size(source, uri_pattern.format(z=z))
        except SliceCorruptError:
            if z == zs[-1]:
                raise
        else:
            break
    spacing = _spacing(uri_pattern, settings.voxel_spacing_angstrom, settings)
    return {"uri": uri_pattern, **_columns("jpeg_stack", (size_z, *size), spacing)}


def _spacing(uri: str, own: float | None, settings: ArchiveSettings, coarseness: float = 1.0) -> float | None:
    return own if settings.voxel_spacing_angstrom else portal.likely_spacing(uri, own, coarseness)


def _columns(
    format: str, shape: tuple[int, int, int], voxel_spacing_angstrom: float | None, chunk_depth: int | None = None
) -> Row:
    size_z, size_y, size_x = shape
    return {
        "format": format,
        "size_z": size_z,
        "size_y": size_y,
        "size_x": size_x,
        "voxel_spacing_angstrom": voxel_spacing_angstrom,
        "chunk_depth": chunk_depth,
    }


def uri_of(files: fsspec.AbstractFileSystem, path: str) -> str:
    """What users call the `path` on `files`."""
    return path if isinstance(files, LocalFileSystem) else str(files.unstrip_protocol(path))


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _stem(path: str) -> str:
    """The name of a file, or of an OME-Zarr's folder, without what tells its format."""
    name = _name(path)
    for suffix in (*PACKED_SUFFIXES, *MRC_SUFFIXES, *IMAGE_SUFFIXES, f".ome{ZARR_SUFFIX}", ZARR_SUFFIX):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
