"""Starts the endpoint, on a cluster or here, gives a running one other models, and stops it."""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import ray
from ray import serve
from ray.exceptions import RayError

from motor_ray.config_values import flat
from motor_ray.distributed.cluster import LOCAL_SLOTS, QUIET, alive, holds, possible_nodes, root_cause
from motor_ray.distributed.replica import Detector
from motor_ray.distributed.serving import APP, application, detector_resources, model_cards
from motor_ray.distributed.sharing import require_shared
from motor_ray.errors import ConfigError, RunError, UnfinishedError
from motor_ray.machine import cores
from motor_ray.service.jobs import Jobs
from motor_ray.service.keys import needed_keys
from motor_ray.service.settings import SEPARATOR, ServeSettings, ServiceSettings, checkpoints_of
from motor_ray.storage import absolute

log = logging.getLogger(__name__)


def serve_models(settings: ServiceSettings) -> dict[str, Any]:
    """Put the models of `settings` behind an endpoint.

    With RAY_ADDRESS on that cluster, where it stays. Where an endpoint of ours listens already on the same port of
    this machine, that one gets the models, without a request failing. Else here, until SIGINT or SIGTERM. Raises
    ConfigError, RunError, CheckpointError or StorageError before anything is started, UnfinishedError if it did not
    get ready.
    """
    if os.environ.get("RAY_ADDRESS") and settings.serve.storage is None:
        raise ConfigError("serve.storage: a cluster needs a folder or s3:// prefix that all its nodes reach; give one")
    settings = complete(settings)
    check(settings)
    if os.environ.get("RAY_ADDRESS"):
        with joined("auto"):
            require_shared(settings.serve.models.values(), str(settings.serve.storage))
            require_detectors(settings)
            deploy(settings)
        return {"url": url(settings.serve), "cluster": os.environ["RAY_ADDRESS"]}
    if running := running_here(settings.serve):
        changed = changed_over(settings, running["settings"])
        with joined(running["address"]):
            deploy(changed)
        log.info("the endpoint at %s has the new models", url(changed.serve))
        return {"url": url(changed.serve), "pid": running["pid"]}
    serve_until_stopped(settings)
    return {"url": url(settings.serve), "stopped": True}


def changed_over(asked: ServiceSettings, running: dict[str, Any]) -> ServiceSettings:
    """The `running` settings with the models that are `asked` for.

    Raises ConfigError if any other is asked for: what is not said again, such as a file of keys, must not be undone.
    """
    there = ServiceSettings.model_validate(running)
    usual = complete(ServiceSettings(serve=ServeSettings(port=asked.serve.port)))
    wanted, now, default = (flat(one.model_dump(mode="json")) for one in (asked, there, usual))
    differing = [
        f"{name} is {now[name]}, not {value}"
        for name, value in wanted.items()
        if value not in (now[name], default[name]) and name != "serve.models"
    ]
    if differing:
        raise ConfigError(
            f"{url(there.serve)} is running: {'; '.join(differing)}; stop it first to change more than models"
        )
    models = there.serve.models | asked.serve.models
    return there.model_copy(update={"serve": there.serve.model_copy(update={"models": models})})


def stop_serving(settings: ServeSettings) -> dict[str, Any]:
    """Stop the endpoint of the cluster of RAY_ADDRESS, or the one here. Raises RunError if there is none."""
    if os.environ.get("RAY_ADDRESS"):
        with joined("auto"):
            applications = serve.status().applications
            if APP not in applications:
                raise RunError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: no endpoint of ours is on this cluster")
            if len(applications) > 1:  # others' are none of our business
                serve.delete(APP)
            else:
                serve.shutdown()  # type: ignore[no-untyped-call]
        return {"stopped": os.environ["RAY_ADDRESS"]}
    running = running_here(settings)
    if not running:
        raise RunError(f"{url(settings)}: no endpoint of ours listens here")
    os.kill(running["pid"], signal.SIGTERM)
    return {"stopped": running["pid"]}


def complete(settings: ServiceSettings) -> ServiceSettings:
    """`settings` with a place for tomograms, and paths that hold for other processes, too."""
    serving = settings.serve
    own = Path(tempfile.gettempdir(), f"motor-ray-served-{os.getuid()}-{serving.port}")
    changes: dict[str, Any] = {"storage": absolute(serving.storage or str(own))}
    if serving.keys_file:
        changes["keys_file"] = absolute(serving.keys_file)
    changes["models"] = {
        name: SEPARATOR.join(map(absolute, checkpoints_of(uris))) for name, uris in serving.models.items()
    }
    return settings.model_copy(update={"serve": serving.model_copy(update=changes)})


def check(settings: ServiceSettings) -> None:
    """Raises what makes it pointless to start."""
    limits = settings.serve
    needed_keys(limits)
    own_folder(str(limits.storage))
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(limits, name)
        if path and not os.access(path, os.R_OK):
            raise ConfigError(f"serve.{name} {path}: cannot be read")
    model_cards(settings)
    Jobs(str(limits.storage), settings.archive).check()


def own_folder(storage: str) -> None:
    """Make the folder that is taken when none was given, for this user only. Raises RunError if another's is there."""
    folder = Path(storage)
    if not folder.name.startswith(f"motor-ray-served-{os.getuid()}-"):
        return
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RunError(f"{folder}: belongs to somebody else; give --serve.storage another folder")


