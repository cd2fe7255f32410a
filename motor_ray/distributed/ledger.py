"""Which slabs are done: what Ray Data has noted of them, and what the files hold; and the small tables made of them.

Everything goes by pieces of the archive, sorted by tomogram. Slabs are scored about in that order, so a piece reads
only the few files, by their statistics, that can hold it.
"""

import contextlib
import fcntl
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset

from motor_ray.archive.plan import pieces
from motor_ray.config import RunSettings
from motor_ray.errors import OutageError, RunError, StorageError, UnfinishedError
from motor_ray.motors.failures import failed_slices, failed_tomograms
from motor_ray.motors.link import Rescore, link_slabs
from motor_ray.storage import exists, join, list_names, open_dataset, read_table, remove, write_table
from motor_ray.tables import MOTORS, PLAN, SLABS

PENDING = ".pending.parquet"
"""How Ray Data ends the name of a note until the slabs that it speaks of are written."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(out: str) -> Iterator[tuple[int, ...]]:
    """Nobody else on this machine, or on its shared disks, writes to the folder `out` while the block runs.

    What it gives are file descriptors for processes that write there, too, and might outlive this one: nobody else
    writes there before they have ended.

    Raises RunError if somebody does already. An object store knows no locks: there nobody is kept away.
    """
    out = out.removeprefix("file://")
    if "://" in out:
        yield ()
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = open(join(out, "lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}); give --out another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends, however
        except BlockingIOError:
            raise RunError(f"{out}: another motor-ray is at work here; wait for it, or stop it") from None
        yield (lock.fileno(),)


@contextlib.contextmanager
def storage_watched(out: str) -> Iterator[None]:
    """Storage that fails while the block runs leaves the run in the folder `out` unfinished: UnfinishedError."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UnfinishedError(
            f"{out}: stopped: {error}; run the same command again, a training's with --resume"
        ) from error


def settle(slabs: str, notes: str) -> None:
    """Make notes and slabs of a run that broke off agree, so that it can go on.

    Ray Data writes a pending note, the slabs, and then renames the note; slabs whose note is pending may be torn and
    are taken back. But object stores cannot rename, so there may be both notes, or none; a task whose answer was lost
    is run again after it renamed its note, and leaves both, too, and perhaps a torn file; and a writer that outlived
    its driver may have written what another wrote again. In the end every noted slab is written once, and every
    written one is noted.
    """
    _take_back_pending(slabs, notes)
    noted = set(_ids(notes))
    kept: set[str] = set()

    def once(slab_id: str) -> bool:
        wanted = slab_id in noted and slab_id not in kept
        kept.add(slab_id)
        return wanted

    dropped = _rewrite(slabs, once)
    forgotten = _rewrite(notes, kept.__contains__)
    if dropped or forgotten:
        log.warning(
            "%s: %d slabs written twice or in vain are dropped, %d that are lost are looked at again",
            slabs,
            dropped,
            forgotten,
        )


def done_slabs(notes: str) -> set[str]:
    """Ids of the slabs that are noted as written."""
    return set(_ids(notes))


