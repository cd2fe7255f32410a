import asyncio
from typing import Any

import pytest

from motor_ray.distributed.batches import Batches


class Device:
    """Notes what it gets; works only when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.free = asyncio.Event()

    async def __call__(self, kind: Any, items: Any) -> list[Any]:
        self.batches.append(list(items))
        await self.free.wait()
        if "broken" in items:
            raise ValueError("broken")
        return [(kind, item) for item in items]


async def ask(batches: Batches, items: list[Any], kind: str = "a") -> list["asyncio.Task[Any]"]:
    tasks = [asyncio.create_task(batches(kind, item)) for item in items]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_what_comes_while_the_device_is_busy_goes_together():
    async def story() -> None:
        device = Device()
        batches = Batches(device, most=4)
        tasks = await ask(batches, [0])
        tasks += await ask(batches, list(range(1, 8)))
        device.free.set()
        assert await asyncio.gather(*tasks) == [("a", item) for item in range(8)]
        assert device.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]

    asyncio.run(story())


def test_kinds_do_not_mix_and_none_waits_for_ever():
    async def story() -> None:
        device = Device()
        batches = Batches(device, most=4)
        tasks = await ask(batches, [0])
        tasks += await ask(batches, [1], "b") + await ask(batches, [2, 3]) + await ask(batches, [4], "b")
        device.free.set()
        assert await asyncio.gather(*tasks) == [("a", 0), ("b", 1), ("a", 2), ("a", 3), ("b", 4)]
        assert device.batches == [[0], [1, 4], [2, 3]]

    asyncio.run(story())


def test_an_error_is_for_its_own_batch_only():
    async def story() -> None:
        device = Device()
        batches = Batches(device, most=2)
        first = await ask(batches, ["broken"])
        others = await ask(batches, [1, 2])
        device.free.set()
        with pytest.raises(ValueError, match="broken"):
            await first[0]
        assert await asyncio.gather(*others) == [("a", 1), ("a", 2)]

    asyncio.run(story())


def test_nothing_is_done_for_those_who_have_gone():
    async def story() -> None:
        device = Device()
        batches = Batches(device, most=8)
        tasks = await ask(batches, [0])
        gone, kept = await ask(batches, [1, 2])
        gone.cancel()
        await asyncio.sleep(0)
        device.free.set()
        assert await asyncio.gather(*tasks, kept) == [("a", 0), ("a", 2)]
        assert device.batches == [[0], [2]]

    asyncio.run(story())
