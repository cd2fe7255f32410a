"""Reading whole files, or spans of them, from many threads at once."""

import threading
from abc import ABC, abstractmethod
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from motor_ray.errors import StorageError
from motor_ray.retry import failure


class Traffic(NamedTuple):
    """What was asked of files and storage, and what came."""

    requests: int
    bytes: int

    def since(self, before: "Traffic") -> "Traffic":
        """What came after `before`."""
        return Traffic(self.requests - before.requests, self.bytes - before.bytes)


_lock = threading.Lock()
_traffic = Traffic(0, 0)


def traffic() -> Traffic:
    """What this process has read through sources so far."""
    return _traffic


def _count(size: int) -> None:
    global _traffic
    with _lock:
        _traffic = Traffic(_traffic.requests + 1, _traffic.bytes + size)


class BeyondEndError(OSError):
    """A span that begins at or behind the end of its file. It is met within the sources only."""


class Source(ABC):
    """Something to read files from; threads may share it."""

    def read(self, uri: str, start: int | None = None, end: int | None = None) -> bytes | memoryview:
        """The bytes of the file `uri`, or those from `start` up to `end`, as far as the file has them; read-only.

        Raises FileNotFoundError if it is not there, OutageError if the storage does not answer, StorageError if it
        refuses.
        """
        try:
            data = self._fetch(uri, start, end)
        except BeyondEndError:
            return b""
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            raise failure(uri, "cannot be read", error) from None
        _count(len(data))
        return data

    @abstractmethod
    def _fetch(self, uri: str, start: int | None, end: int | None) -> bytes | memoryview:
        """`read`, but any OSError may be raised."""


class LocalSource(Source):
    """Files of this machine."""

    def _fetch(self, uri: str, start: int | None, end: int | None) -> bytes:
        with open(LocalFileSystem._strip_protocol(uri), "rb") as file:
            if start is None or end is None:
                return file.read()
            file.seek(start)
            return file.read(end - start)


class FilesSource(Source):
    """Files of any fsspec file system."""

    def __init__(self, files: fsspec.AbstractFileSystem) -> None:
        self._files = files

    def _fetch(self, uri: str, start: int | None, end: int | None) -> bytes:
        return bytes(self._files.cat_file(self._files._strip_protocol(uri), start=start, end=end))
