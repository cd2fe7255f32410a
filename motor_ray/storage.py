"""Files and folders by URI, on this machine or in object storage; knows nothing of what they hold.

The endpoint and the credentials of ``s3://`` come from the usual AWS environment variables. Requests to it are tried
again as `settings` say; the clients are shared by all threads of a process.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from motor_ray.config import ArchiveSettings
from motor_ray.errors import StorageError
from motor_ray.retry import failure as failure
from motor_ray.retry import reason as reason
from motor_ray.retry import retries as retries
from motor_ray.sources import FilesSource, LocalSource
from motor_ray.sources import Source as Source
from motor_ray.sources import Traffic as Traffic
from motor_ray.sources import traffic as traffic

DEFAULTS = ArchiveSettings()

_BUCKET = re.compile(r"[A-Za-z0-9._-]+")


def filesystem(uri: str, settings: ArchiveSettings = DEFAULTS) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` on it. Raises StorageError for an unknown scheme.

    All that its methods raise is an OSError; hand it to `failure`.
    """
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        raise StorageError(f"{uri}: {scheme}:// is not read; give a local path or an s3:// URI")
    try:
        files = _s3_files(_key(settings)) if scheme in ("s3", "s3a") else fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{uri}: cannot open {scheme}:// ({error}); give a local path or an s3:// URI") from None
    return files, files._strip_protocol(uri).rstrip("/") or "/"


