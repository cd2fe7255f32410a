"""All of `storage` against a real S3 server, directly and through a proxy that fails requests."""

import multiprocessing
import pickle
import sys
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import cv2
import mrcfile
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import tenacity
import zarr
from botocore.exceptions import HTTPClientError
from s3fs import S3FileSystem

from motor_ray import retry, storage
from motor_ray.archive.manifest import find_tomograms
from motor_ray.archive.readers import open_tomogram, read_slices
from motor_ray.buckets import Credentials, _bucket_region, _config
from motor_ray.config import ArchiveSettings
from motor_ray.errors import OutageError, SliceMissingError, StorageError
from motor_ray.s3 import S3Files
from motor_ray.sources import FilesSource
from tests.fault_proxy import faulty

pytestmark = pytest.mark.usefixtures("s3")

PATIENT = ArchiveSettings(attempts=8, timeout_seconds=1.0)
QUICK = ArchiveSettings(attempts=2, timeout_seconds=0.5)
SHAPE = (6, 40, 48)
S3_CALL = S3FileSystem._call_s3


@pytest.fixture(params=["obstore", "s3fs"])
def client(request, monkeypatch) -> str:
    """Reads go through obstore, or, where that is not installed, through s3fs."""
    if request.param == "s3fs":
        monkeypatch.setitem(sys.modules, "obstore", None)
    return str(request.param)


both = pytest.mark.usefixtures("client")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", tenacity.wait_random_exponential(multiplier=0.01, max=0.5))


@pytest.fixture
def through(monkeypatch):
    """Lead all clients to a proxy: ``through(proxy)``."""
    return lambda proxy: monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)


def objects(folder: str, count: int = 30, size: int = 60_000) -> dict[str, bytes]:
    """Objects in `folder`, each with bytes of its own."""
    rng = np.random.default_rng(0)
    data = {f"{folder}/{number}": rng.bytes(size + number) for number in range(count)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.write_bytes, data.keys(), data.values()))
    return data


def read_all(uris, settings: ArchiveSettings, threads: int = 8) -> dict[str, bytes]:
    uris = list(uris)
    source = storage.open_source(uris[0], settings)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(uris, map(bytes, pool.map(source.read, uris)), strict=True))


def test_the_source_is_the_one_that_the_machine_has(s3, client):
    folder = s3.folder()
    assert isinstance(storage.open_source(folder), FilesSource) == (client == "s3fs")
    assert storage.open_source(folder) is storage.open_source(f"{folder}/other") or client == "s3fs"
    assert isinstance(storage.open_source(f"{folder}//a"), FilesSource)


@both
def test_what_is_written_is_there_until_it_is_removed(s3):
    folder = s3.folder()
    uri = f"{folder}/a/b.json"
    assert not storage.exists(uri)
    storage.write_json(uri, {"z": [1, 2]})
    storage.write_json(uri, {"z": [3]})
    storage.write_bytes(f"{folder}/ab", b"beside")
    storage.write_bytes(f"{folder}/a/empty", b"")
    assert storage.read_json(uri) == {"z": [3]}
    assert storage.read_bytes(f"{folder}/a/empty") == b""
    assert storage.exists(f"{folder}/a")
    assert sorted(storage.list_names(f"{folder}/a")) == ["b.json", "empty"]
    assert (storage.list_folders(folder), storage.list_folders(f"{folder}/a")) == (["a"], [])
    storage.remove(f"{folder}/a")
    storage.remove(f"{folder}/a")
    assert not storage.exists(uri)
    assert not storage.exists(f"{folder}/a")
    assert storage.list_names(folder) == ["ab"]


def test_tables_come_back_from_a_file_and_from_a_folder(s3):
    folder = s3.folder()
    tables = [pa.table({"name": [name], "zs": [[1, 2]]}) for name in "ab"]
    for name, table in zip("ab", tables, strict=True):
        storage.write_table(table, f"{folder}/{name}.parquet")
    assert storage.read_table(f"{folder}/a.parquet") == tables[0]
    assert storage.read_table(folder).sort_by("name") == pa.concat_tables(tables).combine_chunks()
    with pytest.raises(StorageError, match=r"none\.parquet: cannot be read"):
        storage.read_table(f"{folder}/none.parquet")


