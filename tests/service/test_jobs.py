import threading

import pytest

from motor_ray import storage
from motor_ray.errors import StorageError
from motor_ray.service import jobs as module
from motor_ray.service.jobs import ID, Jobs, check_allowed, new_id, new_record
from motor_ray.storage import DEFAULTS, exists, list_names, writing


@pytest.fixture
def jobs(place):
    return Jobs(place, DEFAULTS)


def submitted(jobs, **known):
    """The record of a tomogram that waits."""
    record = new_record(new_id(), "a.mrc", "default", **known)
    storage.write_bytes(jobs.volume(record["id"]), b"voxels")
    jobs.submit(record)
    return record


def files(jobs) -> int:
    """How many files there are in all."""
    rooms = ("records", "volumes", "queue")
    return sum(name != room for room in rooms for name in list_names(f"{jobs.uri}/{room}"))


def test_ids_are_of_one_form_and_never_the_same():
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(ID.fullmatch(one) for one in ids)


def test_what_waits_is_listed_in_the_order_in_which_it_came(jobs):
    came = [submitted(jobs)["id"] for _ in range(5)]
    assert jobs.waiting() == came
    assert (jobs.begin(came[2]) or {})["id"] == came[2]
    assert jobs.waiting() == came  # until it is finished
    jobs.finish(jobs.read(came[2]) | {"status": "done"})
    assert jobs.waiting() == [*came[:2], *came[3:]]


def test_who_comes_later_finds_what_was_there(jobs):
    record = submitted(jobs)
    assert jobs.note(record | {"status": "running", "slices_done": 3})
    again = Jobs(jobs.uri, DEFAULTS)
    assert again.waiting() == [record["id"]]
    assert (again.read(record["id"]) or {})["slices_done"] == 3


def test_a_finished_one_keeps_its_record_but_not_its_voxels(jobs):
    record = submitted(jobs)
    jobs.finish(record | {"status": "done", "motors": [{"z": 1.0}]})
    assert files(jobs) == 1
    assert jobs.read(record["id"])["motors"] == [{"z": 1.0}]


def test_what_was_finished_is_never_begun_or_noted_again(jobs):
    record = submitted(jobs)
    jobs.finish(record | {"status": "done"})
    assert jobs.begin(record["id"]) is None
    assert not jobs.note(record | {"status": "running"})
    jobs.finish(record | {"status": "failed"})
    assert jobs.read(record["id"])["status"] == "done"


def test_one_whose_ticket_outlived_its_work_leaves_the_queue(jobs):
    record = submitted(jobs)
    jobs.write(record | {"status": "done"})  # and then the process was ended
    assert jobs.waiting() == [record["id"]]
    assert jobs.begin(record["id"]) is None
    assert jobs.waiting() == []
    assert jobs.read(record["id"])["status"] == "done"
    assert not exists(jobs.volume(record["id"]))


def test_a_ticket_without_a_record_leaves_the_queue(jobs):
    record = submitted(jobs)
    storage.remove(f"{jobs.uri}/records/{record['id']}.json")
    assert jobs.begin(record["id"]) is None
    assert files(jobs) == 0


def test_what_else_lies_in_the_queue_is_left_alone(jobs):
    for name in ("note", "-", f"1-{new_id()}.partial", "1-a", ".hidden"):
        storage.write_bytes(f"{jobs.uri}/queue/{name}", b"")
    assert jobs.waiting() == []


def test_a_forgotten_one_is_gone_and_cannot_come_back(jobs):
    record = submitted(jobs)
    assert jobs.forget(record["id"])
    assert not jobs.forget(record["id"])
    assert not jobs.note(record)
    jobs.finish(record | {"status": "done"})
    assert jobs.read(record["id"]) is None
    assert files(jobs) == 0


def test_one_that_is_forgotten_while_it_is_noted_does_not_come_back(jobs, monkeypatch):
    record = submitted(jobs)
    write = jobs.write

    def late(record):
        jobs.forget(record["id"])
        write(record)

    monkeypatch.setattr(jobs, "write", late)
    assert not jobs.note(record)
    assert files(jobs) == 0


def test_one_that_is_forgotten_between_two_looks_at_it_is_not_there(jobs, monkeypatch):
    record = submitted(jobs)
    asked: list[str] = []
    read = storage.read_json

    def late(uri, settings):
        if not asked:
            asked.append(uri)
            jobs.forget(record["id"])
        return read(uri, settings)

    monkeypatch.setattr(module, "read_json", late)
    assert jobs.read(record["id"]) is None


def test_a_record_that_cannot_be_read_is_an_error_not_an_absence(jobs):
    record = submitted(jobs)
    storage.write_bytes(f"{jobs.uri}/records/{record['id']}.json", b"{")
    with pytest.raises(StorageError, match="not JSON"):
        jobs.read(record["id"])


