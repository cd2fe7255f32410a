import contextlib
import json
import logging
import math
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from motor_ray import storage
from motor_ray.config import TrainSettings
from motor_ray.errors import ConfigError
from motor_ray.tracking import EXPERIMENT, Trackers, check_trackers, open_trackers

SILENT = TrainSettings(tensorboard=False)
LINE = {"epoch": 0, "loss_total": 2.5, "mAP@0.5": None, "recall": math.nan, "f1": math.inf}


@pytest.fixture(params=["local", "object storage"])
def run_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"


def events_in(run_uri: str) -> list[list[Any]]:
    """The events of each TensorBoard file of a run, oldest file first; their checksums must be right."""
    folder = storage.join(run_uri, "tensorboard")
    return [
        [Event.FromString(record) for record in records(storage.read_bytes(storage.join(folder, name)))]
        for name in sorted(storage.list_names(folder))
    ]


def records(data: bytes) -> list[bytes]:
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = data[12 : 12 + length]
        assert struct.unpack("<II", data[8:12] + data[12 + length : 16 + length]) == (
            masked_crc32c(data[:8]),
            masked_crc32c(event),
        )
        found.append(event)
        data = data[16 + length :]
    return found


def values_of(events: list[Any]) -> list[tuple[int, dict[str, float]]]:
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events
        if event.HasField("summary")
    ]


def test_tensorboard_gets_every_defined_metric_under_its_step(run_uri: str) -> None:
    with open_trackers(run_uri, "run", TrainSettings()) as trackers:
        trackers.log(10, LINE)
        trackers.log(20, {"loss_total": 1.5, "mAP@0.5": 0.25})
    [events] = events_in(run_uri)
    assert events[0].file_version == "brain.Event:2"
    assert values_of(events) == [(10, {"epoch": 0, "loss_total": 2.5}), (20, {"loss_total": 1.5, "mAP@0.5": 0.25})]


