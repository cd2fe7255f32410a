"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from motor_ray.bench.object_store import object_server
from tests.object_store import ObjectStore

# A shared machine breaks hypothesis's deadline of 200 ms; timings belong in `motor-ray bench`. CI tries the same
# examples each time, so that it judges the change; elsewhere they are new ones.
settings.register_profile("motor_ray", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("motor_ray")

# For tensors as small as a test's, two threads on a busy machine mostly wait for each other.
torch.set_num_threads(1)

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server, to which the AWS variables of this process and of its children lead."""
    with object_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
            patch.delenv(name, raising=False)
        yield ObjectStore(server)


ON_REQUEST = {"slow", "multinode"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is run on request only unless the command line speaks of it, whatever else it chooses by."""
    said = config.option.markexpr
    left_out = [item for item in items if (marks := on_request(item)) and not any(mark in said for mark in marks)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def on_request(item: pytest.Item) -> set[str]:
    return ON_REQUEST & {mark.name for mark in item.iter_markers()}
