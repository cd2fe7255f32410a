"""Notes and files of a run that broke off, as Ray Data leaves them; written here by hand, without Ray."""

import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from motor_ray.distributed.ledger import alone, done_slabs, settle
from motor_ray.errors import RunError, StorageError
from motor_ray.storage import list_names, read_table
from motor_ray.tables import SLABS


class Run:
    """A folder of slabs and one of notes."""

    def __init__(self, folder: Path) -> None:
        self.slabs, self.notes = str(folder / "slabs"), str(folder / "notes")

    def write(self, task: str, slabs: str, noted: str | None = None, *, pending: bool = False) -> None:
        """One task's file of `slabs`, a letter each, and its note of those or of `noted`."""
        if slabs:
            rows = [{"slab_id": slab, "tomo_id": "t", "slices": []} for slab in slabs]
            self._put(f"{self.slabs}/{task}-0.parquet", pa.Table.from_pylist(rows, schema=SLABS))
        ids = pa.table({"slab_id": list(slabs if noted is None else noted)})
        if len(ids):
            self._put(f"{self.notes}/{task}{'.pending' if pending else ''}.parquet", ids)

    def _put(self, path: str, table: pa.Table) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        pq.write_table(table, path)

    def written(self) -> list[str]:
        return sorted(
            slab
            for name in list_names(self.slabs)
            for slab in read_table(f"{self.slabs}/{name}")["slab_id"].to_pylist()
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def settled(run: Run) -> tuple[str, str]:
    """What is written and what is noted, after settling."""
    settle(run.slabs, run.notes)
    return "".join(run.written()), "".join(sorted(done_slabs(run.notes)))


def test_a_run_that_has_not_begun_has_nothing_to_settle(run):
    assert settled(run) == ("", "")


def test_a_run_in_order_is_left_as_it_is(run):
    run.write("u1_000000", "abc")
    run.write("u1_000001", "de")
    before = [path.stat().st_mtime_ns for path in sorted(Path(run.slabs).iterdir())]
    assert settled(run) == ("abcde", "abcde")
    assert before == [path.stat().st_mtime_ns for path in sorted(Path(run.slabs).iterdir())]


def test_slabs_whose_note_is_pending_are_taken_back(run):
    run.write("u1_000000", "abc")
    run.write("u1_000001", "de", pending=True)
    assert settled(run) == ("abc", "abc")
    assert list_names(run.notes) == ["u1_000000.parquet"]


def test_a_torn_file_under_a_pending_note_is_taken_back_unread(run):
    run.write("u1_000000", "abc")
    run.write("u1_000001", "de", pending=True)
    Path(run.slabs, "u1_000001-0.parquet").write_bytes(b"PAR1 torn")
    assert settled(run) == ("abc", "abc")


def test_where_both_notes_are_there_whole_slabs_are_kept(run):
    """Object stores copy and delete: Ray Data alone would delete the slabs, and count them as done."""
    run.write("u1_000000", "abc")
    run.write("u1_000000", "abc", pending=True)
    run.write("u1_000001", "de")
    assert settled(run) == ("abcde", "abcde")
    assert sorted(list_names(run.notes)) == ["u1_000000.parquet", "u1_000001.parquet"]


def test_a_task_that_was_repeated_after_its_note_was_renamed_and_then_broke_off_is_taken_back(run):
    run.write("u1_000000", "abc")
    run.write("u1_000000", "abc", pending=True)
    Path(run.slabs, "u1_000000-0.parquet").write_bytes(b"PAR1 torn")
    assert settled(run) == ("", "")


def test_slabs_that_two_writers_wrote_are_kept_once(run):
    run.write("u1_000000", "abc")
    run.write("u2_000000", "bcd")
    assert settled(run) == ("abcd", "abcd")


def test_noted_slabs_that_are_not_there_are_looked_at_again(run):
    run.write("u1_000000", "abc")
    run.write("u1_000001", "", noted="de")
    run.write("u1_000002", "f", noted="fg")
    assert settled(run) == ("abcf", "abcf")


def test_slabs_that_nobody_noted_are_dropped_for_they_will_be_written_again(run):
    run.write("u1_000000", "abc")
    run.write("u1_000001", "de", noted="")
    assert settled(run) == ("abc", "abc")


def test_two_runs_do_not_write_to_one_folder_at_a_time(tmp_path):
    out = str(tmp_path / "out")
    with alone(out), pytest.raises(RunError, match="another motor-ray is at work here"), alone(out):
        pass
    with alone(out):
        pass


def test_a_process_that_was_given_the_lock_keeps_it_when_the_one_that_took_it_has_ended(tmp_path):
    out = str(tmp_path)
    with alone(out) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=lock)
    with pytest.raises(RunError, match="another motor-ray is at work here"), alone(out):
        pass
    child.kill()
    child.wait()
    with alone(out):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out: cannot be written"), alone(str(tmp_path / "file" / "out")):
        pass
