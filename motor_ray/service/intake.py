"""Bodies of requests, within limits that are checked before a byte is read."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Message

from motor_ray.archive.mrc import HEADER_BYTES, MrcHeader, parse_header
from motor_ray.archive.pictures import check_pixels
from motor_ray.config import ArchiveSettings
from motor_ray.errors import BusyError, TomogramError
from motor_ray.service.problems import ProblemError
from motor_ray.storage import writing

PIECE = 8 * 2**20
"""Bytes of an upload that are written together."""

UPLOAD_BYTES = 64 * 2**20
"""What an upload takes of memory: its pieces, and as much again as it takes to send them on to object storage."""

SLOWEST = 100_000
"""Bytes a second. A body gets so much longer to come than an answer does."""

MOST_SLICES = 8192
"""Of a tomogram; one that says it has more is a file made up to keep us busy."""

SPACINGS = (0.1, 1000.0)
"""Angstrom, between which the edges of voxels lie."""

T = TypeVar("T")


class Room:
    """How many bytes of bodies this process holds, and may hold."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    @contextmanager
    def for_bytes(self, size: int) -> Iterator[None]:
        """Sets so many bytes aside; raises BusyError if there is no room now, ProblemError if there never is."""
        if size > self.most:
            raise ProblemError(413, f"The body has {size:,} bytes, expected at most {self.most:,}")
        if self.taken + size > self.most:
            raise BusyError(f"{self.taken:,} bytes are at work here, of {self.most:,} at most; try again")
        self.taken += size
        try:
            yield
        finally:
            self.taken -= size


def body_bytes(request: Request, most: int, what: str) -> int:
    """Bytes that the request says its body has. Raises ProblemError if it does not, or they are too many, or none."""
    said = request.headers.get("content-length", "")
    if not re.fullmatch("[0-9]+", said):
        raise ProblemError(411, f"A {what} comes with its Content-Length; curl sends it for --data-binary @FILE")
    if len(said) > 18:
        raise ProblemError(413, f"The {what} has more than 10**18 bytes, expected at most {most:,}")
    if int(said) > most:
        raise ProblemError(413, f"The {what} has {int(said):,} bytes, expected at most {most:,}")
    if int(said) == 0:
        raise ProblemError(422, f"The body is empty, expected a {what}")
    return int(said)


def counted(request: Request, size: int, seconds: float) -> Request:
    """`request`, but reading its body raises ProblemError unless it has exactly the `size` bytes that it said.

    And if nothing comes for so many seconds.
    """
    received = 0

    async def receive() -> Message:
        nonlocal received
        try:
            async with asyncio.timeout(seconds):
                message = await request.receive()
        except TimeoutError:
            raise ProblemError(408, f"No more of the body came within {seconds:g} s; send it again") from None
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            if received > size:
                raise ProblemError(400, f"The body goes on beyond the {size:,} bytes that it said it has")
            if received < size and not message.get("more_body", False):
                raise ProblemError(400, f"The body ended after {received:,} of {size:,} bytes; send it again")
        return message

    return Request(request.scope, receive)


@asynccontextmanager
async def in_time(size: int, seconds: float) -> AsyncIterator[None]:
    """Raises ProblemError if a body of `size` bytes is not there after `seconds`, and what SLOWEST adds to them."""
    seconds += size / SLOWEST
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ProblemError(408, f"The body was not there within {seconds:.3g} s; send it again") from None


async def read_body(request: Request, size: int, seconds: float) -> bytes:
    """The whole body of `size` bytes. Raises ProblemError if it has not that many, or takes too long to come."""
    async with in_time(size, seconds):
        return b"".join([piece async for piece in counted(request, size, seconds).stream()])


async def receive_volume(
    request: Request, uri: str, size: int, settings: ArchiveSettings, spacing: float | None, most_pixels: int
) -> MrcHeader:
    """Write the body of a `counted` request, an MRC file of `size` bytes, to `uri`; returns its header.

    Raises TomogramError or SliceCorruptError as soon as the header shows that it is no tomogram that we read, or is cut
    short. What was written of a body that breaks off is not kept.
    """
    pieces = _pieces(request)
    first = await anext(pieces, b"")
    header = parse_header(first[:HEADER_BYTES], size, "The tomogram", spacing)
    _check_whole(header, size)
    check_volume(header.shape, header.voxel_spacing_angstrom, most_pixels)
    async with aside(writing(uri, settings)) as file:
        await undisturbed(file.write, first)
        async for piece in pieces:
            await undisturbed(file.write, piece)
    return header


def check_volume(shape: tuple[int, int, int], spacing: float | None, most_pixels: int) -> None:
    """Raises TomogramError or SliceCorruptError for a tomogram of a `shape`, or a voxel spacing, that cannot be meant.

    What such a one would take of time and memory has no bound.
    """
    z, y, x = shape
    check_pixels((y, x), "A slice of the tomogram", most_pixels)
    if z > MOST_SLICES:
        raise TomogramError(f"The tomogram has {z:,} slices of {y} x {x} voxels, expected at most {MOST_SLICES:,}")
    if spacing is not None and not SPACINGS[0] <= spacing <= SPACINGS[1]:
        raise TomogramError(
            f"The tomogram's voxels are {spacing:g} angstrom wide, expected {SPACINGS[0]:g} to {SPACINGS[1]:g}; say "
            "the true spacing as voxel_spacing_angstrom"
        )


def _check_whole(header: MrcHeader, size: int) -> None:
    needed = header.data_offset + header.shape[0] * header.slice_bytes
    if size < needed:
        z, y, x = header.shape
        raise TomogramError(
            f"The tomogram has {size:,} bytes, its header of {z} x {y} x {x} voxels (z, y, x) needs {needed:,}; it was "
            "cut short"
        )


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces: the first as soon as it holds the header, others of PIECE bytes, the last one shorter."""
    buffer, wanted = bytearray(), HEADER_BYTES
    async for piece in request.stream():
        buffer += piece
        if len(buffer) >= wanted:
            yield bytes(buffer)
            buffer.clear()
            wanted = PIECE
    if buffer:
        yield bytes(buffer)


@asynccontextmanager
async def aside(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """`manager` entered and left in other threads, for it may have to wait for the storage."""
    try:
        yield await undisturbed(manager.__enter__)
    except BaseException as error:
        await undisturbed(manager.__exit__, type(error), error, error.__traceback__)
        raise
    await undisturbed(manager.__exit__, None, None, None)


async def undisturbed(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns, called in another thread. If this is cancelled, the function comes to its end first."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # else it would be told as one that nobody heard of
        raise
