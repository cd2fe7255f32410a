"""The file from which Ray's own ``serve deploy``, or KubeRay's RayService, starts the endpoint.

Ray accepts any key in such a file, wherever it stands, and ignores those it does not know; so it is written from
checked settings, and what is in it is checked again when it is deployed.
"""

from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from motor_ray.distributed.serve_environment import variables
from motor_ray.distributed.serving import APP
from motor_ray.errors import ConfigError
from motor_ray.service.settings import ServiceSettings
from motor_ray.storage import write_bytes

BUILDER = "motor_ray.distributed.serving:build"

HEAD = """\
# The endpoint for Ray's own `serve deploy`, as `motor-ray serve ... --write-config FILE` writes it: change it there.
#
# Under `args` stand settings of `motor-ray serve`, those that are not the defaults; they are checked when it is
# deployed. Every node of the cluster needs motor_ray installed, and when Ray is started on it these variables:
#
{variables}
"""


def write_serve_file(settings: ServiceSettings, out: str) -> dict[str, Any]:
    """Write the file to `out`. Raises ConfigError, or StorageError if it cannot be written."""
    if settings.serve.storage is None:
        raise ConfigError("serve.storage: a cluster needs a folder or s3:// prefix that all its nodes reach; give one")
    write_bytes(out, serve_file(settings).encode())
    return {"config": out}


def serve_file(settings: ServiceSettings) -> str:
    """The file's text: what differs from the defaults, and no more."""
    limits = settings.serve
    secure = {"ssl_certfile": limits.ssl_certfile, "ssl_keyfile": limits.ssl_keyfile} if limits.ssl_certfile else {}
    values = {
        "proxy_location": "EveryNode",
        "http_options": {"host": limits.host, "port": limits.port, **secure},
        "logging_config": {"encoding": "JSON", "enable_access_log": False},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": settings.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }
    check_serve_file(values)
    said = "\n".join(f"#   {name}={value}" for name, value in sorted(variables(limits).items()))
    head = HEAD.format(variables=said)
    return head + yaml.safe_dump(values, sort_keys=False)


def check_serve_file(values: dict[str, Any]) -> None:
    """Raises ValueError if Ray does not know a key of these, or does not like its value."""
    known = ServeDeploySchema.model_validate(values)
    unknown = set(values) - set(type(known).model_fields)
    for one, application_ in zip(values["applications"], known.applications, strict=True):
        unknown |= set(one) - set(type(application_).model_fields)
    unknown |= set(values["http_options"]) - set(type(known.http_options).model_fields)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: unknown to Ray Serve")
