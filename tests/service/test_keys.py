import hashlib
import hmac

import pytest

from motor_ray.errors import ConfigError
from motor_ray.service.keys import Keys, add_key, needed_keys, parse_keys, read_keys
from motor_ray.service.settings import KEYS_VARIABLE, ServeSettings
from tests.service.asking import ask
from tests.service.stand_ins import JPEG, app_of

KEY = "k" * 43
HASH = hashlib.sha256(KEY.encode()).hexdigest()
KEYS = Keys({"alice": HASH, "bob": "0" * 64})

ROUTES = [
    ("GET", "/v1/model"),
    ("POST", "/v1/slices"),
    ("POST", "/v1/slices:batch"),
    ("POST", "/v1/tomograms"),
    ("GET", "/v1/tomograms/a"),
    ("GET", "/v1/tomograms/a/motors.csv"),
    ("DELETE", "/v1/tomograms/a"),
]

WRONG = {
    "none": [],
    "empty": [("Authorization", "")],
    "another": [("Authorization", f"Bearer {KEY}x")],
    "half": [("Authorization", f"Bearer {KEY[:-1]}")],
    "its hash": [("Authorization", f"Bearer {HASH}")],
    "no scheme": [("Authorization", KEY)],
    "basic": [("Authorization", f"Basic {KEY}")],
    "no key": [("Authorization", "Bearer ")],
    "not ASCII": [("X-API-Key", "\xff\xfe")],
    "long": [("X-API-Key", KEY * 1000)],
    "in the query": [("X-Other", KEY)],
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_without_the_key_nothing_is_answered_and_no_body_is_read(backend, tmp_path, headers):
    app = app_of(backend, str(tmp_path), keys=KEYS)
    for method, path in ROUTES:
        reply = ask(app, method, f"{path}?key={KEY}&threshold=nan", JPEG, headers)
        assert "key" in reply.problem(401)
        assert reply.header("www-authenticate") == "Bearer"
        assert reply.taken == 0
    assert not backend.asked


@pytest.mark.parametrize(
    "header", [("Authorization", f"Bearer {KEY}"), ("authorization", f"bearer {KEY}"), ("X-API-Key", KEY)]
)
def test_the_owner_of_a_key_is_let_in(backend, header):
    assert ask(app_of(backend, keys=KEYS), "POST", "/v1/slices", JPEG, [header]).status == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/static/index.html"])
def test_the_page_and_health_need_no_key(backend, path):
    assert ask(app_of(backend, keys=KEYS), "GET", path).status == 200


def test_every_known_hash_is_compared_in_constant_time(monkeypatch):
    compared, constant_time = [], hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return constant_time(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in (KEY, "wrong"):
        compared.clear()
        assert KEYS.owner(key) == ("alice" if key == KEY else None)
        assert compared == [(bytes.fromhex(known), hashlib.sha256(key.encode()).digest()) for known in (HASH, "0" * 64)]


def test_a_new_key_works_and_only_its_hash_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    file = tmp_path / "keys"
    first, second = add_key(str(file), "alice"), add_key(str(file), "bob")
    keys = read_keys(ServeSettings(keys_file=str(file)))
    assert (keys.owner(first), keys.owner(second)) == ("alice", "bob")
    assert first not in file.read_text()
    assert len(first) >= 43
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="alice has a key already"):
        add_key(str(file), "alice")
    with pytest.raises(ConfigError, match="expected a name"):
        add_key(str(file), "a b")


def test_a_line_is_added_to_a_file_that_does_not_end_in_one(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    file = tmp_path / "keys"
    file.write_text(f"# people\n\nalice  {HASH}")
    key = add_key(str(file), "bob")
    keys = read_keys(ServeSettings(keys_file=str(file)))
    assert (keys.owner(KEY), keys.owner(key)) == ("alice", "bob")


def test_keys_come_from_the_environment_as_well(tmp_path, monkeypatch):
    other = hashlib.sha256(b"other").hexdigest()
    (tmp_path / "keys").write_text(f"bob {other}\n")
    monkeypatch.setenv(KEYS_VARIABLE, f"alice {HASH},carol {'1' * 64}")
    keys = read_keys(ServeSettings(keys_file=str(tmp_path / "keys")))
    assert (keys.owner(KEY), keys.owner("other"), keys.owner("none")) == ("alice", "bob", None)


@pytest.mark.parametrize(
    "line", ["hunter2", "alice hunter2", f"alice {HASH.upper()}", f"alice {HASH} more", f"alice {KEY}"]
)
def test_a_malformed_line_is_named_by_its_number_only(line):
    with pytest.raises(ConfigError, match=r"keys: line 2 is not a name and a sha256") as caught:
        parse_keys(["# people", line], "keys")
    assert "hunter2" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert HASH.upper() not in str(caught.value)


def test_a_file_that_cannot_be_read_is_an_error_not_an_open_door(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_keys(ServeSettings(keys_file=str(tmp_path / name)))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "", "localhost.example.org", "127.0.0.1.nip.io"]
)
def test_others_are_not_let_in_without_keys_unless_that_is_meant(host, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="others could reach it"):
        needed_keys(ServeSettings(host=host))
    assert not needed_keys(ServeSettings(host=host, insecure=True))
    monkeypatch.setenv(KEYS_VARIABLE, f"alice {HASH}")
    assert needed_keys(ServeSettings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_keys(host, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert not needed_keys(ServeSettings(host=host))
