"""Clients of an endpoint, so many at a time or so many a second, and what became of their requests."""

import asyncio
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from motor_ray.bench.served import wait_for
from motor_ray.client import Client, EndpointError

ANSWERED = 200
REFUSED = (429, 503)

FEWEST = 10
"""Fewer requests have no rate."""

LONGEST_SECONDS = 120.0
"""A request that takes longer has failed."""


USUAL_REQUESTS = 20
"""Single requests that tell what is usual."""


class Picture(NamedTuple):
    """An image file, and what is to be found on it."""

    data: bytes
    answer: Mapping[str, Any] | None
    """Without ``seconds``; None if any will do."""


class Done(NamedTuple):
    """What became of a request."""

    due: float
    """Seconds of the clock when it was to be sent,"""

    sent: float
    """when it was, and"""

    ended: float
    """when it was over."""

    status: int | None
    """None if there was no answer."""

    right: bool
    """Whether the answer is that of the image."""

    @property
    def seconds(self) -> float:
        """From when it was due: a client that comes late counts, too."""
        return self.ended - self.due


def is_right(picture: Picture, answer: Mapping[str, Any]) -> bool:
    """Whether an answer is the one that belongs to a picture."""
    wanted = picture.answer
    return wanted is None or {name: said for name, said in answer.items() if name != "seconds"} == wanted


class Clients:
    """So many clients, each of which asks again as soon as it has its answer."""

    def __init__(self, url: str, pictures: Sequence[Picture], *, retries: int = 0) -> None:
        self.client, self.pictures = Client(url, retries=retries, timeout=LONGEST_SECONDS), pictures
        self.done: list[Done] = []
        self._stop = threading.Event()

    @contextmanager
    def asking(self, number: int) -> Iterator[None]:
        """Meanwhile `number` of them ask."""
        threads = [threading.Thread(target=self._ask, args=(place,)) for place in range(number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            self.client.close()

    def _ask(self, place: int) -> None:
        while not self._stop.is_set():
            picture = self.pictures[place % len(self.pictures)]
            started = time.monotonic()
            try:
                right, status = is_right(picture, self.client.slice(picture.data)), ANSWERED
            except EndpointError as error:
                right, status = False, error.status or 0
            self.done.append(Done(started, started, time.monotonic(), status or None, right))
            place += 1


def closed_loop(url: str, pictures: Sequence[Picture], number: int, requests: int) -> list[Done]:
    """What became of so many `requests` of so many clients, once each has had its first answer."""
    clients = Clients(url, pictures, retries=8)
    with clients.asking(number):
        wait_for(lambda: len(clients.done) >= number + requests, 900, "the clients did not get their answers")
    return sorted(clients.done, key=lambda one: one.ended)[number : number + requests]


def rate_of(done: Sequence[Done]) -> float:
    """Requests a second: the slope of their number over time, which batches that end together do not blur."""
    times = sorted(one.ended for one in done)
    if len(times) < FEWEST:
        return 0.0
    return statistics.linear_regression(times, range(len(times))).slope


async def send_at_rate(url: str, pictures: Sequence[Picture], rate: float, seconds: float) -> tuple[list[Done], float]:
    """Requests that are due at `rate` a second for so long, whatever becomes of those before them.

    Returns them, and after how many seconds of single requests from then on one was as fast as `usual` before.
    """
    timeout, connector = aiohttp.ClientTimeout(LONGEST_SECONDS), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        usual = statistics.median([(await send(session, pictures[0])).seconds for _ in range(USUAL_REQUESTS)])
        started, under_way = time.monotonic(), []
        for number in range(int(rate * seconds)):
            due = started + number / rate
            await asyncio.sleep(max(due - time.monotonic(), 0))
            under_way.append(asyncio.create_task(send(session, pictures[number % len(pictures)], due)))
        recovery = await recovered(session, pictures[0], 2 * usual)
        return list(await asyncio.gather(*under_way)), recovery


async def recovered(session: aiohttp.ClientSession, picture: Picture, usual: float) -> float:
    """Seconds until a request has had its answer within `usual` seconds."""
    started = time.monotonic()
    while time.monotonic() < started + LONGEST_SECONDS:
        one = await send(session, picture)
        if one.right and one.seconds <= usual:
            break
        await asyncio.sleep(0.05)
    return time.monotonic() - started


async def send(session: aiohttp.ClientSession, picture: Picture, due: float | None = None) -> Done:
    """Send a picture, once."""
    sent = time.monotonic()
    due = sent if due is None else due
    try:
        async with session.post("/v1/slices", data=picture.data) as response:
            answer = await response.json(content_type=None)
            right = response.status == ANSWERED and is_right(picture, answer)
            return Done(due, sent, time.monotonic(), response.status, right)
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return Done(due, sent, time.monotonic(), None, right=False)


def fates(done: Sequence[Done]) -> dict[str, int]:
    """How many requests came to which end."""
    names = ("no answer" if one.status is None else f"{one.status}" for one in done)
    counted: dict[str, int] = dict(Counter(names))
    return counted | {"wrong": sum(one.status == ANSWERED and not one.right for one in done)}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The middle and the end of what was measured."""
    if not seconds:
        return {}
    return {f"p{share}": round(percentile(seconds, share), 4) for share in (50, 90, 99, 100)}


def percentile(seconds: Sequence[float], share: float) -> float:
    """What so many of a hundred stay below."""
    return float(np.percentile(seconds, share)) if seconds else 0.0