@both
def test_a_span_is_what_a_slice_of_the_whole_would_be(s3):
    uri = f"{s3.folder()}/a"
    data = bytes(range(256)) * 4
    storage.write_bytes(uri, data)
    storage.write_bytes(f"{uri}.empty", b"")
    source = storage.open_source(uri)
    for start, end in [(0, 1), (10, 500), (1000, 1024), (1000, 2000), (1024, 1030), (5000, 6000)]:
        assert bytes(source.read(uri, start, end)) == data[start:end]
    assert bytes(source.read(f"{uri}.empty", 0, 10)) == b""


@pytest.mark.parametrize("name", ["a b", "Å ngström", "50%", "50%25", "a+b#c?d&e=f", "{z:04d}", "[x]*", ".a", "~"])
@both
def test_any_name_is_read_as_it_was_written(s3, name):
    uri = f"{s3.folder()}/{name}/{name}"
    storage.write_bytes(uri, name.encode())
    assert storage.read_bytes(uri) == name.encode()
    assert storage.list_names(uri.rpartition("/")[0]) == [name]


@both
def test_what_is_not_there_is_missing_not_failing(s3):
    before = storage.retries()
    for uri in (f"{s3.folder()}/none", "s3://no-such-bucket/none"):
        with pytest.raises(FileNotFoundError):
            storage.open_source(uri).read(uri)
        with pytest.raises(StorageError, match="none: cannot be read"):
            storage.read_bytes(uri)
        assert not storage.exists(uri)
    stack = open_tomogram(f"{s3.folder()}/{{z}}.jpg", "jpeg_stack", SHAPE, PATIENT)
    with pytest.raises(SliceMissingError, match=r"0\.jpg: slice 0 of 6 is not there"):
        stack.read_slice(0)
    assert storage.retries() == before


def test_removing_takes_a_name_by_its_letters(s3):
    folder = s3.folder()
    for name in ("[ab]", "a", "b*", "bc", "d/e"):
        storage.write_bytes(f"{folder}/{name}", b"")
    for name in ("[ab]", "b*", "d"):
        storage.remove(f"{folder}/{name}")
    assert sorted(storage.list_names(folder)) == ["a", "bc"]


