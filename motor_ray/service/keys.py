"""Who may ask: keys that only their owners know, of which we keep the hashes."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from motor_ray.errors import ConfigError
from motor_ray.service.settings import KEYS_VARIABLE, ServeSettings

KEY_BYTES = 32
"""Bytes of chance in a key: so many that a plain hash of it cannot be turned back by trying."""

_LINE = re.compile(r"(?P<name>\S+)\s+(?P<hash>[0-9a-f]{64})")


class Keys:
    """Names and hashes of those who may ask."""

    def __init__(self, hashes: dict[str, str]) -> None:
        self._hashes = {name: bytes.fromhex(value) for name, value in hashes.items()}

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, key: str) -> str | None:
        """Whose `key` it is; None if nobody's. Takes as long for any key."""
        given = hashlib.sha256(key.encode()).digest()
        owners = [name for name, known in self._hashes.items() if hmac.compare_digest(known, given)]
        return owners[0] if owners else None


def read_keys(settings: ServeSettings) -> Keys:
    """The keys of the environment and of the settings' file. Raises ConfigError if they are malformed."""
    hashes = parse_keys(os.environ.get(KEYS_VARIABLE, "").replace(",", "\n").splitlines(), KEYS_VARIABLE)
    if settings.keys_file:
        try:
            lines = Path(settings.keys_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"serve.keys_file {settings.keys_file}: cannot be read ({error}); make it with "
                "motor-ray serve --new-key NAME --serve.keys-file FILE"
            ) from None
        hashes |= parse_keys(lines, settings.keys_file)
    return Keys(hashes)


def needed_keys(settings: ServeSettings) -> Keys:
    """`read_keys`; ConfigError if there are none, others can reach the endpoint, and that was not said to be meant."""
    keys = read_keys(settings)
    if not keys and not settings.is_local and not settings.insecure:
        raise ConfigError(
            f"serve.host {settings.host}: others could reach it, and there are no keys; make one with motor-ray serve "
            "--new-key NAME --serve.keys-file FILE, or say --serve.insecure"
        )
    return keys


def parse_keys(lines: Iterable[str], source: str) -> dict[str, str]:
    """Hashes by name, of lines such as "alice 5e88…"; empty lines and those that begin with # say nothing."""
    hashes = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            # Not the line itself: it may well be a key.
            raise ConfigError(f"{source}: line {number} is not a name and a sha256 of 64 hexadecimal digits")
        hashes[match["name"]] = match["hash"]
    return hashes


def add_key(path: str, name: str) -> str:
    """Make a key for `name`, append its hash to the file `path`, and return the key, which is kept nowhere.

    Raises ConfigError if the name has a key already, or the file cannot be written.
    """
    if not re.fullmatch(r"[\w.@-]+", name):
        raise ConfigError(f"--new-key {name!r}: expected a name of letters, digits, and . _ - @")
    file = Path(path).expanduser()
    try:
        there = file.read_text(encoding="utf-8") if file.exists() else ""
        if name in parse_keys(there.splitlines(), path):
            raise ConfigError(f"{path}: {name} has a key already; delete that line first")
        key = secrets.token_urlsafe(KEY_BYTES)
        with open(file, "a", encoding="utf-8", opener=lambda at, flags: os.open(at, flags, 0o600)) as out:
            ends = "" if not there or there.endswith("\n") else "\n"
            out.write(f"{ends}{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text, expected names and hashes; give another file, or a new one") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return key
