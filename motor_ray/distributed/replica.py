"""A detector of the endpoint: one of the processes that Ray Serve starts and ends as there is work."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from motor_ray.config import Augmentation
from motor_ray.config_values import settings_from
from motor_ray.distributed.asking import REFUSED
from motor_ray.distributed.batches import Batches
from motor_ray.distributed.serve_environment import log_as_serve
from motor_ray.errors import MotorRayError, OutageError
from motor_ray.machine import cores
from motor_ray.service.backend import ModelCard
from motor_ray.service.settings import DEFAULT_MODEL, ServiceSettings

MODELS_PER_DETECTOR = 3
"""Models that a detector keeps in memory; the one unused for longest makes room."""

PREPARERS = 4
"""Images that a detector decodes at a time."""


class Detector:
    """Holds models, and looks at images and slabs with them."""

    def __init__(self, settings: dict[str, Any], cards: dict[str, list[Any]]) -> None:
        self.settings = ServiceSettings.model_validate(settings)
        self.cards = {name: ModelCard(*card) for name, card in cards.items()}
        self.device = ThreadPoolExecutor(1)  # torch keeps much of its state by thread
        self.preparers = ThreadPoolExecutor(PREPARERS)
        limits = self.settings.serve
        self.look = Batches(self._look, limits.batch_images, limits.batch_wait_seconds)
        self.meter = DetectorMeter()
        log_as_serve()
        self.default = self.device.submit(self._load, DEFAULT_MODEL).result()

    async def picture(self, image: bytes, spacing: float | None, tta: Augmentation | None = None) -> dict[str, Any]:
        """What is found on an image file."""
        return await answer_or_refusal(self._picture(image, spacing, tta))

    async def slab(self, plan: dict[str, Any]) -> dict[str, Any]:
        """What is found on the slices of a PLAN row: a SLABS row, and the model's hash."""
        return await answer_or_refusal(self._slab(plan))

    async def _picture(self, image: bytes, spacing: float | None, tta: Augmentation | None) -> dict[str, Any]:
        from motor_ray.distributed.answering import picture_of

        model = await self._model()
        most = self.settings.serve.image_pixels
        prepared = await self._prepare(model.prepare_picture, image, spacing, most, tta)
        return picture_of(prepared, await self.look(model, prepared), model.sha256)

    async def _slab(self, plan: dict[str, Any]) -> dict[str, Any]:
        model = await self._model()
        prepared = await self._prepare(model.prepare_slab, plan)
        answer = await self.look(model, prepared)
        own = {"slab_id": plan["slab_id"], "tomo_id": plan["tomo_id"], "model": model.sha256[:12]}
        return own | {"slices": answer.slices}

    async def _prepare(self, prepare: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.preparers, prepare, *arguments)

    async def _model(self) -> Any:
        name = serve.get_multiplexed_model_id()
        return await self.load(name) if name and name != DEFAULT_MODEL else self.default

    @serve.multiplexed(  # type: ignore[untyped-decorator]
        max_num_models_per_replica=MODELS_PER_DETECTOR
    )
    async def load(self, name: str) -> Any:
        """The model of that name."""
        return await asyncio.get_running_loop().run_in_executor(self.device, self._load, name)

    async def _look(self, model: Any, prepared: Sequence[Any]) -> list[Any]:
        """Answers to what requests that wait together have prepared for the model."""
        answers: list[Any] = await asyncio.get_running_loop().run_in_executor(self.device, model.look, prepared)
        self.meter.batch(answers)
        return answers

    def _load(self, name: str) -> Any:
        # Not at the top: it would have every process of the endpoint import torch.
        from motor_ray.distributed.answering import Answerer

        if name not in self.cards:  # while the endpoint changes over to other models
            raise OutageError(f"This detector does not have the model {name!r} yet")
        card = self.cards[name]
        threads = self.settings.serve.detector_cpus or cores()
        answerer = Answerer(card.uris, card.sha256, settings_from(card.settings), threads=threads)
        answerer.warm_up()
        return answerer


async def answer_or_refusal(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """An answer, or in its place the error of ours that it ended with."""
    try:
        return await answer
    except MotorRayError as error:
        return {REFUSED: [type(error).__name__, str(error)]}


class DetectorMeter:
    """Figures of detectors, for Prometheus."""

    def __init__(self) -> None:
        from ray.util.metrics import Histogram

        bounds = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
        self.sizes = Histogram("motor_ray_batch_requests", "Requests looked at together", [1, 2, 4, 8, 16, 32, 64])
        self.parts = {
            part: Histogram(f"motor_ray_{part}_seconds", f"Seconds of a request's part: {part}", bounds)
            for part in ("prepare", "queue", "model")
        }

    def batch(self, answers: Any) -> None:
        """These answers came of one batch."""
        answers = list(answers)
        self.sizes.observe(len(answers))
        for part, histogram in self.parts.items():
            for answer in answers:
                histogram.observe(max(answer.seconds[part], 1e-9))
