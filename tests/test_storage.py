import pyarrow as pa
import pytest

from motor_ray import storage
from motor_ray.config import ArchiveSettings
from motor_ray.errors import OutageError, StorageError
from motor_ray.tables import MOTORS


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_what_is_written_is_read_back_wherever_it_lies(folder):
    uri = storage.join(folder, "a", "b.json")
    assert not storage.exists(uri)
    storage.write_json(uri, {"z": [1, 2]})
    storage.write_json(uri, {"z": [3]})
    assert storage.read_json(uri) == {"z": [3]}
    storage.remove(storage.join(folder, "a"))
    storage.remove(storage.join(folder, "a"))
    assert not storage.exists(uri)


def test_tables_keep_their_schema_even_without_rows(folder):
    uri = storage.join(folder, "motors.parquet")
    storage.write_table(MOTORS.empty_table(), uri)
    assert storage.read_table(uri).schema == MOTORS


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    storage.write_bytes(str(path), b"whole")

    def break_off(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", break_off)
    with pytest.raises(StorageError, match=r"run\.json: cannot be written \(No space left on device\)"):
        storage.write_bytes(str(path), b"half")
    assert path.read_bytes() == b"whole"


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(StorageError, match=r"none\.json: cannot be read"):
        storage.read_json(str(tmp_path / "none.json"))
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(StorageError, match=r"half\.json: is not JSON"):
        storage.read_json(str(tmp_path / "half.json"))
    (tmp_path / "no.parquet").write_text("PAR0")
    with pytest.raises(StorageError, match=r"no\.parquet: is not parquet"):
        storage.read_table(str(tmp_path / "no.parquet"))
    with pytest.raises(StorageError, match=r"none\.parquet: cannot be read"):
        storage.read_table(str(tmp_path / "none.parquet"))


def test_an_unknown_scheme_is_named():
    with pytest.raises(StorageError, match="nowhere://"):
        storage.exists("nowhere://bucket/key")


def test_an_endpoint_that_does_not_answer_is_one_sentence(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    with pytest.raises(OutageError, match=r"s3://bucket/a\.json: the storage did not answer in 1 attempt \(") as caught:
        storage.read_bytes("s3://bucket/a.json", ArchiveSettings(attempts=1))
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_span_is_what_a_slice_of_the_whole_would_be(folder):
    uri = storage.join(folder, "a")
    data = bytes(range(100))
    storage.write_bytes(uri, data)
    source = storage.open_source(uri)
    assert source.read(uri) == data
    for start, end in [(0, 1), (10, 50), (90, 200), (100, 110), (500, 600)]:
        assert source.read(uri, start, end) == data[start:end]
    with pytest.raises(FileNotFoundError):
        source.read(uri + ".none")


def test_a_file_that_the_disk_refuses_is_neither_missing_nor_empty(tmp_path):
    with pytest.raises(StorageError, match=r": cannot be read \(Is a directory\)"):
        storage.open_source(str(tmp_path)).read(str(tmp_path))


def test_parts_are_joined_with_single_slashes():
    assert storage.join("s3://b/a/", "c", "d.json") == "s3://b/a/c/d.json"
    assert storage.join("/", "a") == "/a"


def test_a_table_may_be_a_folder_of_files(tmp_path):
    for name in "ab":
        storage.write_table(pa.table({"name": [name]}), str(tmp_path / f"{name}.parquet"))
    assert sorted(storage.read_table(str(tmp_path))["name"].to_pylist()) == ["a", "b"]
