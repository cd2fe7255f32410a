"""What stands behind the endpoint in these tests."""

import pytest

from tests.service.stand_ins import FakeBackend


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A folder for tomograms, on a disk and in object storage."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3").folder()
