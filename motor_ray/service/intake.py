"""Bodies of requests, within limits that are checked before a byte is read."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from fastapi import Request

from motor_ray.archive.mrc import HEADER_BYTES, MrcHeader, parse_header
from motor_ray.config import ArchiveSettings
from motor_ray.errors import BusyError, TomogramError
from motor_ray.service.problems import ProblemError
from motor_ray.storage import writing

PIECE = 8 * 2**20
"""Bytes of an upload that are written together."""


class Room:
    """How many bytes of images this process holds, and may hold."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    @contextmanager
    def for_bytes(self, size: int) -> Iterator[None]:
        """Sets so many bytes aside; raises BusyError if there is no room now, ProblemError if there never is."""
        if size > self.most:
            raise ProblemError(413, f"The body has {size:,} bytes, expected at most {self.most:,}")
        if self.taken + size > self.most:
            raise BusyError(f"{self.taken:,} bytes of images are at work here, of {self.most:,} at most; try again")
        self.taken += size
        try:
            yield
        finally:
            self.taken -= size


def body_bytes(request: Request, most: int, what: str) -> int:
    """Bytes that the request says its body has. Raises ProblemError if it does not, or they are too many, or none."""
    said = request.headers.get("content-length")
    if said is None or not said.isdigit():
        raise ProblemError(411, f"A {what} comes with its Content-Length; curl sends it for --data-binary @FILE")
    if int(said) > most:
        raise ProblemError(413, f"The {what} has {int(said):,} bytes, expected at most {most:,}")
    if int(said) == 0:
        raise ProblemError(422, f"The body is empty, expected a {what}")
    return int(said)


async def read_body(request: Request, most: int) -> bytes:
    """The whole body. Raises ProblemError if it is longer than it said."""
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise ProblemError(413, f"The body goes on beyond the {most:,} bytes that it may have")
        pieces.append(piece)
    return b"".join(pieces)


async def receive_volume(
    request: Request, uri: str, size: int, settings: ArchiveSettings, spacing: float | None
) -> MrcHeader:
    """Write the body, an MRC file of `size` bytes, to `uri`, piece by piece; returns its header.

    Raises TomogramError as soon as the header shows that it is no tomogram that we read, or is cut short; then nothing
    is kept.
    """
    pieces = _pieces(request, size)
    first = await anext(pieces, b"")
    header = parse_header(first[:HEADER_BYTES], size, "The tomogram", spacing)
    _check_whole(header, size)
    with writing(uri, settings) as file:
        received = await asyncio.to_thread(file.write, first)
        async for piece in pieces:
            received += await asyncio.to_thread(file.write, piece)
        if received != size:
            raise TomogramError(f"The tomogram ended after {received:,} of {size:,} bytes; send it again")
    return header


def _check_whole(header: MrcHeader, size: int) -> None:
    needed = header.data_offset + header.shape[0] * header.slice_bytes
    if size < needed:
        z, y, x = header.shape
        raise TomogramError(
            f"The tomogram has {size:,} bytes, its header of {z} x {y} x {x} voxels (z, y, x) needs {needed:,}; it was "
            "cut short"
        )


async def _pieces(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body in pieces of PIECE bytes, the last one shorter."""
    buffer = bytearray()
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise ProblemError(413, f"The body goes on beyond the {most:,} bytes that it said")
        buffer += piece
        if len(buffer) >= PIECE:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
