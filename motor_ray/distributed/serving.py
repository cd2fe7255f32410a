"""The endpoint on Ray Serve.

    HTTP -> Ingress (FastAPI; checks) -> Detector (decodes, batches, looks) -> JSON
    tomograms:  Ingress -> storage -> Tomograms (one; slab by slab) -> Detector -> storage -> Ingress

Everything comes from one ServiceSettings, whether `motor-ray serve` starts it or `serve deploy` reads it from a file.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from motor_ray import errors
from motor_ray.config import Augmentation, RunSettings, checked, settings_from
from motor_ray.detector.description import describe_models
from motor_ray.distributed.batches import Batches
from motor_ray.distributed.cluster import gpus
from motor_ray.distributed.detect import settings_of_model
from motor_ray.distributed.learned import calibration_of
from motor_ray.distributed.serve_environment import variables
from motor_ray.errors import BusyError, ConfigError, MotorRayError, OutageError
from motor_ray.machine import cores
from motor_ray.service.backend import Ask, ModelCard, Picture
from motor_ray.service.jobs import Jobs
from motor_ray.service.keys import needed_keys
from motor_ray.service.settings import DEFAULT_MODEL, ServeSettings, ServiceSettings, checkpoints_of

APP = "motor_ray"
"""The application's name within Ray Serve."""

MODELS_PER_DETECTOR = 3
"""Models that a detector keeps in memory; the one unused for longest makes room."""

TRIES = 4
"""Detectors that a request is put to, if they die of something while they have it."""

PREPARERS = 4
"""Images that a detector decodes at a time."""

CONNECTIONS = 4096
"""Requests that an ingress has at a time, as many as HAProxy lets in. What they hold in memory is limited otherwise."""

LOOK_BACK_SECONDS = 15.0
"""Load is averaged over so long; Serve counts it every 10 s, and wants it to be longer than that."""

REFUSED = "refused"
"""Key of an answer that is an error of ours, for exceptions lose their kind on their way through Ray."""

Handle = DeploymentHandle[Any]

log = logging.getLogger(__name__)


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
        _log_as_serve()
        self.default = self.device.submit(self._load, DEFAULT_MODEL).result()

    async def picture(self, image: bytes, spacing: float | None, tta: Augmentation | None = None) -> dict[str, Any]:
        """What is found on an image file."""
        return await _told(self._picture(image, spacing, tta))

    async def slab(self, plan: dict[str, Any]) -> dict[str, Any]:
        """What is found on the slices of a PLAN row: a SLABS row, and the model's hash."""
        return await _told(self._slab(plan))

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


async def _told(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """An answer, or in its place the error of ours that it ended with."""
    try:
        return await answer
    except MotorRayError as error:
        return {REFUSED: [type(error).__name__, str(error)]}


class Ingress:
    """Takes requests from HTTP."""

    def __init__(
        self,
        settings: dict[str, Any],
        cards: dict[str, list[Any]],
        detector: Handle,
        tomograms: Handle,
    ) -> None:
        self.settings = ServiceSettings.model_validate(settings)
        self.cards = {name: ModelCard(*card) for name, card in cards.items()}
        most = asked_at_once(self.settings.serve)
        self.detectors = Detectors(detector, tomograms, several=len(cards) > 1, most=most)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve calls with each request."""
        from motor_ray.service.app import create_app

        _log_as_serve()
        check_environment(self.settings.serve)
        jobs = Jobs(str(self.settings.serve.storage), self.settings.archive)
        # Here again, because the environment of a cluster's nodes need not be that of whoever deploys.
        keys = needed_keys(self.settings.serve)
        return create_app(self.detectors, self.cards, self.settings, keys, jobs, IngressMeter(), tells_id=False)


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


class Tomograms:
    """Looks at whole tomograms; there is one of it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: dict[str, Any], cards: dict[str, list[Any]], detector: Handle
    ) -> None:
        from motor_ray.distributed.tomograms import TomogramDesk

        _log_as_serve()
        service = ServiceSettings.model_validate(settings)
        jobs = Jobs(str(service.serve.storage), service.archive)
        models = {name: settings_from(ModelCard(*card).settings) for name, card in cards.items()}
        self.asking = Asking(detector, several=len(cards) > 1, most=asked_at_once(service.serve))
        self.desk = TomogramDesk(jobs, self._ask, models, service.serve)
        self.work = asyncio.create_task(self.desk.run())

    async def _ask(self, plan: Mapping[str, Any], model: str) -> Mapping[str, Any]:
        while True:
            try:
                return await self.asking("slab", model, dict(plan))
            except BusyError:
                await asyncio.sleep(0.5)

    async def wake(self) -> None:
        """There is a new tomogram in the queue."""
        self.desk.bell.set()

    def check_health(self) -> None:
        """Raises what ended the work, so that Ray Serve starts it anew."""
        if self.work.done():
            self.work.result()


def check_environment(limits: ServeSettings) -> None:
    """Raises ConfigError if https was asked for where it would not come about; warns of what was not set for Ray."""
    if limits.ssl_certfile and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ConfigError("serve.ssl_certfile: HAProxy cannot do https; start Ray without RAY_SERVE_ENABLE_HA_PROXY")
    missing = [f"{name}={value}" for name, value in variables(limits).items() if os.environ.get(name) != value]
    if missing:
        log.warning("Ray was started without %s: large bodies may pile up in memory", ", ".join(missing))


