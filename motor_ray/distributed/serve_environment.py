"""Around Ray Serve: environment variables, which it reads when it is imported, so this comes before; and its log."""

import logging
import os
import socket
import sys

from motor_ray.errors import ConfigError
from motor_ray.service.door import DOOR_BYTES
from motor_ray.service.settings import ServeSettings

log = logging.getLogger(__name__)


def variables(settings: ServeSettings) -> dict[str, str]:
    """For every process of a cluster that serves.

    HAProxy, which comes with Ray Serve on Linux, hands requests straight to the ingresses, without a Python process in
    between: 8 ms a request less, measured on two cores, and large bodies do not pile up. It cannot do https.
    """
    always = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(settings.image_bytes + 2**20),  # usually 4 MiB
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else a thousand lines wait to be written
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "motor_ray.service.door:doors",
    }
    if settings.ssl_certfile or sys.platform != "linux":
        # Throughput optimisation would have ingresses listen, too, with nothing in front of them.
        return always | {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", DOOR_BYTES: str(settings.bytes_in_flight)}
    return always | {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_NBTHREAD": "2"}


def set_here(settings: ServeSettings) -> None:
    """Set the variables for this process and the Ray that it will start; what the user has set stays."""
    # HAProxy's own ports are for its statistics. As long as no ingress is there it hands requests to Serve's fallback
    # proxy, whose port processes can share: with the usual one that may be another endpoint's, which would answer.
    names = ("HAPROXY_STATS", "HAPROXY_METRICS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
    ports = {f"RAY_SERVE_{name}_PORT": str(free_port()) for name in names}
    here = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}  # 30 s are for load balancers of other machines
    for name, value in (variables(settings) | ports | here).items():
        os.environ.setdefault(name, value)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_environment(limits: ServeSettings) -> None:
    """Raises ConfigError if https was asked for where it would not come about; warns of what was not set for Ray."""
    if limits.ssl_certfile and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ConfigError("serve.ssl_certfile: HAProxy cannot do https; start Ray without RAY_SERVE_ENABLE_HA_PROXY")
    missing = [f"{name}={value}" for name, value in variables(limits).items() if os.environ.get(name) != value]
    if missing:
        log.warning("Ray was started without %s: large bodies may pile up in memory", ", ".join(missing))


def log_as_serve() -> None:
    """Our messages go where Ray Serve's go, in its format; it takes those of its own loggers only."""
    ours = logging.getLogger("motor_ray")
    ours.parent = logging.getLogger("ray.serve")
    ours.setLevel(logging.INFO)
