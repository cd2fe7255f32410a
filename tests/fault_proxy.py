"""A proxy between an S3 client and its server that fails a share of the requests, each in one of S3's own ways.

It runs in a process of its own. What it lets through it passes on byte for byte, so that signatures stay valid. The
faults are drawn from a seed, one request after the other.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

KINDS = ("error", "reset", "stall", "truncation")
COUNTS_PATH = "/.faults"
CHUNK = 1 << 18
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)

Headers = dict[bytes, bytes]


@dataclass(frozen=True)
class Faulty:
    """A proxy that is running."""

    endpoint: str

    def counts(self) -> Counter[str]:
        """How many requests it failed of each kind, and how many it passed on whole, as "passed"."""
        with urllib.request.urlopen(self.endpoint + COUNTS_PATH) as answer:
            return Counter(json.load(answer))


@contextmanager
def faulty(
    endpoint: str,
    seed: int,
    host: str = "127.0.0.1",
    /,
    *,
    errors: float = 0.0,
    resets: float = 0.0,
    stalls: float = 0.0,
    truncations: float = 0.0,
    stall_seconds: float = 60.0,
) -> Iterator[Faulty]:
    """A proxy before `endpoint` that listens at the address `host` and fails these shares of the requests.

    errors: 503 SlowDown; resets: RST before or within the answer; stalls: silence for `stall_seconds`; truncations:
    the answer ends half-way. Of an answer without a body, resets and truncations take all, after the server has acted.
    """
    arguments = [host, endpoint, seed, errors, resets, stalls, truncations, stall_seconds]
    command = [sys.executable, __file__, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            yield Faulty(f"http://{host}:{int(process.stdout.readline())}")
        finally:
            process.kill()


class Proxy:
    """Connections come in, each with one of its own to the server."""

    def __init__(self, endpoint: str, seed: int, shares: list[float], stall_seconds: float) -> None:
        server = urlsplit(endpoint)
        self.server = server.hostname, server.port
        self.random = random.Random(seed)
        self.shares, self.stall_seconds = [*shares, 1 - sum(shares)], stall_seconds
        self.counts: Counter[str] = Counter()

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """All requests of one client's connection. It ends when either side does, or with a fault."""
        to_server = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            server, to_server = await asyncio.open_connection(*self.server, limit=CHUNK)
            while await self.pass_on(Side(client, to_client), Side(server, to_server)):
                pass
        for writer in (to_client, to_server):
            if writer is not None:
                writer.close()

    async def pass_on(self, client: "Side", server: "Side") -> bool:
        """One request and its answer; whether the connection is good for another."""
        head = await client.reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        headers = headers_of(head)
        if target == COUNTS_PATH.encode():
            return await client.answer(b"200 OK", json.dumps(self.counts).encode())
        kind = self.random.choices([*KINDS, "passed"], self.shares)[0]
        early = self.random.random() < 0.5
        self.counts[kind] += 1
        if kind == "stall":
            await asyncio.sleep(self.stall_seconds)
            return client.reset()
        if kind == "reset" and early:
            return client.reset()
        if headers.get(b"expect", b"").lower() == b"100-continue":
            client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "error":
            await client.copy_body(headers, None)
            return await client.answer(b"503 Slow Down", b"" if method == b"HEAD" else SLOW_DOWN)
        server.writer.write(head)
        await client.copy_body(headers, server)
        return await self.answer(client, server, method, kind)

    async def answer(self, client: "Side", server: "Side", method: bytes, kind: str) -> bool:
        status = b"100"
        while status == b"100":
            head = await server.reader.readuntil(b"\r\n\r\n")
            status = head.split(b" ", 2)[1]
        headers = headers_of(head)
        bare = method == b"HEAD" or status in (b"204", b"304")
        size = 0 if bare else int(headers.get(b"content-length", -1))
        if kind != "passed":
            if size > 0:
                client.writer.write(head + await server.reader.readexactly(size // 2))
                await client.writer.drain()
            return client.reset() if kind == "reset" else False
        client.writer.write(head)
        if not bare:
            await server.copy_body(headers, client)
        await client.writer.drain()
        return b"close" not in headers.get(b"connection", b"").lower()


@dataclass
class Side:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, status: bytes, body: bytes) -> bool:
        self.writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await self.writer.drain()
        return True

    def reset(self) -> bool:
        """Hang up so that the other side gets RST, not FIN."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        return False

    async def copy_body(self, headers: Headers, other: "Side | None") -> None:
        """What follows a head, to `other`, or to nowhere."""
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            size = -1
            while size:
                line = await self.copy_line(other)
                size = int(line.split(b";")[0], 16)
                await self.copy(size, other)
                await self.copy_line(other)
        else:
            await self.copy(int(headers.get(b"content-length", 0)), other)

    async def copy(self, size: int, other: "Side | None") -> None:
        while size:
            data = await self.reader.read(min(size, CHUNK))
            if not data:
                raise asyncio.IncompleteReadError(b"", size)
            size -= len(data)
            if other:
                other.writer.write(data)
                await other.writer.drain()

    async def copy_line(self, other: "Side | None") -> bytes:
        line = await self.reader.readuntil(b"\r\n")
        if other:
            other.writer.write(line)
        return line


def headers_of(head: bytes) -> Headers:
    """Names in lower case."""
    lines = (line.split(b":", 1) for line in head.split(b"\r\n")[1:] if line)
    return {name.lower(): value.strip() for name, value in lines}


async def main(host: str, endpoint: str, seed: str, *numbers: str) -> None:
    *shares, stall_seconds = map(float, numbers)
    proxy = Proxy(endpoint, int(seed), shares, stall_seconds)
    server = await asyncio.start_server(proxy.serve, host, 0, limit=CHUNK, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def end_with_the_parent() -> None:
    """Its end of this process's input closes with it, however it ends."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    asyncio.run(main(*sys.argv[1:]))
