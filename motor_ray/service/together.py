"""Several things at once."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_none(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of `asked` return; the first that raises ends the others, and is raised itself."""
    tasks = [asyncio.create_task(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
