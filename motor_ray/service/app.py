"""The endpoint as a web application: what may be asked, and how. What stands behind it is a Backend.

Knows neither Ray nor torch.
"""

from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from motor_ray import __version__
from motor_ray.service.backend import Backend, Meter, ModelCard, NoMeter
from motor_ray.service.desk import TROUBLE, Desk
from motor_ray.service.jobs import Jobs
from motor_ray.service.keys import Keys
from motor_ray.service.pages import add_pages
from motor_ray.service.problems import ProblemError
from motor_ray.service.replies import Health
from motor_ray.service.settings import ServiceSettings
from motor_ray.service.slice_routes import slices_router
from motor_ray.service.tomogram_routes import tomograms_router
from motor_ray.service.watching import Watch, add_problem_handlers


def create_app(
    backend: Backend,
    cards: Mapping[str, ModelCard],
    settings: ServiceSettings,
    keys: Keys,
    jobs: Jobs | None,
    meter: Meter | None = None,
    *,
    tells_id: bool = True,
) -> FastAPI:
    """The application. `cards` are the models by name; without `jobs` no tomograms can be handed in.

    Whoever runs it may put the request's id into answers itself; then `tells_id` is false.
    """
    app = FastAPI(
        title="motor_ray",
        version=__version__,
        summary="Finds bacterial flagellar motors in cryo-electron tomograms",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    desk = Desk(backend, cards, settings, jobs, meter or NoMeter())
    add_problem_handlers(app)
    add_pages(app)
    add_health(app, backend)
    app.include_router(slices_router(desk, keys))
    app.include_router(tomograms_router(desk, keys))
    if settings.serve.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.serve.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"],
            expose_headers=["X-Request-ID", "Retry-After", "Location"],
        )
    app.add_middleware(Watch, meter=desk.meter, tells_id=tells_id)
    return app


def add_health(app: FastAPI, backend: Backend) -> None:
    """Routes for load balancers."""

    @app.get("/healthz", tags=["health"])
    async def healthz() -> Health:
        """Whether the endpoint is there."""
        return Health(status="ok")

    @app.get("/readyz", tags=["health"], responses={503: TROUBLE[503]})
    async def readyz() -> Health:
        """Whether an image would be looked at."""
        if not backend.is_ready():
            raise ProblemError(503, "The detector is starting")
        return Health(status="ready")