@pytest.mark.parametrize(
    "job_id", ["", ".", "..", "../secret", "a" * 21, "a" * 23, "a" * 21 + "\n", "a" * 20 + "\x00b"]
)
def test_no_other_file_is_reached_by_an_id(jobs, job_id):
    storage.write_json(f"{jobs.uri}/secret.json", {"ticket": "1", "id": "x"})
    assert jobs.read(job_id) is None
    assert not jobs.forget(job_id)


def test_only_what_is_over_grows_old(jobs, monkeypatch):
    old, waiting, fresh = (submitted(jobs) for _ in range(3))
    monkeypatch.setattr(module, "now", lambda: "2020-01-01T00:00:00.000+00:00")
    jobs.finish(old | {"status": "failed"})
    jobs.note(waiting | {"status": "running"})
    monkeypatch.undo()
    jobs.finish(fresh | {"status": "done"})
    assert jobs.forget_old(24) == 1
    assert jobs.read(old["id"]) is None
    assert jobs.read(waiting["id"])
    assert jobs.read(fresh["id"])
    assert exists(jobs.volume(waiting["id"]))
    assert jobs.forget_old(0) == 1
    assert jobs.read(fresh["id"]) is None


def test_voxels_that_never_got_a_record_are_removed_in_time(jobs, monkeypatch):
    waiting, lost = submitted(jobs), new_id()
    storage.write_bytes(jobs.volume(lost), b"voxels")
    storage.write_bytes(f"{jobs.uri}/volumes/other.mrc", b"not ours")
    clock = [1000.0]
    monkeypatch.setattr("motor_ray.service.jobs.time.monotonic", lambda: clock[0])
    for hours, there in ((0, True), (23, True), (2, False)):
        clock[0] += 3600 * hours
        jobs.forget_old(24)
        assert exists(jobs.volume(lost)) is there
    assert exists(jobs.volume(waiting["id"]))
    assert exists(f"{jobs.uri}/volumes/other.mrc")


def test_checking_a_storage_leaves_nothing_there(jobs):
    jobs.check()
    assert [name for name in list_names(jobs.uri) if name.startswith("check")] == []


def test_a_storage_that_takes_nothing_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        Jobs(str(tmp_path / "file"), DEFAULTS).check()


def test_what_is_written_in_pieces_is_there_when_it_is_whole(place):
    uri = f"{place}/a/b.bin"
    pieces = [bytes([number]) * 1_000_000 for number in range(14)]
    with writing(uri) as file:
        for piece in pieces:
            file.write(piece)
        assert not exists(uri)
    assert storage.read_bytes(uri) == b"".join(pieces)
    with writing(uri) as file:
        pass
    assert storage.read_bytes(uri) == b""


@pytest.mark.parametrize("sent", [0, 10, 120_000_000], ids=["nothing", "a little", "parts"])
def test_what_breaks_off_leaves_nothing_and_what_was_there_stays(place, sent):
    uri = f"{place}/a/b.bin"

    def broken() -> None:
        with writing(uri) as file:
            for start in range(0, sent, 20_000_000):
                file.write(bytes(min(sent - start, 20_000_000)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert [name for name in list_names(f"{place}/a") if name != "a"] == []
    storage.write_bytes(uri, b"before")
    with pytest.raises(KeyboardInterrupt):
        broken()
    assert storage.read_bytes(uri) == b"before"


def test_an_upload_in_parts_that_breaks_off_leaves_no_parts_in_the_object_store(s3):
    uri = f"{s3.folder()}/b.bin"

    def broken() -> None:
        with writing(uri) as file:
            for _ in range(6):
                file.write(bytes(20_000_000))
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # our own
        broken()
    left = s3.server.client().list_multipart_uploads(Bucket=s3.server.bucket).get("Uploads", [])
    assert [one["Key"] for one in left if one["Key"].endswith("b.bin")] == []


def test_several_may_note_the_same_at_a_time(jobs):
    record = submitted(jobs)
    noted: list[bool] = []

    def note(number):
        noted.extend(jobs.note(record | {"slices_done": number}) for _ in range(20))

    threads = [threading.Thread(target=note, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert noted == [True] * 80
    assert jobs.read(record["id"])["slices_done"] in range(4)
    assert files(jobs) == 3


def test_the_whole_prefix_is_allowed_only_if_it_ends_so():
    for uri, allow in (("s3://b/a/c", "s3://b/a"), ("s3://b/a/c", "s3://b/a/"), ("s3://b/a", "s3://b/a")):
        check_allowed(uri, (allow,))
    for uri, allow in (("s3://b/ab", "s3://b/a"), ("s3://b/a", "s3://b/a/"), ("s3://b/a/../c", "s3://b/")):
        with pytest.raises(StorageError, match="not among"):
            check_allowed(uri, (allow,))
