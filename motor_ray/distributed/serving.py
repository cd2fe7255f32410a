"""The endpoint on Ray Serve.

    HTTP -> Ingress (FastAPI; checks) -> Detector (decodes, batches, looks) -> JSON
    tomograms:  Ingress -> storage -> Tomograms (one; slab by slab) -> Detector -> storage -> Ingress

Everything comes from one ServiceSettings, whether `motor-ray serve` starts it or `serve deploy` reads it from a file.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from motor_ray.config import RunSettings
from motor_ray.config_values import checked
from motor_ray.detector.description import describe_models
from motor_ray.distributed.asking import Asking, Detectors, Handle
from motor_ray.distributed.cluster import gpus
from motor_ray.distributed.detect import settings_of_model
from motor_ray.distributed.learned import learned_of
from motor_ray.distributed.replica import Detector
from motor_ray.distributed.serve_environment import check_environment, log_as_serve
from motor_ray.errors import BusyError, ConfigError
from motor_ray.machine import cores
from motor_ray.service.backend import ModelCard
from motor_ray.service.jobs import Jobs
from motor_ray.service.keys import needed_keys
from motor_ray.service.settings import DEFAULT_MODEL, ServeSettings, ServiceSettings, checkpoints_of

APP = "motor_ray"
"""The application's name within Ray Serve."""

CONNECTIONS = 4096
"""Requests that an ingress has at a time, as many as HAProxy lets in. What they hold in memory is limited otherwise."""

LOOK_BACK_SECONDS = 15.0
"""Load is averaged over so long; Serve counts it every 10 s, and wants it to be longer than that."""


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

        log_as_serve()
        check_environment(self.settings.serve)
        jobs = Jobs(str(self.settings.serve.storage), self.settings.archive)
        # Here again, because the environment of a cluster's nodes need not be that of whoever deploys.
        keys = needed_keys(self.settings.serve)
        return create_app(self.detectors, self.cards, self.settings, keys, jobs, IngressMeter(), tells_id=False)


class Tomograms:
    """Looks at whole tomograms; there is one of it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: dict[str, Any], cards: dict[str, list[Any]], detector: Handle
    ) -> None:
        from motor_ray.distributed.tomograms import TomogramDesk, served

        log_as_serve()
        service = ServiceSettings.model_validate(settings)
        jobs = Jobs(str(service.serve.storage), service.archive)
        models = {name: partial(served, ModelCard(*card)) for name, card in cards.items()}
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
    # Which are for re-scoring; a model that has learned it asks for them below.
    detect = settings.detect.model_copy(update={"features": False})
    if DEFAULT_MODEL not in models:
        raise ConfigError(f"serve.models: there is none called {DEFAULT_MODEL!r}; give --model CHECKPOINT")
    cards = {}
    for name, uris in models.items():
        there = describe_models(checkpoints_of(uris))
        asked = RunSettings(archive=settings.archive, detect=detect, link=settings.link)
        trained = settings_of_model(there.settings, asked)
        learned = learned_of(there, trained)  # its head, too, so that a damaged one is refused here
        trained = learned.settings_for(trained)
        if learned.calibration:
            evaluate = trained.evaluate.model_copy(update={"threshold": learned.calibration["threshold"]})
            trained = trained.model_copy(update={"evaluate": evaluate})
        card = ModelCard(
            there.uris,
            there.sha256,
            trained.model_dump(mode="json"),
            there.metrics,
            there.told(),
            learned.rescorer_sha256,
        )
        cards[name] = list(card)
    return cards
