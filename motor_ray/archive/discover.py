"""What tomograms lie under a URI: folders of images, MRC files, OME-Zarr groups.

Folders are listed a few at a time and the first bytes of one file per tomogram are read. Of a folder's listing nothing
is kept but the pattern of its names, however many slices there are. Links are followed.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from motor_ray.archive.jpeg_stack import IMAGE_SUFFIXES, escape_pattern, read_image_size, stack_pattern
from motor_ray.archive.mrc import read_header
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, MotorRayError, SliceCorruptError, StorageError
from motor_ray.storage import IO_ERRORS, filesystem, reason

MRC_SUFFIXES = (".mrc", ".rec", ".map")
COMPRESSED_SUFFIXES = tuple(suffix + packed for suffix in MRC_SUFFIXES for packed in (".gz", ".bz2"))
"""Looked at as well, so that they are refused and not overlooked."""

ZARR_SUFFIX = ".zarr"
ZARR_FILES = frozenset(["zarr.json", ".zgroup", ".zarray", ".zattrs"])

LISTING_THREADS = 16
"""Folders that are looked into at a time."""

SIZE_ATTEMPTS = 5
"""Images asked for a stack's size, should the first be damaged."""

Row = dict[str, Any]


@dataclass
class Found:
    """What one folder holds."""

    tomograms: list[Row] = field(default_factory=list)
    """Rows of MANIFEST."""

    failures: list[Row] = field(default_factory=list)
    """Rows of FAILURES: tomograms that cannot be used."""

    folders: list[str] = field(default_factory=list)
    """Paths of folders to look into next."""

    def add(self, tomo_id: str, uri: str, describe: Callable[[], Row]) -> None:
        """A tomogram whose remaining columns come from `describe`, or a failure if that raises."""
        try:
            self.tomograms.append({"tomo_id": tomo_id, "uri": uri, **describe()})
        except MotorRayError as error:
            self.failures.append({"tomo_id": tomo_id, "z": None, "uri": uri, "error": str(error)})


def discover(archive_uri: str, settings: ArchiveSettings) -> Iterator[Found]:
    """What each folder under `archive_uri` holds; one item if that is a single file.

    Raises ManifestError if there is nothing there, StorageError if a folder cannot be listed.
    """
    files, root = filesystem(archive_uri, anonymous=settings.anonymous)
    files.invalidate_cache()
    try:
        is_file = files.info(root)["type"] == "file"
    except FileNotFoundError:
        raise ManifestError(f"{archive_uri}: there is nothing here; check the path") from None
    except IO_ERRORS as error:
        raise StorageError(f"{archive_uri}: cannot be looked at ({reason(error)})") from None
    if is_file:
        yield _look_at_file(files, root, settings)
        return
    waiting, seen = [root], {_real(files, root)}
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        while waiting:
            # The latest first: a wide archive is not listed whole before its first tomogram is looked at.
            batch, waiting = waiting[-LISTING_THREADS:], waiting[:-LISTING_THREADS]
            for found in pool.map(partial(_look_into, files, settings=settings), batch):
                fresh = {_real(files, folder): folder for folder in found.folders}
                waiting += [folder for real, folder in fresh.items() if real not in seen]
                seen |= fresh.keys()
                yield found


def _real(files: fsspec.AbstractFileSystem, folder: str) -> str:
    """What `folder` is called without links, which may lead back to where one came from."""
    return os.path.realpath(folder) if isinstance(files, LocalFileSystem) else folder


def _look_into(files: fsspec.AbstractFileSystem, folder: str, settings: ArchiveSettings) -> Found:
    found = Found()
    images = []
    for path, is_folder in _entries(files, folder):
        name = _name(path)
        if name in ZARR_FILES:
            found = Found()
            _add_zarr(found, files, folder, settings)
            return found
        if name.startswith("."):
            continue  # what file managers leave behind, such as ._slice_0001.jpg
        if is_folder and name.endswith(ZARR_SUFFIX):
            _add_zarr(found, files, path, settings)
        elif is_folder:
            found.folders.append(path)
        elif name.lower().endswith(IMAGE_SUFFIXES):
            images.append(name)
        elif name.lower().endswith(MRC_SUFFIXES + COMPRESSED_SUFFIXES):
            _add_mrc(found, files, path, settings)
    if images:
        _add_stack(found, files, folder, images, settings)
    return found


