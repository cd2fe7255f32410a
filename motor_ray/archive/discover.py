"""What tomograms lie under a URI: folders of images, MRC files, OME-Zarr groups.

Folders are listed a few at a time, and of their tomograms the first bytes of one file each are read, a few at a time as
well. Of a folder's listing nothing is kept but its folders, the names of its volumes, and the names of its images up to
as many as a tomogram can have slices. Links are followed.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from motor_ray.archive import portal
from motor_ray.archive.candidates import (
    ZARR_FILES,
    Candidate,
    Kind,
    Row,
    file_candidate,
    kind_of,
    once_each,
    stack_candidate,
    uri_of,
    volume_candidate,
)
from motor_ray.archive.jpeg_stack import MAX_SLICES
from motor_ray.archive.listing import Entry, entries
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError, MotorRayError, OutageError
from motor_ray.storage import failure, filesystem

THREADS = 16
"""Folders that are listed at a time, and tomograms that are looked at."""

PIECE = 256
"""Tomograms that are handed on together."""


@dataclass
class Found:
    """A part of what an archive holds."""

    tomograms: list[Row] = field(default_factory=list)
    """Rows of MANIFEST."""

    failures: list[Row] = field(default_factory=list)
    """Rows of FAILURES: tomograms that cannot be used."""

    folders: int = 0
    """Folders that were looked into."""

    passed_over: int = 0
    """Folders that hold no tomograms by the layout of the CryoET Data Portal, and were not looked into."""


class Listing(NamedTuple):
    """What lies in one folder."""

    candidates: Iterable[Candidate]
    folders: list[Entry]
    passed_over: int = 0


def discover(archive_uri: str, settings: ArchiveSettings) -> Iterator[Found]:
    """What lies under `archive_uri`, a folder or a single file, a few tomograms at a time.

    Raises ManifestError if there is nothing there, StorageError if a folder cannot be listed, and OutageError if the
    storage does not answer.
    """
    files, root = filesystem(archive_uri, settings)
    files.invalidate_cache()
    try:
        is_file = files.info(root)["type"] == "file"
    except FileNotFoundError:
        raise ManifestError(f"{archive_uri}: there is nothing here; check the path") from None
    except OSError as error:
        raise failure(archive_uri, "cannot be looked at", error) from None
    with ThreadPoolExecutor(THREADS) as pool:
        if is_file:
            yield _describe([file_candidate(files, root, settings)], pool)
        else:
            yield from _walk(files, root, settings, pool)


def _walk(
    files: fsspec.AbstractFileSystem, root: str, settings: ArchiveSettings, pool: ThreadPoolExecutor
) -> Iterator[Found]:
    waiting = [root]
    leads_on = _LinkFollower(root) if isinstance(files, LocalFileSystem) else None
    while waiting:
        # The latest first: a wide archive is not listed whole before its first tomogram is looked at.
        batch = waiting[-THREADS:]
        del waiting[-THREADS:]
        listings = list(pool.map(partial(_list_folder, files, settings=settings), batch))
        yield Found(folders=len(batch), passed_over=sum(listing.passed_over for listing in listings))
        for listing in listings:
            waiting += [entry.path for entry in listing.folders if leads_on is None or leads_on(entry)]
        candidates = chain.from_iterable(listing.candidates for listing in listings)
        while piece := list(islice(candidates, PIECE)):
            yield _describe(piece, pool)


class _LinkFollower:
    """Tells which folders of a local disk to look into, so that links lead neither in circles nor anywhere twice.

    It remembers where links led, not where it has been: what is no link is come by only once, except from above
    through a link.
    """

    def __init__(self, root: str) -> None:
        self._entered = {os.path.realpath(root)}

    def __call__(self, folder: Entry) -> bool:
        real = PurePosixPath(os.path.realpath(folder.path))
        if not folder.is_link:
            return str(real) not in self._entered
        for place in (real, *real.parents):
            # What is hidden is reached by a link alone.
            if str(place) in self._entered and not any(part.startswith(".") for part in real.relative_to(place).parts):
                return False
        self._entered.add(str(real))
        return True


def _describe(candidates: Sequence[Candidate], pool: ThreadPoolExecutor) -> Found:
    found = Found()
    for candidate, outcome in zip(candidates, pool.map(_outcome, candidates), strict=True):
        names = {"tomo_id": candidate.tomo_id, "uri": candidate.uri}
        if isinstance(outcome, MotorRayError):
            found.failures.append({**names, "z": None, "error": str(outcome)})
        else:
            found.tomograms.append({**names, **outcome})
    return found


def _outcome(candidate: Candidate) -> Row | MotorRayError:
    try:
        return candidate.describe()
    except OutageError:
        raise
    except MotorRayError as error:
        return error


def _list_folder(files: fsspec.AbstractFileSystem, folder: str, settings: ArchiveSettings) -> Listing:
    images: list[str] = []
    volumes: list[tuple[Kind, str]] = []
    folders: list[Entry] = []
    of_portal = portal.is_inside(folder)
    try:
        for entry in entries(files, folder):
            if entry.name in ZARR_FILES:
                return Listing([volume_candidate(files, "ome_zarr", folder, settings)], [])
            of_portal = of_portal or entry.name in portal.MARKS
            kind = kind_of(entry)
            if kind == "folder":
                folders.append(entry)
            elif kind == "image":
                if len(images) <= MAX_SLICES:  # one more says that they are too many
                    images.append(entry.name)
            elif kind:
                volumes.append((kind, entry.path))
    except OSError as error:
        raise failure(uri_of(files, folder), "cannot be listed", error) from None
    wanted = [entry for entry in folders if not (of_portal and entry.name in portal.OTHER_FOLDERS)]
    stack = [stack_candidate(files, folder, images, settings)] if images else []
    candidates = (volume_candidate(files, *volume, settings) for volume in once_each(volumes, settings))
    return Listing(chain(stack, candidates), sorted(wanted), len(folders) - len(wanted))