def plan_pieces(plans: Sequence[str], manifest: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Pieces of `manifest`, sorted by tomo_id, each with its rows of all `plans`."""
    return _joined(plans, PLAN, manifest)


def complete_pieces(out: str, plans: Sequence[str], manifest: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Pieces of `manifest`, sorted by tomo_id, each with its SLABS.

    Raises UnfinishedError if the slabs of a piece are not exactly those of the `plans`.
    """
    slabs = _joined([join(out, "slabs")], SLABS, manifest)
    for (tomograms, planned), (_, looked_at) in zip(plan_pieces(plans, manifest), slabs, strict=True):
        if sorted(planned["slab_id"].to_pylist()) != sorted(looked_at["slab_id"].to_pylist()):
            raise UnfinishedError(
                f"{out}: {len(planned)} slabs of {tomograms['tomo_id'][0]} to {tomograms['tomo_id'][-1]} were planned "
                f"and {len(looked_at)} are there, not the same; run the same command again, which mends it"
            )
        yield tomograms, looked_at


def gather(
    out: str,
    plans: Sequence[str],
    manifest: pa.Table,
    settings: RunSettings,
    unusable: pa.Table,
    rescore: Rescore | None = None,
) -> dict[str, int]:
    """Link the slabs of a run into motors.parquet, and list what failed in failures.parquet; returns the counts.

    `plans` are the URIs of all that was planned. Motors have scores by `rescore`, if it is given. Raises
    UnfinishedError if the slabs are not exactly those.
    """
    motors, failures = [MOTORS.empty_table()], [unusable]
    counts = Counter({"planned": 0, "ok": 0, "missing": 0, "corrupt": 0})
    for _, planned in plan_pieces(plans, manifest):
        counts["planned"] += len(planned["zs"].combine_chunks().flatten())
    for tomograms, looked_at in complete_pieces(out, plans, manifest):
        counts.update(looked_at["slices"].combine_chunks().flatten().field("status").to_pylist())
        motors.append(link_slabs(looked_at, tomograms, settings.link, rescore))
        failures += [
            failed_tomograms(looked_at, tomograms, settings.detect.good_share),
            failed_slices(looked_at, tomograms),
        ]
    if counts["planned"] != counts["ok"] + counts["missing"] + counts["corrupt"]:
        raise UnfinishedError(f"{out}: slices were lost or doubled: {dict(counts)}; run the same command again")
    write_table(pa.concat_tables(motors), join(out, "motors.parquet"))
    write_table(pa.concat_tables(failures), join(out, "failures.parquet"))
    return dict(counts) | {"motors": sum(map(len, motors)), "failures": sum(map(len, failures))}


def _joined(uris: Sequence[str], schema: pa.Schema, manifest: pa.Table) -> Iterator[tuple[pa.Table, pa.Table]]:
    tables = [open_dataset(uri, schema) for uri in uris]
    field = pyarrow.dataset.field("tomo_id")
    for piece in pieces(manifest):
        within = (field >= piece["tomo_id"][0]) & (field <= piece["tomo_id"][-1])
        yield piece, pa.concat_tables([table.to_table(filter=within) for table in tables])


def _take_back_pending(slabs: str, notes: str) -> None:
    for note in [name for name in _names(notes) if name.endswith(PENDING)]:
        task = note.removesuffix(PENDING)
        files = [name for name in _names(slabs) if name.startswith(task)]
        if not (exists(join(notes, f"{task}.parquet")) and all(_is_whole(join(slabs, name)) for name in files)):
            for name in files:
                remove(join(slabs, name))
        remove(join(notes, note))


def _is_whole(uri: str) -> bool:
    """Whether a parquet file was written to its end, where its columns are listed."""
    try:
        return len(read_table(uri, columns=["slab_id"])) > 0
    except OutageError:
        raise
    except StorageError:
        return False


def _ids(folder: str) -> Iterator[str]:
    """The slab_id of every row of the parquet files in `folder`."""
    for name in _names(folder):
        yield from read_table(join(folder, name), columns=["slab_id"])["slab_id"].to_pylist()


def _rewrite(folder: str, keep: Callable[[str], bool]) -> int:
    """Leave out of the files in `folder` the rows whose slab_id is not to be kept; returns how many were not."""
    dropped = 0
    for name in _names(folder):
        uri = join(folder, name)
        kept = [keep(slab_id) for slab_id in read_table(uri, columns=["slab_id"])["slab_id"].to_pylist()]
        if not any(kept):
            remove(uri)
        elif not all(kept):
            write_table(read_table(uri).filter(pa.array(kept)), uri)
        dropped += len(kept) - sum(kept)
    return dropped


def _names(folder: str) -> list[str]:
    """Names of the parquet files in `folder`, sorted; none if there is no such folder."""
    return sorted(name for name in list_names(folder) if name.endswith(".parquet"))