def serve_until_stopped(settings: ServiceSettings, detector_class: type[Detector] = Detector) -> None:
    """Start Ray and the endpoint on this machine, and wait for SIGINT or SIGTERM; requests at work are finished."""
    limits = settings.serve
    require_port(limits)
    stop = threading.Event()
    with own_note(limits) as note, local_ray(settings):
        write_note(note, settings)
        try:
            deploy(settings, detector_class)
            with stopping(stop):  # only now: Ray, when it starts, takes SIGTERM for itself
                log.info("%s is ready: /docs describes the API, %s has figures", url(limits), metrics_url())
                log.info("Ctrl-C stops it")
                stop.wait()
            log.info("stopping, when the requests at work are done")
        finally:
            with stopping(threading.Event()):  # not even by impatience, or HAProxy would live on
                serve.shutdown()  # type: ignore[no-untyped-call]


def deploy(settings: ServiceSettings, detector_class: type[Detector] = Detector) -> None:
    """Bring the application to the connected Ray, in place of what there is. Raises UnfinishedError."""
    limits = settings.serve
    secure = {"ssl_certfile": limits.ssl_certfile, "ssl_keyfile": limits.ssl_keyfile} if limits.ssl_certfile else {}
    logging_config = {"encoding": "JSON", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = with_room_to_replace(settings)
    try:
        serve.start(http_options={"host": limits.host, "port": limits.port, **secure}, logging_config=logging_config)
        require_address(limits)
        serve.run(application(settings, detector_class), name=APP, route_prefix="/", logging_config=logging_config)
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise UnfinishedError(f"{url(limits)}: the endpoint did not get ready: {root_cause(error)}") from error


def require_detectors(settings: ServiceSettings) -> None:
    """Raises RunError if the nodes can never hold the detectors that are wanted at least: Serve would wait for ever."""
    cpus, share = detector_resources(settings)
    least = max(settings.serve.min_detectors, 1)
    there = holds(possible_nodes(), {"CPU": cpus, "GPU": share})
    if there < least:
        raise RunError(
            f"serve.min_detectors: {least} detectors are wanted, each of {cpus} CPUs and {share:g} GPUs of one node, "
            f"and the cluster's nodes hold {there}; give each less (--serve.detector-cpus, --serve.detector-gpus), or "
            "add nodes"
        )


def with_room_to_replace(settings: ServiceSettings) -> ServiceSettings:
    """`settings`, but detectors are stopped before their successors start if there is no room for one more."""
    limits = settings.serve
    cpus, share = detector_resources(settings)
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if limits.replace == "before" or (free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= share):
        return settings
    log.info("there is no room for one more detector, so those that run are stopped before their successors start")
    return settings.model_copy(update={"serve": limits.model_copy(update={"replace": "before"})})


def require_address(limits: ServeSettings) -> None:
    """Raises ConfigError if Serve was started before, to listen elsewhere: it would go on listening there."""
    client = serve.context._get_global_client()
    there = client.http_config if client else None
    secured = there and (there.ssl_certfile, there.ssl_keyfile) == (limits.ssl_certfile, limits.ssl_keyfile)
    if there and (not secured or (there.host, there.port) != (limits.host, limits.port)):
        raise ConfigError(
            f"Ray Serve listens on {there.host}:{there.port} already, expected {limits.host}:{limits.port}; say "
            f"--host {there.host} --port {there.port}, or shut it down first"
        )


@contextlib.contextmanager
def local_ray(settings: ServiceSettings) -> Iterator[None]:
    """A Ray of our own on this machine, with room for the detectors that there may be, and their successors."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    slots = 2 * settings.serve.max_detectors * (settings.serve.detector_cpus or cores()) + settings.serve.ingresses
    ray.init(
        address="local",
        num_cpus=max(LOCAL_SLOTS, slots),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Connected to a Ray that is there. Raises RunError if it does not answer."""
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"{address}: no Ray answers ({' '.join(str(error).split())})") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` instead of ending this process at once."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def own_note(limits: ServeSettings) -> Iterator[TextIO]:
    """The file for `write_note`, ours as long as the block runs, so that one that was left behind is known as such.

    Only this user can read it. Raises RunError if an endpoint on this port is just starting.
    """
    note = note_of(limits)
    with open(os.open(note, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{url(limits)}: an endpoint is just starting here; try again when it is ready") from None
        file.truncate()
        try:
            yield file
        finally:
            note.unlink(missing_ok=True)


def write_note(note: TextIO, settings: ServiceSettings) -> None:
    """Say where our Ray is, for a later command that brings other models."""
    address = ray.get_runtime_context().gcs_address
    json.dump({"pid": os.getpid(), "address": address, "settings": settings.model_dump(mode="json")}, note)
    note.flush()


def running_here(limits: ServeSettings) -> dict[str, Any] | None:
    """The process, the Ray and the settings of an endpoint of ours on the same port; None if there is none."""
    note = note_of(limits)
    try:
        with note.open() as file:
            if os.fstat(file.fileno()).st_uid != os.getuid() or not is_locked(file):
                return None
            said: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    return said


def is_locked(file: TextIO) -> bool:
    """Whether another process holds a lock on `file`."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def note_of(limits: ServeSettings) -> Path:
    """Where `noted` writes."""
    return Path(tempfile.gettempdir(), f"motor-ray-served-{os.getuid()}-{limits.port}.json")


def require_port(limits: ServeSettings) -> None:
    """Raises RunError if somebody else listens where we are to."""
    with socket.socket(socket.AF_INET6 if ":" in limits.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((limits.host, limits.port))
        except OSError as error:
            raise RunError(
                f"{limits.host}:{limits.port}: cannot listen here ({error.strerror}); give --port another one, or stop "
                "who has it (after a kill -9 of motor-ray serve that is a process called haproxy)"
            ) from None


def metrics_url() -> str:
    """Where Prometheus reads the figures of this node."""
    (node,) = alive()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def url(limits: ServeSettings) -> str:
    """Where the endpoint is."""
    host = f"[{limits.host}]" if ":" in limits.host else limits.host
    return f"http{'s' if limits.ssl_certfile else ''}://{host}:{limits.port}"
