"""The ``s3://`` file system: s3fs with one way of trying again, in every process that it is sent to.

Endpoint, region and credentials come from the usual AWS variables, profiles or the machine's role.
"""

import asyncio
import io
import os
import re
from functools import partial
from typing import Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from motor_ray.errors import StorageError
from motor_ray.retry import TransientError, hidden, persist_async
from motor_ray.sources import BeyondEndError

CONNECTIONS = 64
"""Requests that are under way at the same time; others wait."""

SLOWEST_UPLOAD = 100_000
"""Bytes per second; an upload that takes longer is tried again."""

DELETED_TOGETHER = 1000
"""Objects that S3 deletes at one request's behest."""

TRANSIENT_CODES = frozenset(["SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"])
"""Some servers send them with the status 400, or for single keys of a request that as a whole went well."""

_NO_ANSWER = (
    HTTPClientError,
    ConnectionError,
    IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
)
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)


def may_recover(status: int, code: str) -> bool:
    """Whether a request that was refused with an HTTP status and an S3 error code may be granted another time."""
    return (status >= 500 and status != 501) or status in (408, 429) or code in TRANSIENT_CODES


def endpoint() -> str | None:
    """The URL of the S3 server, or None for Amazon's. Raises StorageError if it is none."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if url := os.environ.get(name):
            if not re.fullmatch(r"https?://([^\s/:@]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/\S*)?", url):
                raise StorageError(
                    f"{name}: is {hidden(url)}, expected a URL such as http://127.0.0.1:9000; correct it"
                )
            return url
    return None


def region() -> str | None:
    """The region that the environment names; a profile's is found by the clients."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


class S3Files(S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """Every request is tried up to `attempts` times and is given up for the time being after `timeout_seconds`.

    Raises OutageError when all attempts fail, and never takes a failed request for an empty answer. A body is read
    within the attempt that asked for it, so a broken one is asked for again; it is held in memory.
    """

    retries = 1  # rounds of s3fs, with pauses of their own, would multiply with ours

    def __init__(
        self, *, attempts: int, timeout_seconds: float, region_name: str | None = None, **options: Any
    ) -> None:
        self.attempts, self.timeout_seconds = attempts, timeout_seconds
        super().__init__(
            **options,
            client_kwargs={"region_name": region_name} if region_name else {},
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": timeout_seconds,
                "read_timeout": timeout_seconds,
                "max_pool_connections": CONNECTIONS,
            },
            max_concurrency=1,  # with more, s3fs asks for the size before it reads
            use_listings_cache=False,  # other processes write to the same folders
        )

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        place = [kwargs.get("Bucket"), kwargs.get("Key") or kwargs.get("Prefix")]
        uri = "s3://" + "/".join(part for part in place if part)
        return await persist_async(partial(self._request, method, *args, **kwargs), uri, self.attempts)

    call_s3 = sync_wrapper(_call_s3)

    async def _request(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            async with asyncio.timeout(self._upload_seconds(kwargs.get("Body"))):
                response = await super()._call_s3(method, *args, **kwargs)
            if method == "get_object":
                async with response["Body"] as body:
                    response["Body"] = _ReadBody(await body.read())
        except FileNotFoundError:
            if method == "complete_multipart_upload" and await self._is_complete(**kwargs):
                return {}
            raise
        except Exception as error:
            raise translated(error) from error
        if refused := isinstance(response, dict) and response.get("Errors"):
            raise _refusal(refused)
        return response

    def _upload_seconds(self, body: object) -> float | None:
        """A limit for sending `body`: aiohttp has none while the server does not say whether it wants it."""
        if not isinstance(body, bytes | bytearray | memoryview):
            return None
        return 2 * self.timeout_seconds + len(body) / SLOWEST_UPLOAD

    async def _is_complete(self, Bucket: str, Key: str, MultipartUpload: Any, **_: Any) -> bool:  # noqa: N803
        """Whether an upload is gone because an earlier attempt, whose answer was lost, has completed it."""
        response = await self._call_s3("head_object", Bucket=Bucket, Key=Key)
        return str(response["ETag"]).strip('"').endswith(f"-{len(MultipartUpload['Parts'])}")

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing: a folder needs no making, and a bucket that is not there is misspelt. s3fs would make it."""

    mkdir = sync_wrapper(_mkdir)

    async def _rm(self, path: str | list[str], recursive: bool = False, **_: Any) -> None:
        """Exactly `path`, whose brackets s3fs would take for wildcards.

        Folders go last: servers that keep them as folders of a disk leave those that are not empty.
        """
        keys = [path] if isinstance(path, str) else path
        if recursive:
            keys = [key for folder in keys for key in await self._find(folder, withdirs=True)]
            keys.sort(reverse=True)
        for start in range(0, len(keys), DELETED_TOGETHER):
            await self._bulk_delete(keys[start : start + DELETED_TOGETHER])

    async def _isfile(self, path: str) -> bool:
        try:
            return bool((await self._info(path))["type"] == "file")
        except FileNotFoundError:
            return False

    async def _walk(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        async for found in super()._walk(path, maxdepth=maxdepth, **{**kwargs, "on_error": _unless_missing}):
            yield found


class _ReadBody:
    """A body that has been read, where s3fs expects a stream."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    async def read(self, size: int = -1) -> bytes:
        return self._data.read(size)

    def close(self) -> None:
        """Nothing is open."""


def translated(error: Exception) -> Exception:
    """What s3fs or botocore raised, as an OSError: TransientError if another try may help."""
    response = getattr(error if isinstance(error, ClientError) else error.__cause__, "response", None)
    if response:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code, message = (response.get("Error", {}).get(name, "") for name in ("Code", "Message"))
        if may_recover(status, code):
            return TransientError(f"{status} {message}" if code == str(status) else f"{status} {code}: {message}")
        return BeyondEndError(message) if status == 416 else error
    if isinstance(error, _NO_ANSWER):
        return TransientError(": ".join(filter(None, (type(error).__name__, str(error)))))
    if isinstance(error, _NO_CREDENTIALS):
        return PermissionError(str(error))
    return OSError(str(error)) if isinstance(error, BotoCoreError) else error


def _refusal(refused: list[dict[str, str]]) -> OSError:
    """Keys that were not deleted although the request was answered."""
    first = refused[0]
    text = f"{first.get('Key')}: {first.get('Code')}: {first.get('Message')}"
    if any(one.get("Code") in TRANSIENT_CODES for one in refused):
        return TransientError(text)
    return PermissionError(text) if first.get("Code") == "AccessDenied" else OSError(text)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
