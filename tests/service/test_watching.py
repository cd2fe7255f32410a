import asyncio
import json
import logging

import pytest

from motor_ray.service.keys import Keys
from tests.service.asking import LEAVE, ask, form, scope_of
from tests.service.stand_ins import JPEG, Figures, app_of
from tests.service.test_keys import HASH, KEY


@pytest.fixture
def lines(caplog):
    """What the log says of requests."""
    caplog.set_level(logging.INFO, logger="motor_ray.service.watching")
    return lambda: [json.loads(one.getMessage()) for one in caplog.records if one.levelno == logging.INFO]


def test_a_request_is_told_in_one_line_of_json_without_what_it_brought(backend, lines, caplog, tmp_path):
    app = app_of(backend, str(tmp_path), keys=Keys({"alice": HASH}))
    query, headers = "?threshold=0.25&secret=query", [("Authorization", f"Bearer {KEY}"), ("X-Request-ID", "r-1")]
    ask(app, "POST", f"/v1/slices{query}", JPEG, headers)
    ask(app, "POST", "/v1/slices:batch", *form([("secret.jpg", JPEG)]))
    ask(app, "GET", "/v1/tomograms/secret-id?secret=query", b"", headers)
    ask(app, "GET", "/secret/path?secret=query")
    told = lines()
    assert told[0].pop("milliseconds") >= 0
    assert told[0] == {"request_id": "r-1", "method": "POST", "route": "/v1/slices", "status": 200}
    assert [one["status"] for one in told] == [200, 401, 404, 404]
    assert [one["route"] for one in told[2:]] == ["/v1/tomograms/{tomogram_id}", "none"]
    assert "secret" not in caplog.text
    assert KEY not in caplog.text
    assert repr(JPEG[:10])[2:-1] not in caplog.text


def test_what_broke_is_in_the_log_and_not_in_the_answer(backend, lines, caplog):
    backend.error = RuntimeError("the insides")
    meter = Figures()
    reply = ask(app_of(backend, meter=meter), "POST", "/v1/slices", JPEG, [("X-Request-ID", "r-7")])
    assert reply.problem(500)
    assert reply.json()["request_id"] == "r-7"
    assert "the insides" in caplog.text
    assert "r-7 broke" in caplog.text
    assert lines()[-1]["status"] == 500
    assert meter.requests == [("/v1/slices", 500)]


def test_who_went_away_is_no_fault(backend, lines):
    meter = Figures()
    assert ask(app_of(backend, meter=meter), "POST", "/v1/slices", [LEAVE], length=100).status == 0
    assert lines()[-1]["status"] == 499
    assert meter.requests == [("/v1/slices", 499)]


@pytest.mark.parametrize("given", ["r-1", "a" * 64, "A.b_c-9"])
def test_the_id_that_a_client_gives_is_kept(backend, given):
    reply = ask(app_of(backend), "GET", "/healthz", b"", [("X-Request-ID", given)])
    assert reply.header("X-Request-ID") == given


@pytest.mark.parametrize("given", ["", "a" * 65, "a b", "a\n", "<script>", "\xff", '{"a": 1}'])
def test_an_id_that_would_disturb_the_log_is_replaced(backend, given):
    reply = ask(app_of(backend), "GET", "/v1/model?model=none", b"", [("X-Request-ID", given)])
    assert reply.header("X-Request-ID") not in (given, None)
    assert reply.json()["request_id"] == reply.header("X-Request-ID")


def test_ids_differ(backend):
    app = app_of(backend)
    assert len({ask(app, "GET", "/healthz").header("X-Request-ID") for _ in range(20)}) == 20


def test_where_the_server_tells_the_id_it_is_not_told_twice(backend):
    app = app_of(backend, tells_id=False)
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    for target in ("/healthz", "/none"):
        sent.clear()
        asyncio.run(app(scope_of("GET", target, [("X-Request-ID", "r-1")]), receive, send))
        assert b"x-request-id" not in [name.lower() for name, _ in sent[0]["headers"]]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        *(
            ("GET", path, 404)
            for path in ("/none", "/v1", "/v1/", "/v2/model", "/v1/model/", "//", "/v1//model", "/%00")
        ),
        *(
            ("GET", path, 404)
            for path in ("/static/none.js", "/static/..%2fapp.py", "/static/%00", "/static/", "/static")
        ),
        *(
            ("GET", path, 404)
            for path in ("/static/../../../etc/passwd", "/static//etc/passwd", f"/static/{'a' * 5000}")
        ),
        *(("GET", path, 405) for path in ("/v1/slices", "/v1/slices:batch", "/v1/tomograms")),
        *((method, "/v1/model", 405) for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")),
        ("POST", "/", 405),
        ("POST", "/static/main.js", 405),
    ],
)
def test_what_is_not_there_is_a_problem_like_any_other(backend, method, target, status):
    reply = ask(app_of(backend), method, target)
    reply.problem(status)


def test_health_is_told_and_readiness_is_the_detectors(backend):
    app = app_of(backend)
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}
    assert ask(app, "GET", "/readyz").json() == {"status": "ready"}
    backend.ready = False
    assert ask(app, "GET", "/healthz").status == 200
    ask(app, "GET", "/readyz").problem(503)


def test_the_pages_ask_nobody_else_for_anything(backend):
    app = app_of(backend)
    for path in ("/", "/docs"):
        page = ask(app, "GET", path).body.decode()
        assert "//cdn" not in page
        assert "https://" not in page
    for part in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert ask(app, "GET", f"/swagger/{part}").status == 200


ORIGIN = "https://lab.example.org"
PREFLIGHT = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")]


def test_other_sites_are_not_let_in_unless_they_are_named(backend):
    asked = ("POST", "/v1/slices", JPEG, [("Origin", ORIGIN)])
    closed, other = app_of(backend), app_of(backend, cors_origins=("https://other.example.org",))
    for app in (closed, other):
        assert ask(app, *asked).header("Access-Control-Allow-Origin") is None
    assert ask(closed, "OPTIONS", "/v1/slices", b"", [("Origin", ORIGIN), *PREFLIGHT]).status == 405


def test_a_named_site_is_let_in(backend):
    app = app_of(backend, cors_origins=(ORIGIN,), keys=Keys({"alice": HASH}))
    before = ask(app, "OPTIONS", "/v1/slices", b"", [("Origin", ORIGIN), *PREFLIGHT])
    assert (before.status, before.header("Access-Control-Allow-Origin")) == (200, ORIGIN)
    reply = ask(app, "POST", "/v1/slices", JPEG, [("Origin", ORIGIN), ("X-API-Key", KEY)])
    assert (reply.status, reply.header("Access-Control-Allow-Origin")) == (200, ORIGIN)
    assert "X-Request-ID" in (reply.header("Access-Control-Expose-Headers") or "")
    assert reply.header("Access-Control-Allow-Credentials") is None
    for origin in (f"{ORIGIN}.evil.org", "null", ORIGIN.upper(), "http://lab.example.org"):
        assert ask(app, "GET", "/healthz", b"", [("Origin", origin)]).header("Access-Control-Allow-Origin") is None
