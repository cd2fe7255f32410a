"""Reading objects of a bucket with obstore, which takes a quarter of the CPU time that s3fs takes for it."""

import datetime
import re
import urllib.error
import urllib.request
from functools import partial
from typing import TYPE_CHECKING

import botocore.session
import obstore
from botocore.exceptions import BotoCoreError
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from motor_ray.retry import TransientError, persist
from motor_ray.s3 import endpoint, may_recover, region
from motor_ray.sources import BeyondEndError, Source

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential

CREDENTIALS_MINUTES = 5
"""How long credentials of a role are used before botocore is asked again, which renews them 10 minutes in advance."""

WHOLE_REQUEST = datetime.timedelta(hours=1)
"""obstore would break off a transfer after 30 seconds, however well it goes."""


LONGEST_REASON = 200
"""Characters. Some proxies answer with a whole page."""


class BucketSource(Source):
    """Objects of one bucket, over one pool of connections."""

    def __init__(self, bucket: str, *, attempts: int, timeout_seconds: float, anonymous: bool) -> None:
        """Raises StorageError for an endpoint, OSError for credentials, that make no sense."""
        self._prefix, self._attempts = f"s3://{bucket}/", attempts
        session = botocore.session.get_session()
        silence = datetime.timedelta(seconds=timeout_seconds)
        self._store = S3Store(
            bucket,
            config=_config(bucket, session, timeout_seconds),
            skip_signature=anonymous,
            client_options={
                "allow_http": True,
                "connect_timeout": silence,
                "read_timeout": silence,
                "timeout": WHOLE_REQUEST,
            },
            retry_config={"max_retries": 0},
            credential_provider=None if anonymous else Credentials(session),
        )

    def _fetch(self, uri: str, start: int | None, end: int | None) -> memoryview:
        return persist(partial(self._get, uri.removeprefix(self._prefix), start, end), uri, self._attempts)

    def _get(self, key: str, start: int | None, end: int | None) -> memoryview:
        try:
            if start is None or end is None:
                return memoryview(obstore.get(self._store, key).bytes())
            return memoryview(obstore.get_range(self._store, key, start=start, end=end))
        except FileNotFoundError:
            raise FileNotFoundError("there is no such object") from None
        except (BaseError, ValueError) as error:
            raise translated(error) from None


class Credentials:
    """What botocore finds: variables, a profile, the machine's role. obstore calls it when it has none or old ones."""

    def __init__(self, session: botocore.session.Session) -> None:
        try:
            self._credentials = session.get_credentials()
        except BotoCoreError as error:
            raise PermissionError(str(error)) from None
        if self._credentials is None:
            raise PermissionError("no credentials are found")

    def __call__(self) -> "S3Credential":
        """The credentials of now."""
        now = self._credentials.get_frozen_credentials()
        renewed = hasattr(self._credentials, "refresh_needed")
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=CREDENTIALS_MINUTES)
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": until if renewed else None,
        }


def translated(error: Exception) -> OSError:
    """What obstore raised, as an OSError: TransientError if another try may help."""
    head, _, details = str(error).partition("\n\nDebug source")
    answered = re.search(r"status(?: code)?:? (\d{3})\b", head)
    status = int(answered[1]) if answered else 0
    said = re.search(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)", head)
    code = said[1] if said else ""
    text = f"{status} {code}: {said[2]}" if said else _last_words(head, details)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return PermissionError(text)
    if status == 416:
        return BeyondEndError(text)
    if not isinstance(error, GenericError):
        return OSError(text)
    return TransientError(text) if not answered or may_recover(status, code) else OSError(text)


def _last_words(head: str, details: str) -> str:
    """What an answer without XML, or a connection that broke, says for itself; the cause stands innermost."""
    causes = re.findall(r'"([^"]+)"|\b((?:[A-Z][a-z]+){2,})\b', details)
    return "; ".join([head.rpartition(" - ")[2], *("".join(cause) for cause in causes[-1:])])[:LONGEST_REASON]


def _config(bucket: str, session: botocore.session.Session, timeout_seconds: float) -> "S3Config":
    """Where the bucket is. Servers that are not Amazon's mostly know it as the first part of the path only."""
    named = region() or session.get_config_variable("region") or "us-east-1"
    if url := endpoint():
        return {"endpoint": url, "region": named, "virtual_hosted_style_request": False}
    found = _bucket_region(bucket, timeout_seconds) or named
    return {"region": found, "virtual_hosted_style_request": "." not in bucket}


def _bucket_region(bucket: str, timeout_seconds: float) -> str | None:
    """The region of a bucket of Amazon's, which tells it to anybody; None if it does not."""
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as refused:
        headers = refused.headers
    except OSError:
        return None
    return str(headers["x-amz-bucket-region"]) if headers["x-amz-bucket-region"] else None
