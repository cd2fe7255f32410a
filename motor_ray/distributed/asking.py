"""Questions to the endpoint's detectors, and how errors of ours come back from them."""

import asyncio
import logging
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from motor_ray import errors
from motor_ray.errors import BusyError, OutageError
from motor_ray.service.backend import Ask, Picture

TRIES = 4
"""Detectors that a request is put to, if they die of something while they have it."""

REFUSED = "refused"
"""Key of an answer that is an error of ours, for exceptions lose their kind on their way through Ray."""

Handle = DeploymentHandle[Any]

log = logging.getLogger(__name__)


class Detectors:
    """The Backend of the web application: detectors wherever Ray Serve runs them."""

    def __init__(self, detector: Handle, tomograms: Handle, *, several: bool, most: int) -> None:
        self.asking, self.tomograms = Asking(detector, several=several, most=most), tomograms

    async def look(self, image: bytes, ask: Ask) -> Picture:
        """What is found on an image file."""
        return await self.asking("picture", ask.model, image, ask.voxel_spacing_angstrom, ask.tta)

    async def wake(self) -> None:
        """Say that there is a new tomogram in the queue."""
        self.tomograms.wake.remote()

    def is_ready(self) -> bool:
        """Until a request finds no detector, for Ray Serve lets nobody in before they have started."""
        return not self.asking.lost


class Asking:
    """Puts questions to detectors: to another one if one dies, to those that have the model if there are several.

    No more than `most` at a time.
    """

    def __init__(self, detector: Handle, *, several: bool, most: int) -> None:
        self.detector, self.several, self.most, self.asked = detector, several, most, 0
        self.handles: dict[str, Handle] = {}
        self.lost = False

    async def __call__(self, method: str, model: str, *arguments: Any) -> dict[str, Any]:
        """What a detector answers. Raises BusyError, OutageError, or the error of ours that it answers with."""
        if self.asked >= self.most:
            raise BusyError("All detectors are busy, and enough images wait; try again")
        self.asked += 1
        try:
            return await self._ask(method, model, *arguments)
        finally:
            self.asked -= 1

    async def _ask(self, method: str, model: str, *arguments: Any) -> dict[str, Any]:
        handle = self._handle(model)
        for attempt in range(TRIES):
            try:
                answer: dict[str, Any] = await getattr(handle, method).remote(*arguments)
            except BackPressureError:
                raise BusyError("All detectors are busy, and enough images wait; try again") from None
            except DeploymentUnavailableError:
                self.lost = True
                raise BusyError("No detector runs now; try again later") from None
            except (RayActorError, AioRpcError) as error:  # the latter from Serve's own way to a process that is gone
                log.warning("a detector was lost at work: %s", error)
                await asyncio.sleep(0.1 * 2**attempt)
                continue
            self.lost = False
            if REFUSED in answer:
                kind, message = answer[REFUSED]
                raise getattr(errors, kind)(message)
            return answer
        self.lost = True
        raise OutageError(f"{TRIES} detectors in a row were lost while they were at it")

    def _handle(self, model: str) -> Handle:
        if model not in self.handles:
            chosen = self.detector.options(multiplexed_model_id=model) if self.several else self.detector
            self.handles[model] = chosen
        return self.handles[model]
