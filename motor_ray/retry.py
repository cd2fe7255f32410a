"""Asking again: what fails for a moment is tried several times, with growing random pauses between the tries.

Knows no storage: a request says with TransientError that another try may go better.
"""

import errno
import os
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from motor_ray.errors import OutageError, StorageError

Answer = TypeVar("Answer")

PAUSE = wait_random_exponential(multiplier=0.5, max=20)
"""Seconds: up to 0.5 before the second try, up to twice as long before each further one, never above 20."""

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_CREDENTIALS = (
    *("ExpiredToken", "expired", "InvalidAccessKeyId", "does not exist in our records", "InvalidToken"),
    *("RequestTimeTooSkewed", "SignatureDoesNotMatch", "signature we calculated", "redentials"),
)
"""What S3 servers and clients say of credentials as such, not of what they may do with one object."""

_DISK_GONE = frozenset([errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE])

_lock = threading.Lock()
_count = 0


class TransientError(OSError):
    """No answer, or the answer that there is none at the moment. It is met within this module and the clients only."""


def retries() -> int:
    """How many requests this process has sent again so far."""
    return _count


def persist(request: Callable[[], Answer], uri: str, attempts: int) -> Answer:
    """What `request` returns, called up to `attempts` times while it raises TransientError.

    Raises OutageError, naming `uri`, if none of the attempts is answered; any other error of `request` at once.
    """
    try:
        return Retrying(**_policy(attempts))(request)
    except RetryError as error:
        raise _outage(uri, error) from None


async def persist_async(request: Callable[[], Awaitable[Answer]], uri: str, attempts: int) -> Answer:
    """`persist` for a coroutine."""
    try:
        return await AsyncRetrying(**_policy(attempts))(request)
    except RetryError as error:
        raise _outage(uri, error) from None


def failure(uri: str, what: str, error: Exception) -> StorageError:
    """The error to raise for `uri`, of which ``what`` (such as "cannot be read") is true because of `error`.

    A StorageError says all that already, and an outage stays one: it says nothing about `uri`. Nor do credentials
    that are missing or have run out, or a disk that is gone: these are outages, too.
    """
    if isinstance(error, StorageError):
        return error
    hint = ""
    if isinstance(error, PermissionError) and uri.startswith("s3://"):
        hint = (
            "; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the profile, and what they may do there; public "
            "archives are read with --archive.anonymous"
        )
    kind = OutageError if _is_everywhere(error) else StorageError
    return kind(f"{uri}: {what} ({reason(error)}){hint}")


def _is_everywhere(error: Exception) -> bool:
    """Whether other files would fail for the same reason."""
    if isinstance(error, PermissionError) and error.errno is None:
        return any(sign in str(error) for sign in _CREDENTIALS)
    return isinstance(error, OSError) and error.errno in _DISK_GONE


def reason(error: BaseException) -> str:
    """What went wrong: without the path, which the caller names anyway, and without secrets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return hidden(" ".join(text.split()))


def hidden(text: str) -> str:
    """`text` without the secrets that may be in it."""
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def _policy(attempts: int) -> dict[str, Any]:
    return {
        "stop": stop_after_attempt(attempts),
        "wait": PAUSE,
        "retry": retry_if_exception_type(TransientError),
        "before_sleep": _note_retry,
    }


def _note_retry(_: RetryCallState) -> None:
    global _count
    with _lock:
        _count += 1


def _outage(uri: str, error: RetryError) -> OutageError:
    last = error.last_attempt
    tries = f"{last.attempt_number} attempt{'s' if last.attempt_number > 1 else ''}"
    why = reason(last.exception() or error)
    return OutageError(
        f"{uri}: the storage did not answer in {tries} (the last: {why}); run the same command again when it does"
    )