def _look_at_file(files: fsspec.AbstractFileSystem, path: str, settings: ArchiveSettings) -> Found:
    """A file that the user named: one tomogram, whatever lies beside it. Raises ManifestError for another kind."""
    found = Found()
    name = _name(path)
    if name.lower().endswith(IMAGE_SUFFIXES):
        uri = _uri(files, path)
        describe = partial(_describe_stack, files, path, escape_pattern(uri), [0], settings)
        found.add(_stem(name), uri, describe)
    elif name.lower().endswith(MRC_SUFFIXES + COMPRESSED_SUFFIXES):
        _add_mrc(found, files, path, settings)
    else:
        known = ", ".join(MRC_SUFFIXES + IMAGE_SUFFIXES)
        raise ManifestError(f"{_uri(files, path)}: is not a tomogram, expected a folder or a {known} file; convert it")
    return found


def _add_mrc(found: Found, files: fsspec.AbstractFileSystem, path: str, settings: ArchiveSettings) -> None:
    uri = _uri(files, path)

    def describe() -> Row:
        header = read_header(uri, settings)
        return _columns("mrc", header.shape, header.voxel_spacing_angstrom)

    found.add(_stem(_name(path)), uri, describe)


def _add_zarr(found: Found, files: fsspec.AbstractFileSystem, path: str, settings: ArchiveSettings) -> None:
    uri = _uri(files, path)

    def describe() -> Row:
        from motor_ray.archive.ome_zarr import open_ome_zarr  # zarr takes long to import

        tomogram = open_ome_zarr(uri, settings)
        return _columns("ome_zarr", tomogram.shape, tomogram.voxel_spacing_angstrom)

    found.add(_name(path).removesuffix(ZARR_SUFFIX).removesuffix(".ome"), uri, describe)


def _add_stack(
    found: Found, files: fsspec.AbstractFileSystem, folder: str, images: list[str], settings: ArchiveSettings
) -> None:
    uri = _uri(files, folder)

    def describe() -> Row:
        pattern, zs = stack_pattern(images, uri)
        return _describe_stack(
            files, f"{escape_pattern(folder)}/{pattern}", f"{escape_pattern(uri)}/{pattern}", zs, settings
        )

    found.add(_name(folder), uri, describe)


def _describe_stack(
    files: fsspec.AbstractFileSystem, path_pattern: str, uri_pattern: str, zs: list[int], settings: ArchiveSettings
) -> Row:
    """The columns of a stack; `zs` are the slices that are there. A gap is a missing slice later, not an error now."""
    for z in zs[:SIZE_ATTEMPTS]:
        try:
            size = read_image_size(files, path_pattern.format(z=z), uri_pattern.format(z=z))
        except SliceCorruptError:
            if z == zs[:SIZE_ATTEMPTS][-1]:
                raise
        else:
            break
    return {"uri": uri_pattern, **_columns("jpeg_stack", (zs[-1] + 1, *size), settings.voxel_spacing_angstrom)}


def _columns(format: str, shape: tuple[int, int, int], voxel_spacing_angstrom: float | None) -> Row:
    size_z, size_y, size_x = shape
    sizes = {"size_z": size_z, "size_y": size_y, "size_x": size_x}
    return {"format": format, **sizes, "voxel_spacing_angstrom": voxel_spacing_angstrom}


def _entries(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[tuple[str, bool]]:
    """Path, and whether it is a folder, of everything in `folder`."""
    try:
        entries = files.ls(folder, detail=True)
    except IO_ERRORS as error:
        raise StorageError(f"{_uri(files, folder)}: cannot be listed ({reason(error)})") from None
    files.invalidate_cache(folder)  # s3fs would keep the listings of a million objects
    for entry in entries:
        path = entry["name"].rstrip("/")
        if path == folder.rstrip("/"):
            continue  # S3 consoles make an empty object that stands for the folder
        kind = entry["type"]
        yield path, kind == "directory" or (kind != "file" and files.isdir(path))


def _uri(files: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(files, LocalFileSystem) else str(files.unstrip_protocol(path))


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _stem(name: str) -> str:
    for suffix in (*COMPRESSED_SUFFIXES, *MRC_SUFFIXES, *IMAGE_SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
