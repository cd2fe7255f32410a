"""Where a run's metrics go beside its own files: TensorBoard's event files, and MLflow.

Training matters more than who watches it: trackers are told in a thread of their own, so that a slow one holds nothing
up, and one that fails is given up with a warning.
"""

import logging
import math
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeGuard
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from motor_ray.config import TrainSettings
from motor_ray.errors import ConfigError
from motor_ray.storage import exists, filesystem, join, read_json, write_bytes, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT = "motor_ray"
"""The MLflow experiment that runs belong to."""


class Tracker(Protocol):
    """One place that metrics go to; whatever it raises, it is given up."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note finite `metrics` of a step."""

    def close(self, failed: bool) -> None:
        """The run is over, by an exception or without."""


class Trackers:
    """All trackers of a run, as a context manager: they are told what was logged before it is left."""

    def __init__(self, kinds: Mapping[str, Callable[[], Tracker]]) -> None:
        """`kinds` holds, by the names that warnings use, what opens each tracker."""
        self._kinds, self._trackers = kinds, dict[str, Tracker]()
        self._thread = ThreadPoolExecutor(1, "trackers")

    def __enter__(self) -> "Trackers":
        self._thread.submit(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.submit(self._tell, lambda tracker: tracker.close(failed=kind is not None))
        self._thread.shutdown()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Note the metrics of a step; those that are None or not finite are left out. Returns at once."""
        finite = {name: float(value) for name, value in metrics.items() if _is_finite(value)}
        self._thread.submit(self._tell, lambda tracker: tracker.log(step, finite))

    def _open(self) -> None:
        for name, make in self._kinds.items():
            with self._giving_up(name):
                self._trackers[name] = make()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._giving_up(name):
                what(tracker)

    @contextmanager
    def _giving_up(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s gets no more metrics of this run: %s; metrics.jsonl has them all", name, reason)


class TensorBoard:
    """An event file in the folder `uri`, appended to on disk, and on object storage written again with every step."""

    def __init__(self, uri: str) -> None:
        files, path = filesystem(uri)
        self._local = isinstance(files, LocalFileSystem)
        self._uri = join(path if self._local else uri, f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
        self._written = b""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note finite `metrics` of a step."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        now, events = time.time(), []
        if not self._written:
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            # A run that goes on repeats the steps since its checkpoint; TensorBoard then drops those from here on.
            events.append(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        events.append(Event(wall_time=now, step=step, summary=Summary(value=values)))
        self._append(b"".join(_record(event.SerializeToString()) for event in events))

    def close(self, failed: bool) -> None:
        """Nothing is held open."""

    def _append(self, records: bytes) -> None:
        self._written += records
        if not self._local:
            return write_bytes(self._uri, self._written)
        # TensorBoard holds the file open, and would not see one that takes its place.
        Path(self._uri).parent.mkdir(parents=True, exist_ok=True)
        with open(self._uri, "ab") as file:
            file.write(records)
        return None


class MLflow:
    """A run on an MLflow server; which one is noted in the run's folder, so that a resumed run goes on with it."""

    def __init__(self, run_uri: str, name: str, settings: TrainSettings) -> None:
        self._client = mlflow_client(settings.mlflow)
        note, here = join(run_uri, "mlflow.json"), {"tracking_uri": settings.mlflow}
        there = read_json(note) if exists(note) else {}
        if there.items() >= here.items():
            self._run_id: str = there["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = self._new_run(name, settings)
            write_json(note, here | {"run_id": self._run_id})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note finite `metrics` of a step; in names, what MLflow does not allow becomes ``_``."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        noted = [Metric(re.sub(r"[^\w\-. /]", "_", name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=noted)

    def close(self, failed: bool) -> None:
        """Tell how the run ended."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _new_run(self, name: str, settings: TrainSettings) -> str:
        from mlflow.entities import Param

        run_id = str(self._client.create_run(self._experiment(), run_name=name).info.run_id)
        values = settings.model_dump(mode="json")
        self._client.log_batch(run_id, params=[Param(f"train.{key}", str(value)) for key, value in values.items()])
        return run_id

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        there = self._client.get_experiment_by_name(EXPERIMENT)
        if there is None:
            try:
                return str(self._client.create_experiment(EXPERIMENT))
            except MlflowException:  # another run, started together with this one, was faster
                there = self._client.get_experiment_by_name(EXPERIMENT)
                if there is None:
                    raise
        return str(there.experiment_id)


def open_trackers(run_uri: str, name: str, settings: TrainSettings) -> Trackers:
    """The trackers that `settings` ask for, of the run `name` in the folder `run_uri`; a context manager.

    Raises ConfigError as `check_trackers` does, and nothing later.
    """
    check_trackers(settings)
    kinds: dict[str, Callable[[], Tracker]] = {}
    if settings.tensorboard:
        kinds["TensorBoard"] = partial(TensorBoard, join(run_uri, "tensorboard"))
    if settings.mlflow:
        kinds["MLflow"] = partial(MLflow, run_uri, name, settings)
    return Trackers(kinds)


def check_trackers(settings: TrainSettings) -> None:
    """Raises ConfigError if MLflow is asked for and is not installed, or does not take the URI; asks no server.

    Also if the URI holds a password, for settings are written to run.json and to every checkpoint.
    """
    if settings.mlflow:
        if "@" in urlsplit(settings.mlflow).netloc:
            raise ConfigError(
                "--train.mlflow: the URI holds a user or a password, which would be kept with every checkpoint; give "
                "them as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        mlflow_client(settings.mlflow)


def mlflow_client(tracking_uri: str | None) -> "MlflowClient":
    """What talks to MLflow. Raises ConfigError if it is not installed, or does not take the URI."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise ConfigError(
            f"--train.mlflow {tracking_uri}: needs MLflow, which is not installed; pip install mlflow-skinny"
        ) from None
    try:
        return MlflowClient(tracking_uri=tracking_uri)
    except (MlflowException, ImportError) as error:
        raise ConfigError(f"--train.mlflow {tracking_uri}: {' '.join(str(error).split())}") from None


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _record(event: bytes) -> bytes:
    """An event as it stands in a file of them (TFRecord): its length and itself, each with its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(event))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, event))