def test_a_misspelt_bucket_is_an_error_and_is_not_made():
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/a/b: cannot be written \(The specified bucket"):
        storage.write_bytes("s3://no-such-bucket/a/b", b"")
    files, path = storage.arrow_filesystem("s3://no-such-bucket/a")
    files.create_dir(path)
    assert not storage.exists("s3://no-such-bucket")


@both
def test_each_of_many_threads_gets_what_it_asked_for_with_one_request_each(s3, through):
    data = objects(s3.folder(), 60)
    with faulty(s3.endpoint, 0) as proxy:
        through(proxy)
        assert read_all(data, PATIENT) == data
        assert proxy.counts() == {"passed": len(data)}


def archive(folder: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """A stack of PNGs, an MRC file and an OME-Zarr group under `folder`; their voxels by tomo_id."""
    rng = np.random.default_rng(1)
    volumes = {name: rng.integers(0, 255, SHAPE).astype(np.uint8) for name in ("stack", "zarr")}
    volumes["mrc"] = rng.normal(0, 40, SHAPE).astype(np.int16)
    for z, image in enumerate(volumes["stack"]):
        storage.write_bytes(f"{folder}/stack/slice_{z:04d}.png", cv2.imencode(".png", image)[1].tobytes())
    with mrcfile.new(tmp_path / "mrc.mrc") as file:
        file.set_data(volumes["mrc"])
    storage.write_bytes(f"{folder}/mrc.mrc", (tmp_path / "mrc.mrc").read_bytes())
    zarr.create_array(tmp_path / "zarr.zarr", data=volumes["zarr"], chunks=(2, 40, 48), zarr_format=2)
    for path in (tmp_path / "zarr.zarr").rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{folder}/{path.relative_to(tmp_path)}", path.read_bytes())
    return volumes


@both
def test_an_archive_is_found_and_read_whole_though_requests_fail(s3, through, tmp_path):
    folder = s3.folder()
    volumes = archive(folder, tmp_path)
    table, failures = find_tomograms(folder, PATIENT)
    assert len(failures) == 0
    with faulty(s3.endpoint, 5, errors=0.1, resets=0.1, truncations=0.1, stalls=0.02) as proxy:
        through(proxy)
        before = storage.retries()
        assert find_tomograms(folder, PATIENT)[0] == table
        for row in table.to_pylist():
            reader = open_tomogram(row["uri"], row["format"], SHAPE, PATIENT)
            slices = read_slices(reader, range(SHAPE[0]), threads=4)
            np.testing.assert_array_equal(slices, volumes[row["tomo_id"]])
        counts = proxy.counts()
        assert 0 < storage.retries() - before <= counts.total() - counts["passed"]


@pytest.mark.parametrize("kind", ["errors", "resets", "truncations", "stalls"])
def test_nothing_read_is_lost_and_every_failed_request_is_sent_again_once(s3, client, through, kind):
    data = objects(s3.folder())
    settings = ArchiveSettings(attempts=12, timeout_seconds=0.5)
    with faulty(s3.endpoint, 3, **{kind: 0.2}) as proxy:
        through(proxy)
        before = storage.retries()
        assert read_all(data, settings) == data
        injected = proxy.counts()[kind.removesuffix("s")]
        again = storage.retries() - before
        # Where a connection that was kept turns out to be reset, aiohttp takes a new one at once, without telling.
        assert again == injected if (client, kind) != ("s3fs", "resets") else 0 < again <= injected


def test_nothing_written_is_lost_though_requests_and_their_answers_are(s3, through):
    folder = s3.folder()
    table = pa.table({"n": range(1000)})
    with faulty(s3.endpoint, 2, errors=0.15, resets=0.15, truncations=0.15) as proxy:
        through(proxy)
        before = storage.retries()
        for number in range(10):
            storage.write_table(table, f"{folder}/{number}.parquet", PATIENT)
        assert storage.read_table(folder, settings=PATIENT).num_rows == 10_000
        assert len(storage.list_names(folder, PATIENT)) == 10
        storage.remove(folder, PATIENT)
        assert not storage.exists(folder, PATIENT)
        assert storage.retries() - before > 0


def test_an_upload_in_parts_is_whole_though_the_answer_that_it_is_gets_lost(s3, monkeypatch):
    uri = f"{s3.folder()}/large"
    data = np.random.default_rng(0).bytes(11 * 2**20)
    lost: list[object] = []

    async def lose_the_first_answer(self, method, *args, **kwargs):
        answer = await S3_CALL(self, method, *args, **kwargs)
        if method == "complete_multipart_upload" and not lost:
            lost.append(answer)
            raise HTTPClientError(error="the connection broke")
        return answer

    monkeypatch.setattr(S3FileSystem, "_call_s3", lose_the_first_answer)
    files, path = storage.filesystem(uri, PATIENT)
    with files.open(path, "wb", block_size=5 * 2**20) as file:
        file.write(data)
    assert lost
    assert storage.read_bytes(uri) == data


def test_an_upload_that_is_gone_for_another_reason_is_an_error(s3):
    uri = f"{s3.folder()}/a"
    storage.write_bytes(uri, b"something else")
    files, path = storage.filesystem(uri, PATIENT)
    bucket, key, _ = files.split_path(path)
    parts = {"Parts": [{"PartNumber": 1, "ETag": "0" * 32}]}
    with pytest.raises(OSError, match="upload"):
        files.call_s3("complete_multipart_upload", Bucket=bucket, Key=key, UploadId="0" * 32, MultipartUpload=parts)


def test_an_upload_that_fails_raises_and_leaves_what_was_there(s3, through):
    uri = f"{s3.folder()}/a"
    storage.write_bytes(uri, b"before")
    # Silence before the server has said that it wants the body is the one for which aiohttp has no limit.
    for kind in ("errors", "stalls"):
        with faulty(s3.endpoint, 0, stall_seconds=3600, **{kind: 1.0}) as proxy:
            through(proxy)
            with pytest.raises(OutageError, match=f"{uri}: the storage did not answer in 2 attempts"):
                storage.write_bytes(uri, b"after", QUICK)
    through(s3)
    assert storage.read_bytes(uri) == b"before"


@pytest.mark.parametrize(
    "ask",
    [
        lambda files, path: files.get_file_info(path),
        lambda files, path: files.get_file_info(pyarrow.fs.FileSelector(path)),
        lambda files, path: files.get_file_info(pyarrow.fs.FileSelector(path, recursive=True)),
        lambda files, path: files.open_input_file(f"{path}/a"),
        lambda files, path: files.open_input_stream(f"{path}/a"),
        lambda files, path: files.open_output_stream(f"{path}/a").close(),
        lambda files, path: files.delete_file(f"{path}/a"),
        lambda files, path: pq.read_table(f"{path}/a", filesystem=files),
    ],
)
def test_pyarrow_never_takes_a_failed_request_for_an_empty_answer(s3, through, ask):
    uri = s3.folder()
    storage.write_bytes(f"{uri}/a", b"")
    with faulty(s3.endpoint, 0, errors=1.0) as proxy:
        through(proxy)
        with pytest.raises(OutageError, match="did not answer in 2 attempts"):
            ask(*storage.arrow_filesystem(uri, QUICK))


def test_a_listing_one_folder_deep_fails_if_it_fails_on_the_way(s3, monkeypatch):
    uri = s3.folder()
    storage.write_bytes(f"{uri}/a/b", b"")
    files, path = storage.arrow_filesystem(uri, QUICK)

    async def fail(*_: object, **__: object) -> None:
        raise OutageError("on the second request")

    monkeypatch.setattr(S3Files, "_ls", fail)
    with pytest.raises(OutageError, match="second"):
        files.get_file_info(pyarrow.fs.FileSelector(path))


@pytest.mark.parametrize(("code", "expected"), [("SlowDown", OutageError), ("AccessDenied", StorageError)])
def test_objects_that_the_server_would_not_delete_are_told(s3, monkeypatch, code, expected):
    uri = s3.folder()
    storage.write_bytes(f"{uri}/a", b"")

    async def refuse(self, method, *args, **kwargs):
        if method == "delete_objects":
            return {"Errors": [{"Key": "a", "Code": code, "Message": "no"}]}
        return await S3_CALL(self, method, *args, **kwargs)

    monkeypatch.setattr(S3FileSystem, "_call_s3", refuse)
    with pytest.raises(expected, match=code) as caught:
        storage.remove(uri, QUICK)
    assert isinstance(caught.value, OutageError) == (expected is OutageError)


def test_other_processes_get_the_same_client_without_the_secret(s3, through):
    folder = s3.folder()
    storage.write_table(pa.table({"n": range(100)}), f"{folder}/a.parquet")
    with faulty(s3.endpoint, 1, errors=0.2, resets=0.1) as proxy:
        through(proxy)
        files, path = storage.arrow_filesystem(folder, PATIENT)
        sent = pickle.dumps(files)
        assert s3.server.secret_key.encode() not in sent
        received = pickle.loads(sent).handler.fs
        assert (received.attempts, received.timeout_seconds) == (8, 1.0)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in range(3):
                table = pool.submit(pq.read_table, f"{path}/a.parquet", filesystem=files).result()
                assert table.num_rows == 100
        assert proxy.counts()["error"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_ray_writes_and_reads_tables_though_requests_fail(s3, through):
    import ray

    from motor_ray.distributed.cluster import connected

    with faulty(s3.endpoint, 7, errors=0.1, resets=0.1, truncations=0.1) as proxy:
        through(proxy)
        files, path = storage.arrow_filesystem(s3.folder(), PATIENT)
        with connected():
            ray.data.range(500, override_num_blocks=5).write_parquet(path, filesystem=files)
            rows = ray.data.read_parquet(path, filesystem=files).take_all()
        assert sorted(row["id"] for row in rows) == list(range(500))
        assert proxy.counts()["error"] > 0


@both
def test_anonymous_reading_is_for_public_folders(s3):
    public, private = s3.folder(), s3.folder()
    for folder in (public, private):
        storage.write_bytes(f"{folder}/a", b"a")
    s3.open_to_all(public)
    anonymous = ArchiveSettings(anonymous=True, attempts=2)
    before = storage.retries()
    assert storage.read_bytes(f"{public}/a", anonymous) == b"a"
    assert storage.list_names(public, anonymous) == ["a"]
    with pytest.raises(StorageError, match=r"/a: cannot be read .*--archive\.anonymous") as caught:
        storage.read_bytes(f"{private}/a", anonymous)
    assert not isinstance(caught.value, OutageError)
    assert storage.retries() == before


@both
def test_without_credentials_or_with_wrong_ones_the_message_says_which_to_check(s3, monkeypatch, tmp_path):
    uri = f"{s3.folder()}/a"
    storage.write_bytes(uri, b"a")
    before = storage.retries()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "misspelt")
    for call in (storage.read_bytes, storage.exists, lambda uri: storage.write_bytes(uri, b"b")):
        with pytest.raises(StorageError, match=r"a: cannot be .*; check AWS_ACCESS_KEY_ID .*--archive\.anonymous"):
            call(uri)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for call in (storage.read_bytes, storage.exists):
        with pytest.raises(StorageError, match=r"(?i)a: cannot be .*\(.*credentials.*\); check AWS_ACCESS_KEY_ID"):
            call(uri)
    assert storage.retries() == before


@both
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", r"^AWS_ENDPOINT_URL: is localhost:9000, expected a URL such as http://"),
        ("AWS_ENDPOINT_URL_S3", "http://host:port", r"^AWS_ENDPOINT_URL_S3: is http://host:port, expected a URL"),
        ("AWS_ENDPOINT_URL", "http://me:hidden@host", r"^AWS_ENDPOINT_URL: is http://\*\*\*@host, expected"),
        ("AWS_PROFILE", "nobody", r"k: cannot be .*profile \(nobody\) could not be found.*; check AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    for call in (storage.read_bytes, storage.exists, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(StorageError, match=message):
            call("s3://bucket/k")


@both
@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "s3://bucket/", "s3:///k", "s3://not a bucket/k"])
def test_what_is_no_object_cannot_be_read(uri):
    with pytest.raises(StorageError, match=f"^{uri}: cannot be read"):
        storage.read_bytes(uri, QUICK)


@both
def test_credentials_may_come_from_a_profile(s3, monkeypatch, tmp_path):
    uri = f"{s3.folder()}/a"
    storage.write_bytes(uri, b"a")
    keys = f"aws_access_key_id = {s3.server.access_key}\naws_secret_access_key = {s3.server.secret_key}\n"
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert storage.read_bytes(uri) == b"a"
    assert storage.exists(uri)


@both
def test_the_endpoint_for_s3_alone_goes_before_that_for_all_services(s3, monkeypatch):
    uri = f"{s3.folder()}/a"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.write_bytes(uri, b"a", QUICK)
    assert storage.read_bytes(uri, QUICK) == b"a"


@both
def test_a_server_that_has_gone_is_an_outage_and_no_message_or_picture_holds_the_secret(s3, through):
    uri = f"{s3.folder()}/a"
    storage.write_bytes(uri, b"a")
    with faulty(s3.endpoint, 0) as proxy:
        through(proxy)
        assert storage.read_bytes(uri, QUICK) == b"a"
    texts = []
    for call in (storage.read_bytes, storage.exists, storage.list_names, storage.read_table, storage.remove):
        with pytest.raises(OutageError, match=r"did not answer in 2 attempts \(.*\); run the same command") as caught:
            call(uri, settings=QUICK)
        assert str(caught.value).startswith(uri)
        texts += [str(caught.value), repr(caught.value)]
    with pytest.raises(OutageError, match="did not answer in 2 attempts"):
        open_tomogram(f"{uri}/{{z}}.jpg", "jpeg_stack", SHAPE, QUICK).read_slice(0)
    with pytest.raises(OutageError, match="did not answer in 2 attempts"):
        find_tomograms(uri, QUICK)
    files, _ = storage.filesystem(uri, QUICK)
    texts += [repr(storage.open_source(uri, QUICK)), repr(files), files.to_json(), repr(storage._key(QUICK))]
    texts += [repr(storage.arrow_filesystem(uri, QUICK)), repr(s3), repr(s3.server)]
    assert not [text for text in texts if s3.server.secret_key in text]


def test_amazons_buckets_are_asked_where_they_are_and_others_are_part_of_the_path(s3, monkeypatch):
    session = None  # the environment names a region
    path_style = {"endpoint": s3.endpoint, "region": "us-east-1", "virtual_hosted_style_request": False}
    assert _config("bucket", session, 1) == path_style
    monkeypatch.delenv("AWS_ENDPOINT_URL")

    def refuse(request, **_):
        headers = Message()
        headers["x-amz-bucket-region"] = "us-west-2"
        raise urllib.error.HTTPError(request.full_url, 403, "Forbidden", headers, None)

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert _config("bucket", session, 1) == {"region": "us-west-2", "virtual_hosted_style_request": True}
    assert _config("a.b", session, 1) == {"region": "us-west-2", "virtual_hosted_style_request": False}

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert _bucket_region("bucket", 1) is None
    assert _config("bucket", session, 1)["region"] == "us-east-1"


def test_credentials_of_a_role_are_asked_for_again_those_of_variables_are_not():
    class Session:
        def __init__(self, credentials):
            self.get_credentials = lambda: credentials

    class Keys:
        access_key, secret_key, token = "a", "b", "c"

        def get_frozen_credentials(self):
            return self

    class RoleKeys(Keys):
        def refresh_needed(self):
            return False

    assert Credentials(Session(Keys()))()["expires_at"] is None
    assert Credentials(Session(RoleKeys()))()["expires_at"] is not None
