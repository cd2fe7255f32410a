"""Puts what waits for a device through it together."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, NamedTuple

Work = Callable[[Any, Sequence[Any]], Awaitable[Sequence[Any]]]
"""What is to be done with several items of a kind: as many results, in their order."""


class Waiting(NamedTuple):
    """An item, and who wants its result."""

    kind: Hashable
    item: Any
    result: "asyncio.Future[Any]"


class Batches:
    """Collects items while the device is busy; when it is free, all of a kind go together, up to `most`.

    Ray Serve closes its batches before their turn comes: those that do not wait for more are of one item, however many
    stand in line.
    """

    def __init__(self, work: Work, most: int, wait_seconds: float = 0.0) -> None:
        self.work, self.most, self.wait_seconds = work, most, wait_seconds
        self.line: list[Waiting] = []
        self.worker: asyncio.Task[None] | None = None

    async def __call__(self, kind: Hashable, item: Any) -> Any:
        """The result of an item. Raises what the work on its batch raises."""
        waiting = Waiting(kind, item, asyncio.get_running_loop().create_future())
        self.line.append(waiting)
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await waiting.result

    async def _work(self) -> None:
        while self.line:
            if self.wait_seconds and len(self.line) < self.most:
                await asyncio.sleep(self.wait_seconds)
            batch = self._next()
            if not batch:
                continue
            try:
                answers = await self.work(batch[0].kind, [one.item for one in batch])
            except Exception as error:  # whatever it is, it is theirs who wait
                for one in batch:
                    if not one.result.done():
                        one.result.set_exception(error)
                continue
            for one, answer in zip(batch, answers, strict=True):
                if not one.result.done():
                    one.result.set_result(answer)

    def _next(self) -> list[Waiting]:
        """Those of the first one's kind, without what nobody waits for any more; out of the line."""
        self.line = [one for one in self.line if not one.result.done()]
        batch = [one for one in self.line if one.kind is self.line[0].kind][: self.most]
        taken = {id(one) for one in batch}
        self.line = [one for one in self.line if id(one) not in taken]
        return batch
