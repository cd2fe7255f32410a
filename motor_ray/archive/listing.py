"""What lies in one folder, as a stream: a folder of a million objects is never held whole.

fsspec lists a folder as one list of dictionaries, about a kilobyte for each object. Here a folder on a local disk is
scanned, and one in S3 is listed page by page with s3fs's own requests, so that its credentials and retries apply.
"""

import os
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any, NamedTuple

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

PAGE = 1000
"""Objects that are asked for at a time, the most that S3 gives."""


class Entry(NamedTuple):
    """A file or a folder."""

    path: str
    name: str
    """The last part of the path."""

    is_folder: bool
    is_link: bool = False
    """A link to it; only local disks have them."""


def entries(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[Entry]:
    """Everything in `folder`, in no order; links are followed when asked what they are.

    Raises OSError, as the file system does, while it is iterated over.
    """
    if isinstance(files, LocalFileSystem):
        return _scanned(folder)
    if "s3" in files.protocol and files.split_path(folder)[0]:  # else it is the list of buckets
        return _described(_pages(files, folder), folder)
    listing = files.ls(folder, detail=True)
    files.invalidate_cache(folder)
    return _described(listing, folder)


def _scanned(folder: str) -> Iterator[Entry]:
    with os.scandir(folder) as listing:
        for entry in listing:
            yield Entry(entry.path, entry.name, entry.is_dir(), entry.is_symlink())


def _described(listing: Iterable[dict[str, Any]], folder: str) -> Iterator[Entry]:
    folder = folder.rstrip("/")
    for entry in listing:
        path = entry["name"].rstrip("/")
        if path != folder:  # S3 consoles make an empty object that stands for the folder
            yield Entry(path, path.rpartition("/")[2], entry["type"] == "directory")


def _pages(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[dict[str, Any]]:
    bucket, key, _ = files.split_path(folder)
    listing = files._iterdir(bucket, prefix=f"{key}/" if key else "")
    while page := sync(files.loop, _next_page, listing):
        yield from page


async def _next_page(listing: AsyncGenerator[dict[str, Any], None]) -> list[dict[str, Any]]:
    page = []
    async for entry in listing:
        page.append(entry)
        if len(page) == PAGE:
            break
    return page
