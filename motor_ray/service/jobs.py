"""Tomograms that were handed in, on storage that outlives every process of the endpoint.

records/<id>.json    all that is known of one, as requests get to see it
volumes/<id>.mrc     its voxels, until it has been looked at
queue/<time>-<id>    is there as long as it waits or is being looked at
"""

import re
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from motor_ray.config import ArchiveSettings
from motor_ray.errors import StorageError
from motor_ray.storage import exists, join, list_names, read_json, remove, write_bytes, write_json

Status = Literal["queued", "running", "done", "failed"]
OVER = ("done", "failed")
"""The last state of a tomogram: nobody works on it any more."""

Record = dict[str, Any]

ID = re.compile(r"[A-Za-z0-9_-]{22}")
"""What `new_id` gives; nothing else may become part of a file's name."""


class Jobs:
    """The tomograms under the folder or prefix `uri`. Methods talk to the storage and raise StorageError."""

    def __init__(self, uri: str, settings: ArchiveSettings) -> None:
        self.uri, self.settings = uri, settings
        self.orphans: dict[str, float] = {}
        """Volumes without a record, and when they were first seen."""

    def volume(self, job_id: str) -> str:
        """Where the voxels of an uploaded tomogram lie."""
        return join(self.uri, "volumes", f"{job_id}.mrc")

    def submit(self, record: Record) -> None:
        """Put a tomogram into the queue; its voxels are there already."""
        self.write(record)
        write_bytes(self._ticket(record), b"", self.settings)

    def waiting(self) -> list[str]:
        """Ids of those that wait or are being looked at, the first come first."""
        return [job_id for ticket in sorted(self._tickets()) if ID.fullmatch(job_id := ticket.partition("-")[2])]

    def begin(self, job_id: str) -> Record | None:
        """What is known of one that waits; None if there is nothing to be done any more, and what is left goes."""
        record = self.read(job_id)
        if record is None:  # it was forgotten
            for ticket in self._tickets():
                if ticket.partition("-")[2] == job_id:
                    remove(join(self.uri, "queue", ticket), self.settings)
            remove(self.volume(job_id), self.settings)
        elif record["status"] in OVER:
            self._let_go(record)
        else:
            return record
        return None

    def read(self, job_id: str) -> Record | None:
        """What is known of a tomogram; None if there is none of that id."""
        if not ID.fullmatch(job_id):
            return None
        where = self._record(job_id)
        try:
            record: Record = read_json(where, self.settings)
        except StorageError:
            if exists(where, self.settings):
                raise
            return None
        return record

    def write(self, record: Record) -> None:
        """Note what is known of a tomogram now."""
        record["updated"] = now()
        write_json(self._record(record["id"]), record, self.settings)

    def note(self, record: Record) -> bool:
        """`write`, unless it was forgotten, or somebody else has finished it; whether it was neither."""
        there = self.read(record["id"])
        if there is None or there["status"] in OVER:
            return False
        self.write(record)
        # Who forgets takes the ticket first and the record last, so that one of us two sees what the other does.
        if exists(self._ticket(record), self.settings):
            return True
        remove(self._record(record["id"]), self.settings)
        return False

    def finish(self, record: Record) -> None:
        """`note` what was found in a tomogram, or why nothing; its voxels are not kept."""
        if self.note(record):
            self._let_go(record)

    def forget(self, job_id: str) -> bool:
        """Remove all of a tomogram; whether there was any."""
        record = self.read(job_id)
        if record is None:
            return False
        self._let_go(record)
        remove(self._record(job_id), self.settings)
        return True

    def forget_old(self, hours: float) -> int:
        """Forget those that were finished so long ago; returns how many. Those in the queue stay."""
        oldest = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
        kept = set(self.waiting())
        names = [name.removesuffix(".json") for name in list_names(join(self.uri, "records"), self.settings)]
        old = [name for name in names if name not in kept and (one := self.read(name)) and one["updated"] < oldest]
        for name in old:
            self.forget(name)
        self._forget_orphans(hours)
        return len(old)

    def check(self) -> None:
        """Raises StorageError if nothing can be written here."""
        where = join(self.uri, f"check-{secrets.token_hex(4)}")
        write_bytes(where, b"", self.settings)
        remove(where, self.settings)

    def _forget_orphans(self, hours: float) -> None:
        """Remove volumes that have had no record for so long: whoever received them was ended before they were whole,
        or in the queue.
        """
        folder, seen = join(self.uri, "volumes"), time.monotonic()
        ids = {name: name.partition(".")[0] for name in list_names(folder, self.settings)}
        alone = [name for name, job_id in ids.items() if ID.fullmatch(job_id) and self.read(job_id) is None]
        self.orphans = {name: self.orphans.get(name, seen) for name in alone}
        for name, since in self.orphans.items():
            if seen - since > hours * 3600:
                remove(join(folder, name), self.settings)

    def _let_go(self, record: Record) -> None:
        remove(self._ticket(record), self.settings)
        remove(self.volume(record["id"]), self.settings)

    def _record(self, job_id: str) -> str:
        return join(self.uri, "records", f"{job_id}.json")

    def _tickets(self) -> list[str]:
        return list_names(join(self.uri, "queue"), self.settings)

    def _ticket(self, record: Record) -> str:
        return join(self.uri, "queue", f"{record['ticket']}-{record['id']}")


def new_id() -> str:
    """A name that nobody guesses."""
    return secrets.token_urlsafe(16)


def new_record(job_id: str, name: str, model: str, **known: Any) -> Record:
    """What is known of a tomogram when it comes; `name` is what people call it."""
    empty = {"size_z": None, "size_y": None, "size_x": None, "voxel_spacing_angstrom": None}
    return {
        "id": job_id,
        "status": "queued",
        "created": now(),
        "updated": now(),
        "name": name,
        "model_name": model,
        "model": None,
        "uri": None,
        **empty,
        "slices_done": 0,
        "slices_planned": 0,
        "problem": None,
        "motors": [],
        "failures": [],
        "ticket": f"{time.time_ns():020d}",
        "attempts": 0,
        **known,
    }


def now() -> str:
    """The time, so that later is greater."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def check_allowed(uri: str, allow: tuple[str, ...]) -> None:
    """Raises StorageError unless `uri` lies below one of the prefixes, at a slash or where the prefix ends in one."""
    below = any(uri.startswith(prefix if prefix.endswith("/") else f"{prefix}/") or uri == prefix for prefix in allow)
    if not below or {"..", "."} & set(uri.split("/")) or not uri.isprintable():
        raise StorageError(f"{uri}: is not among the places that this endpoint reads")
