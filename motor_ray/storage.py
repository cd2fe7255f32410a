"""Files and folders by URI, on this machine or in object storage; knows nothing of what they hold.

The endpoint and the credentials of ``s3://`` come from the usual AWS environment variables.
"""

import json
import os
from typing import Any

import botocore.exceptions
import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from motor_ray.errors import StorageError

IO_ERRORS = (OSError, botocore.exceptions.BotoCoreError)
"""What reading or writing may raise: not all that S3 clients raise is an OSError."""


def filesystem(uri: str, *, anonymous: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` on it. Raises StorageError for an unknown scheme."""
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    options: dict[str, Any] = {}
    if scheme == "s3":
        options = {"anon": anonymous, "endpoint_url": os.environ.get("AWS_ENDPOINT_URL")}
    try:
        files = fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{uri}: cannot open {scheme}:// ({error}); give a local path or an s3:// URI") from None
    return files, files._strip_protocol(uri).rstrip("/") or "/"


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it: ``join("s3://b/a/", "c.json")`` is ``"s3://b/a/c.json"``."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """`uri` as any process of the cluster understands it: a relative path is relative only to this one."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`. Raises StorageError if that cannot be told."""
    files, path = filesystem(uri)
    try:
        files.info(path)
    except FileNotFoundError:
        return False
    except IO_ERRORS as error:
        raise StorageError(f"{uri}: cannot be looked at ({reason(error)})") from None
    return True


def remove(uri: str) -> None:
    """Remove the file or folder `uri`, if it is there. Raises StorageError if that fails."""
    if not exists(uri):
        return
    files, path = filesystem(uri)
    try:
        files.rm(path, recursive=True)
    except IO_ERRORS as error:
        raise StorageError(f"{uri}: cannot be removed ({reason(error)})") from None


def read_bytes(uri: str, *, anonymous: bool = False) -> bytes:
    """All bytes of the file `uri`. Raises StorageError if it cannot be read."""
    files, path = filesystem(uri, anonymous=anonymous)
    try:
        return bytes(files.cat_file(path))
    except IO_ERRORS as error:
        raise StorageError(f"{uri}: cannot be read ({reason(error)})") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file `uri` so that a reader sees either all of `data` or what was there before."""
    files, path = filesystem(uri)
    local = isinstance(files, LocalFileSystem)
    try:
        files.makedirs(files._parent(path), exist_ok=True)
        # An object store publishes an object whole; on disk a rename does the same.
        files.pipe_file(f"{path}.partial" if local else path, data)
        if local:
            os.replace(f"{path}.partial", path)
    except IO_ERRORS as error:
        raise StorageError(f"{uri}: cannot be written ({reason(error)})") from None


def read_json(uri: str) -> Any:
    """The JSON value in the file `uri`. Raises StorageError if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: is not JSON ({error})") from None


def write_json(uri: str, value: Any) -> None:
    """Write `value` as indented JSON to the file `uri`."""
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """`uri` as pyarrow and Ray want it: a pyarrow file system, and a path on it."""
    files, path = filesystem(uri)
    if isinstance(files, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path


def write_table(table: pa.Table, uri: str) -> None:
    """Write a small table to the parquet file `uri`, whole or not at all."""
    data = pa.BufferOutputStream()
    pq.write_table(table, data)
    write_bytes(uri, data.getvalue().to_pybytes())


def read_table(uri: str) -> pa.Table:
    """The table in the parquet file, or the folder of parquet files, `uri`. Raises StorageError if there is none."""
    files, path = arrow_filesystem(uri)
    try:
        return pq.read_table(path, filesystem=files)
    except IO_ERRORS as error:
        raise StorageError(f"{uri}: cannot be read ({reason(error)})") from None
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri}: is not parquet ({error})") from None


def reason(error: Exception) -> str:
    """What went wrong, without the path that the caller names anyway."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
