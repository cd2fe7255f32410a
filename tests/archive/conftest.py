from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture
def memory() -> Iterator[str]:
    """A URI of an empty folder that is on no disk."""
    files = fsspec.filesystem("memory")
    files.makedirs("/bucket")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)
