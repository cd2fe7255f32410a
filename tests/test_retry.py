import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from motor_ray import retry
from motor_ray.errors import OutageError, StorageError
from motor_ray.retry import PAUSE, TransientError, failure, persist, persist_async, reason, retries


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", tenacity.wait_none())


class Request:
    """Fails `failures` times, then answers."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures, self.calls = failures, 0
        self.error = error or TransientError("503 SlowDown")

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"

    async def later(self) -> str:
        return self()


def sync(request: Request, attempts: int) -> str:
    return persist(request, "s3://b/k", attempts)


def in_a_loop(request: Request, attempts: int) -> str:
    return asyncio.run(persist_async(request.later, "s3://b/k", attempts))


both = pytest.mark.parametrize("send", [sync, in_a_loop])


@both
def test_a_request_is_sent_until_it_is_answered_and_each_time_again_is_counted(send):
    request, before = Request(failures=3), retries()
    assert send(request, 4) == "answer"
    assert request.calls == 4
    assert retries() - before == 3


@both
@pytest.mark.parametrize(("attempts", "tries"), [(1, "1 attempt"), (3, "3 attempts")])
def test_after_the_last_attempt_it_is_an_outage_that_names_what_failed_and_what_to_do(send, attempts, tries):
    request = Request(failures=9)
    with pytest.raises(OutageError) as caught:
        send(request, attempts)
    assert request.calls == attempts
    assert str(caught.value) == (
        f"s3://b/k: the storage did not answer in {tries} (the last: 503 SlowDown); "
        "run the same command again when it does"
    )


@both
@pytest.mark.parametrize("error", [FileNotFoundError("k"), PermissionError("403"), ValueError("?"), StorageError("no")])
def test_what_another_try_cannot_help_is_raised_at_once(send, error):
    request, before = Request(failures=1, error=error), retries()
    with pytest.raises(type(error)) as caught:
        send(request, 5)
    assert caught.value is error
    assert request.calls == 1
    assert retries() == before


def test_no_count_is_lost_between_threads():
    before = retries()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: sync(Request(failures=5), 6), range(200)))
    assert retries() - before == 1000


@given(st.integers(1, 60))
def test_pauses_are_random_and_never_above_20_seconds(attempt):
    def pause() -> float:
        state: Any = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = attempt
        return PAUSE(state)

    pauses = [pause() for _ in range(20)]
    assert 0 <= min(pauses) < max(pauses) <= min(20, 0.5 * 2 ** (attempt - 1))


def test_an_outage_stays_one_and_other_failures_become_storage_errors_that_say_what_to_do():
    outage = OutageError("s3://b/k: the storage did not answer")
    assert failure("s3://b/other", "cannot be read", outage) is outage
    missing = failure("/data/a", "cannot be read", FileNotFoundError(2, "No such file or directory"))
    assert str(missing) == "/data/a: cannot be read (No such file or directory)"
    assert not isinstance(missing, OutageError)
    assert "--archive.anonymous" in str(failure("s3://b/k", "cannot be read", PermissionError("403")))
    assert "AWS" not in str(failure("/data/a", "cannot be read", PermissionError(13, "Permission denied")))


def test_no_reason_repeats_a_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden/key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden-token")
    text = "at http://me:hidden@host:80/b: x-amz-security-token:hidden-token, signed with hidden/key"
    assert reason(OSError(text)) == "at http://***@host:80/b: x-amz-security-token:***, signed with ***"