def _log_as_serve() -> None:
    """Our messages go where Ray Serve's go, in its format; it takes those of its own loggers only."""
    ours = logging.getLogger("motor_ray")
    ours.parent = logging.getLogger("ray.serve")
    ours.setLevel(logging.INFO)


class IngressMeter:
    """Figures of requests, for Prometheus."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        bounds = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60]
        self.requests = Counter("motor_ray_requests", "Requests answered", ("route", "status"))
        self.latency = Histogram("motor_ray_request_seconds", "Seconds a request took", bounds, ("route",))
        self.found = Counter("motor_ray_detections", "Motors found on images")

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self.requests.inc(1, {"route": route, "status": str(status)})
        self.latency.observe(max(seconds, 1e-9), {"route": route})

    def detections(self, number: int) -> None:
        """So many motors were found on an image."""
        if number:
            self.found.inc(number)


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


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application for ``serve deploy``: `arguments` are a ServiceSettings, in which every name is checked."""
    return application(checked(ServiceSettings, arguments, "args"))


def application(settings: ServiceSettings, detector_class: type[Detector] = Detector) -> serve.Application:
    """The deployments; `detector_class` may have another device."""
    limits = settings.serve
    if limits.storage is None:
        raise ConfigError("serve.storage: a cluster needs a folder or s3:// prefix that all its nodes reach; give one")
    values, cards = settings.model_dump(mode="json"), model_cards(settings)
    surge = 100 if limits.replace == "after" else 0
    cpus, share = detector_resources(settings)
    detector = deployment(
        detector_class,
        settings,
        max_surge_percent=surge,
        ray_actor_options={"num_cpus": cpus, "num_gpus": share},
        # All that `Asking` lets in goes to a detector at once. What a detector does not take waits in Serve's router,
        # which then may hand out two requests each half second, however idle the detector is (seen with Ray 2.60).
        max_ongoing_requests=(limits.ingresses + 1) * asked_at_once(limits),
        autoscaling_config=autoscaling(limits),
        health_check_period_s=5,
    ).bind(values, cards)
    # A new one would take up what the old one is still at.
    tomograms = deployment(Tomograms, settings, ray_actor_options={"num_cpus": 0}).bind(values, cards, detector)
    ingress = deployment(
        serve.ingress()(Ingress),
        settings,
        max_surge_percent=surge,
        num_replicas=limits.ingresses,
        ray_actor_options={"num_cpus": 0 if limits.ingresses == 1 else 1},
        max_ongoing_requests=CONNECTIONS,
    )
    return ingress.bind(values, cards, detector, tomograms)


def deployment(replica: type, settings: ServiceSettings, **options: Any) -> serve.Deployment:
    """A deployment of the class `replica`, called after it."""
    decorate: Callable[[type], serve.Deployment] = serve.deployment(
        name=replica.__name__.removeprefix("ASGI"),
        graceful_shutdown_timeout_s=settings.serve.drain_seconds,
        **options,
    )
    return decorate(replica)


def asked_at_once(limits: ServeSettings) -> int:
    """Questions that an ingress has put to detectors at a time: those they work on or prepare, and the queue."""
    return limits.queue + 2 * limits.batch_images * limits.max_detectors


def autoscaling(limits: ServeSettings) -> AutoscalingConfig:
    """How many detectors there are."""
    return AutoscalingConfig(
        min_replicas=limits.min_detectors,
        initial_replicas=max(limits.min_detectors, 1),
        max_replicas=limits.max_detectors,
        target_ongoing_requests=max(limits.batch_images / 2, 1),
        upscale_delay_s=limits.upscale_seconds,
        downscale_delay_s=limits.downscale_seconds,
        look_back_period_s=LOOK_BACK_SECONDS,
    )


def detector_resources(settings: ServiceSettings) -> tuple[int, float]:
    """CPUs and GPUs of a detector."""
    limits = settings.serve
    share = limits.detector_gpus if limits.detector_gpus is not None else float(min(gpus(), 1))
    return limits.detector_cpus or (4 if share else cores()), share


def model_cards(settings: ServiceSettings) -> dict[str, list[Any]]:
    """What is to be known of each model, as lists, which are the same to every reader of JSON.

    Raises ConfigError if there is no default one, CheckpointError if one is not there or damaged, or several cannot
    answer together.
    """
    models = settings.serve.models
    # Which are for re-scoring, and nobody does that here.
    detect = settings.detect.model_copy(update={"features": False})
    if DEFAULT_MODEL not in models:
        raise ConfigError(f"serve.models: there is none called {DEFAULT_MODEL!r}; give --model CHECKPOINT")
    cards = {}
    for name, uris in models.items():
        there = describe_models(checkpoints_of(uris))
        asked = RunSettings(archive=settings.archive, detect=detect, link=settings.link)
        trained = settings_of_model(there.settings, asked)
        learned = calibration_of(there, trained)
        if learned:
            evaluate = trained.evaluate.model_copy(update={"threshold": learned.threshold})
            trained = trained.model_copy(update={"evaluate": evaluate})
        cards[name] = [there.uris, there.sha256, trained.model_dump(mode="json"), there.metrics, there.told()]
    return cards
