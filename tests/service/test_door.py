import asyncio
from unittest.mock import AsyncMock

import pytest

from motor_ray.service.door import DOOR_BYTES, Door, doors
from tests.service.asking import Reply, scope_of

OURS = (b"x-request-disconnect-disabled", b"?1")


def through(most, headers, scope=None):
    """The headers that a door lets through."""
    seen = []

    async def app(scope, *_):
        seen.extend(scope["headers"])

    scope = scope or scope_of("POST", "/", ())
    scope["headers"] = headers
    asyncio.run(Door(app, most)(scope, *[AsyncMock()] * 2))
    return seen


@pytest.mark.parametrize("most", [None, 1000])
@pytest.mark.parametrize(
    "name",
    [
        *(b"x-request-disconnect-disabled", b"X-Request-Disconnect-Disabled", b"x_request_disconnect_disabled"),
        *(b"serve_multiplexed_model_id", b"serve-multiplexed-model-id", b"Serve_Multiplexed-Model_ID"),
        *(b"x-request-timeout-seconds", b"x-session-id", b"X_SESSION_ID"),
    ],
)
def test_what_serve_is_told_does_not_come_from_outside(most, name):
    others = [(b"content-type", b"image/png"), (b"x-api-key", b"k"), (b"x-request-id", b"r-1")]
    assert through(most, [others[0], (name, b"?0"), *others[1:], (name, b"2")]) == [*others, OURS]


def test_what_is_no_request_passes_untouched():
    assert through(10, [(b"x-session-id", b"a")], {"type": "websocket"}) == [(b"x-session-id", b"a")]


async def knock(door, length, headers=()) -> Reply:
    """What a door answers itself; status 0 if it lets the request in."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = scope_of("POST", "/v1/slices", [*headers, *([("Content-Length", length)] if length else [])])
    await door(scope, None, send)
    if not sent:
        return Reply(0, [], b"", 0)
    told = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    return Reply(sent[0]["status"], told, sent[1]["body"], 0)


def test_bodies_are_counted_where_it_is_told_to():
    async def all_of_them() -> None:
        gate = asyncio.Event()

        async def app(*_):
            await gate.wait()

        door = Door(app, 1000)
        inside = [asyncio.create_task(knock(door, "400")) for _ in range(2)]
        await asyncio.sleep(0)
        (await knock(door, "201")).problem(429)
        refused = await knock(door, "1001")
        refused.problem(413)
        assert refused.header("x-content-type-options") == "nosniff"
        assert door.room is not None
        assert door.room.taken == 800
        gate.set()
        assert [(await one).status for one in inside] == [0, 0]
        assert door.room.taken == 0
        assert (await knock(door, "1000")).status == 0
        assert (await knock(door, None)).status == 0

    asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("length", "headers", "status"),
    [
        (None, [("Transfer-Encoding", "chunked")], 411),
        ("5", [("Transfer-Encoding", "chunked")], 411),
        ("1" * 5000, [], 400),
        ("-5", [], 400),
        ("\xb2", [], 400),
        ("5, 6", [], 400),
    ],
)
def test_a_body_of_unknown_length_is_refused_where_they_are_counted(length, headers, status):
    async def app(*_):
        raise AssertionError

    reply = asyncio.run(knock(Door(app, 1000), length, headers))
    reply.problem(status)


def test_a_request_that_breaks_gives_its_room_back():
    async def app(*_):
        raise RuntimeError

    door = Door(app, 1000)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            asyncio.run(knock(door, "900"))


@pytest.mark.parametrize("bytes_", [None, "1000"])
def test_serve_gets_one_door(monkeypatch, bytes_):
    if bytes_:
        monkeypatch.setenv(DOOR_BYTES, bytes_)
    else:
        monkeypatch.delenv(DOOR_BYTES, raising=False)
    (door,) = doors()
    assert isinstance(door.cls, type)
    assert issubclass(door.cls, Door)
    assert door.kwargs == {"most": 1000 if bytes_ else None}
