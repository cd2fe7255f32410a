"""Asking an endpoint over HTTP, once or all the time, and what it must answer."""

import http.client
import json
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest

from motor_ray.detector.description import describe_checkpoint
from motor_ray.distributed.answering import Answerer, picture_of


@dataclass(frozen=True)
class Address:
    """Where an endpoint listens, and the key to it."""

    port: int
    key: str
    host: str = "127.0.0.1"

    def ask(self, method: str, path: str, body: bytes | None = None, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self.key if key is None else key}"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "motor_ray.cli", "serve", *arguments]


def direct(checkpoint: str, images: list[bytes]) -> list[dict[str, Any]]:
    """What the model says without an endpoint."""
    description = describe_checkpoint(checkpoint)
    answerer = Answerer(checkpoint, description.sha256, description.settings, threads=1)
    prepared = [answerer.prepare_picture(image, None, 10**6) for image in images]
    answers = [answerer.look([one])[0] for one in prepared]
    return [picture_of(one, answer, answerer.sha256) for one, answer in zip(prepared, answers, strict=True)]


def assert_same(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    assert answer["model"] == expected["model"]
    assert answer["presence"] == pytest.approx(expected["presence"], abs=2e-3)
    assert len(answer["detections"]) == len(expected["detections"])
    for one, other in zip(answer["detections"], expected["detections"], strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=2e-2)


class Hammer:
    """Asks all the time, from several threads, and keeps what went wrong."""

    def __init__(self, endpoint: Address, images: list[bytes], expected: list[list[dict[str, Any]]]) -> None:
        self.endpoint, self.images, self.expected = endpoint, images, expected
        self.wrong: list[Any] = []
        self.models: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(3)]

    def work(self) -> None:
        number = 0
        while not self.stop.is_set():
            number = (number + 1) % len(self.images)
            try:
                status, answer = self.endpoint.ask("POST", "/v1/slices?threshold=0", self.images[number])
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(repr(error))
                continue
            if status != 200:
                self.wrong.append((status, answer))
                continue
            self.models.append(answer["model"])
            if not any(same(answer, ways[number]) for ways in self.expected):
                self.wrong.append(answer)

    def __enter__(self) -> "Hammer":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def same(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    try:
        assert_same(answer, expected)
    except AssertionError:
        return False
    return True


def until_answered(hammer: Hammer, more: int) -> None:
    """Wait for so many more answers."""
    wanted, ends = len(hammer.models) + more, time.monotonic() + 90
    while len(hammer.models) < wanted:
        assert time.monotonic() < ends, hammer.wrong
        assert not hammer.wrong
        time.sleep(0.05)