def open_source(uri: str, settings: ArchiveSettings = DEFAULTS) -> Source:
    """What reads the file `uri`, and all others of the same bucket. Costs no request but the first time.

    Raises StorageError for an unknown scheme, or if there are no credentials.
    """
    scheme = _scheme(uri)
    if scheme == "file":
        return LocalSource()
    if scheme == "s3" and _has_obstore():
        bucket, *parts = uri.removeprefix("s3://").rstrip("/").split("/")
        # What is no bucket, and such keys, obstore does not understand.
        if _BUCKET.fullmatch(bucket) and parts and not {"", ".", ".."}.intersection(parts):
            try:
                return _bucket_source(bucket, _key(settings))
            except OSError as error:
                raise failure(uri, "cannot be read", error) from None
    return FilesSource(filesystem(uri, settings)[0])


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it: ``join("s3://b/a/", "c.json")`` is ``"s3://b/a/c.json"``."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """`uri` as any process of the cluster understands it: a relative path is relative only to this one."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def exists(uri: str, settings: ArchiveSettings = DEFAULTS) -> bool:
    """Whether there is a file or folder at `uri`. Raises StorageError if that cannot be told."""
    files, path = filesystem(uri, settings)
    try:
        files.info(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise failure(uri, "cannot be looked at", error) from None
    return True


def remove(uri: str, settings: ArchiveSettings = DEFAULTS) -> None:
    """Remove the file or folder `uri`, if it is there. Raises StorageError if that fails."""
    if not exists(uri, settings):
        return
    files, path = filesystem(uri, settings)
    try:
        files.rm(path, recursive=True)
    except OSError as error:
        raise failure(uri, "cannot be removed", error) from None


def list_names(uri: str, settings: ArchiveSettings = DEFAULTS) -> list[str]:
    """Names of the files in the folder `uri`; none if there is no such folder. Raises StorageError if that fails."""
    return _list(uri, "file", settings)


def list_folders(uri: str, settings: ArchiveSettings = DEFAULTS) -> list[str]:
    """Names of the folders in the folder `uri`, sorted; none if there is no such folder.

    Raises StorageError if that fails.
    """
    return sorted(_list(uri, "directory", settings))


def _list(uri: str, kind: str, settings: ArchiveSettings) -> list[str]:
    files, path = filesystem(uri, settings)
    files.invalidate_cache(path)
    try:
        entries = files.ls(path, detail=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise failure(uri, "cannot be listed", error) from None
    return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == kind]


def read_bytes(uri: str, settings: ArchiveSettings = DEFAULTS) -> bytes:
    """All bytes of the file `uri`. Raises StorageError if it cannot be read."""
    try:
        return bytes(open_source(uri, settings).read(uri))
    except FileNotFoundError as error:
        raise failure(uri, "cannot be read", error) from None


def write_bytes(uri: str, data: bytes, settings: ArchiveSettings = DEFAULTS) -> None:
    """Write the file `uri` so that a reader sees either all of `data` or what was there before.

    Raises StorageError if it cannot be written, and OutageError if an object store may or may not have got it all.
    """
    files, path = filesystem(uri, settings)
    # An object store publishes an object whole; on disk a rename does the same. Others may be writing the same file.
    partial = f"{path}.{secrets.token_hex(4)}.partial" if isinstance(files, LocalFileSystem) else None
    try:
        files.makedirs(files._parent(path), exist_ok=True)
        files.pipe_file(partial or path, data)
        if partial:
            os.replace(partial, path)
    except OSError as error:
        if partial:
            with suppress(OSError):
                os.unlink(partial)
        raise failure(uri, "cannot be written", error) from None


@contextmanager
def writing(uri: str, settings: ArchiveSettings = DEFAULTS) -> Iterator[BinaryIO]:
    """A file to be written in pieces, of any size, to `uri`: there when the block ends, not at all if it raises.

    Raises StorageError if it cannot be written.
    """
    files, path = filesystem(uri, settings)
    partial = f"{path}.partial" if isinstance(files, LocalFileSystem) else None
    try:
        files.makedirs(files._parent(path), exist_ok=True)
        file = files.open(partial or path, "wb")
        try:
            yield file
        except BaseException:
            _give_up(file, partial)
            raise
        file.close()
        if partial:
            os.replace(partial, path)
    except StorageError:
        raise
    except OSError as error:
        raise failure(uri, "cannot be written", error) from None


def _give_up(file: Any, partial: str | None) -> None:
    if partial:
        file.close()
        os.unlink(partial)
    else:
        file.discard()  # else what was sent so far would become an object when it is closed
        file.closed = True


def read_json(uri: str, settings: ArchiveSettings = DEFAULTS) -> Any:
    """The JSON value in the file `uri`. Raises StorageError if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(uri, settings))
    except ValueError as error:
        raise StorageError(f"{uri}: is not JSON ({error})") from None


def write_json(uri: str, value: Any, settings: ArchiveSettings = DEFAULTS) -> None:
    """Write `value` as indented JSON to the file `uri`."""
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode(), settings)


def arrow_filesystem(uri: str, settings: ArchiveSettings = DEFAULTS) -> tuple[pyarrow.fs.FileSystem, str]:
    """`uri` as pyarrow and Ray want it: a pyarrow file system, and a path on it.

    It may be sent to other processes, which find the credentials in their own environment.
    """
    files, path = filesystem(uri, settings)
    if isinstance(files, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path


def write_table(table: pa.Table, uri: str, settings: ArchiveSettings = DEFAULTS) -> None:
    """Write a small table to the parquet file `uri`, whole or not at all."""
    data = pa.BufferOutputStream()
    pq.write_table(table, data)
    write_bytes(uri, data.getvalue().to_pybytes(), settings)


def read_table(uri: str, columns: Sequence[str] | None = None, settings: ArchiveSettings = DEFAULTS) -> pa.Table:
    """The table, or some `columns` of it, in the parquet file, or the folder of parquet files, `uri`.

    Raises StorageError if there is none.
    """
    files, path = arrow_filesystem(uri, settings)
    try:
        return pq.read_table(path, columns=columns, filesystem=files)
    except OSError as error:
        raise failure(uri, "cannot be read", error) from None
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri}: is not parquet ({error})") from None


def open_dataset(uri: str, schema: pa.Schema) -> pyarrow.dataset.Dataset:
    """The parquet file, or the folder of parquet files, `uri`, with the columns of `schema`, to be read in parts."""
    files, path = arrow_filesystem(uri)
    return pyarrow.dataset.dataset(path, schema=schema, filesystem=files, format="parquet")


def _scheme(uri: str) -> str:
    return uri.split("://", 1)[0] if "://" in uri else "file"


def _has_obstore() -> bool:
    """Whether it is there, and new enough for a limit on silence."""
    try:
        import obstore
    except ImportError:
        return False
    return tuple(map(int, obstore.__version__.split(".")[:2])) >= (0, 11)


@dataclass(frozen=True)
class _Key:
    """What makes a client another one."""

    attempts: int
    timeout_seconds: float
    anonymous: bool
    process: int
    """After a fork the old client's threads and connections are not ours."""
    environment: tuple[tuple[str, str], ...] = field(repr=False)


def _key(settings: ArchiveSettings) -> _Key:
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _Key(settings.attempts, settings.timeout_seconds, settings.anonymous, os.getpid(), environment)


@lru_cache(maxsize=8)
def _s3_files(key: _Key) -> fsspec.AbstractFileSystem:
    from motor_ray.s3 import S3Files, endpoint, region  # s3fs takes long to import

    return S3Files(
        attempts=key.attempts,
        timeout_seconds=key.timeout_seconds,
        anon=key.anonymous,
        endpoint_url=endpoint(),
        region_name=region(),
        skip_instance_cache=True,  # fsspec's own cache does not know the environment
    )


@lru_cache(maxsize=8)
def _bucket_source(bucket: str, key: _Key) -> Source:
    from motor_ray.buckets import BucketSource

    return BucketSource(bucket, attempts=key.attempts, timeout_seconds=key.timeout_seconds, anonymous=key.anonymous)