def test_a_resumed_run_tells_tensorboard_from_which_step_it_says_things_anew(
    run_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start, host in ((0, "a"), (30, "b")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        with open_trackers(run_uri, "run", TrainSettings()) as trackers:
            trackers.log(start + 10, LINE)
    first, second = events_in(run_uri)
    starts = [event.step for event in second if event.session_log.status == SessionLog.START]
    assert starts == [40]
    assert values_of(first)[0][0] == 10


def test_what_is_logged_is_there_before_the_run_is_over(run_uri: str) -> None:
    written = threading.Event()
    with open_trackers(run_uri, "run", TrainSettings()) as trackers:
        trackers.log(1, LINE)
        trackers._thread.submit(written.set)
        assert written.wait(60)
        assert values_of(events_in(run_uri)[0]) == [(1, {"epoch": 0, "loss_total": 2.5})]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    with open_trackers(str(tmp_path / "run"), "run", SILENT) as trackers:
        trackers.log(1, LINE)
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """Notes what it is told, and breaks at a step."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at, self.told, self.ended = breaks_at, list[int](), list[bool]()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert all(map(math.isfinite, metrics.values()))
        self.told.append(step)
        if step == self.breaks_at:
            raise ConnectionError("the server is gone")

    def close(self, failed: bool) -> None:
        self.ended.append(failed)


def test_a_tracker_that_fails_is_given_up_with_one_warning_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cannot_open() -> Recorder:
        raise OSError("no such host")

    broken, sound = Recorder(breaks_at=2), Recorder()
    kinds: dict[str, Callable[[], Recorder]] = {"A": lambda: broken, "B": lambda: sound, "C": cannot_open}
    with caplog.at_level(logging.WARNING), Trackers(kinds) as trackers:
        for step in range(1, 5):
            trackers.log(step, LINE)
    assert broken.told == [1, 2]
    assert sound.told == [1, 2, 3, 4]
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "C gets no more metrics of this run: no such host",
        "A gets no more metrics of this run: the server is gone",
    ]


def test_a_tracker_that_hangs_holds_nothing_up() -> None:
    release = threading.Event()

    class Slow(Recorder):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            assert release.wait(60)
            super().log(step, metrics)

    slow = Slow()
    with Trackers({"slow": lambda: slow}) as trackers:
        trackers.log(1, LINE)
        trackers.log(2, LINE)
        assert slow.told == []
        release.set()
    assert slow.told == [1, 2]


@pytest.mark.parametrize("failing", [False, True])
def test_trackers_are_told_how_the_run_ended(failing: bool) -> None:
    tracker = Recorder()
    outcome = pytest.raises(RuntimeError) if failing else contextlib.nullcontext()
    with outcome, Trackers({"one": lambda: tracker}):
        if failing:
            raise RuntimeError
    assert tracker.ended == [failing]


def test_mlflow_that_is_not_installed_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    check_trackers(SILENT)
    settings = TrainSettings(mlflow="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        check_trackers(settings)
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        open_trackers("run", "run", settings)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow, if it is installed; without its own telemetry, its folders allowed, its patience cut down."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
    ):
        monkeypatch.setenv(name, value)
    return pytest.importorskip("mlflow")


def test_mlflow_gets_settings_once_and_metrics_of_a_run_that_may_be_resumed(mlflow: Any, tmp_path: Path) -> None:
    run_uri, store = str(tmp_path / "run"), str(tmp_path / "store")
    settings = TrainSettings(mlflow=store, tensorboard=False, epochs=7)
    with open_trackers(run_uri, "first", settings) as trackers:
        trackers.log(10, {"loss_total": 2.5, "mAP@0.5": 0.25, "recall": None})
    client = mlflow.MlflowClient(tracking_uri=store)
    note = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    run = client.get_run(note["run_id"])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["train.epochs"] == "7"
    assert run.data.metrics == {"loss_total": 2.5, "mAP_0.5": 0.25}
    with pytest.raises(KeyboardInterrupt), open_trackers(run_uri, "first", settings) as trackers:  # noqa: PT012
        trackers.log(20, {"loss_total": 1.5})
        raise KeyboardInterrupt
    losses = client.get_metric_history(note["run_id"], "loss_total")
    assert [(metric.step, metric.value) for metric in losses] == [(10, 2.5), (20, 1.5)]
    assert client.get_run(note["run_id"]).info.status == "FAILED"
    [experiment] = [one for one in client.search_experiments() if one.name == EXPERIMENT]
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.usefixtures("mlflow")
def test_another_server_gets_a_run_of_its_own(tmp_path: Path) -> None:
    ids = set()
    for store in ("a", "b"):
        settings = TrainSettings(mlflow=str(tmp_path / store), tensorboard=False)
        with open_trackers(str(tmp_path / "run"), "run", settings) as trackers:
            trackers.log(1, LINE)
        ids.add((tmp_path / "run" / "mlflow.json").read_text())
    assert len(ids) == 2


@pytest.mark.usefixtures("mlflow")
def test_an_mlflow_server_that_is_gone_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = TrainSettings(mlflow="http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "motor_ray"), open_trackers(str(tmp_path), "run", settings) as trackers:
        trackers.log(1, LINE)
        trackers.log(2, LINE)
    assert [len(values_of(events)) for events in events_in(str(tmp_path))] == [2]
    told = [record.message for record in caplog.records if record.name.startswith("motor_ray")]
    assert len(told) == 1
    assert told[0].startswith("MLflow gets no more metrics of this run: ")


@pytest.mark.usefixtures("mlflow")
def test_a_uri_that_mlflow_does_not_take_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"--train\.mlflow ftp://host: "):
        check_trackers(TrainSettings(mlflow="ftp://host"))


def test_a_password_in_the_address_of_mlflow_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as failure:
        check_trackers(TrainSettings(mlflow="https://me:hunter2@mlflow.lab/"))
    assert "hunter2" not in str(failure.value)
