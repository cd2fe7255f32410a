"""Where the endpoint's benchmark takes place: endpoints with models of its own, and slices whose answers are known."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from motor_ray.bench.load import Picture
from motor_ray.bench.served import Served, served
from motor_ray.bench.slices import jpeg_slices
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_from
from motor_ray.detector.checkpoint import save_checkpoint
from motor_ray.detector.model import build_model
from motor_ray.distributed.answering import Answerer, picture_of
from motor_ray.machine import cores
from motor_ray.service.settings import DEFAULT_MODEL, ServeSettings, ServiceSettings


class Sizes(NamedTuple):
    """How much is measured."""

    backbone: str = "resnet101"
    frame: int = 720
    """The recipe's, for the parts latency, throughput and device."""

    shape: tuple[int, int] = (960, 928)
    """Of a slice, y, x: the commonest of the public data."""

    jpeg_bytes: int = 200_000
    clients: int = 16
    requests: int = 30
    """For the part latency."""

    images: int = 64
    rounds: int = 2
    """For the part throughput: how many images a round, and how often both take turns."""

    device_seconds: float = 0.01
    device_images: int = 1500
    small_frame: int = 64
    small_shape: tuple[int, int] = (128, 128)
    """For the parts overload and kill, so that what is short is the device."""

    overload: float = 4.0
    overload_seconds: float = 60.0
    kills: int = 10
    detectors: int = 2
    kill_clients: int = 8
    upload_shape: tuple[int, int, int] = (512, 2048, 1024)
    """Voxels of 16 bits."""


USUAL = Sizes()


class Stand(NamedTuple):
    """Where a bench takes place."""

    folder: Path
    sizes: Sizes
    numbers: "count[int]"

    def new_folder(self) -> Path:
        """One that nobody else has."""
        folder = self.folder / f"{next(self.numbers)}"
        folder.mkdir()
        return folder

    @contextmanager
    def real(self) -> Iterator[tuple[Served, Answerer, list[Picture]]]:
        """The recipe's model behind an endpoint, the same in this process, and slices. Random weights take as long."""
        folder, settings = self.new_folder(), run_settings(self.sizes.backbone, self.sizes.frame)
        sha256 = save_checkpoint(folder / "model", build_model(settings.model), settings, {})
        service = service_settings(folder, max_detectors=1)
        direct = Answerer(str(folder / "model"), sha256, settings, threads=cores())
        direct.warm_up()
        data, _ = jpeg_slices(self.sizes.clients, self.sizes.shape, self.sizes.jpeg_bytes)
        with served(service, folder, stand_in=False) as endpoint:
            yield endpoint, direct, [Picture(one, None) for one in data]

    @contextmanager
    def stand_in(self, frame: int, shape: tuple[int, int], jpeg_bytes: int, detectors: int = 1) -> Iterator["Unreal"]:
        """A stand-in for the device behind an endpoint, and slices of which the answers are known."""
        from motor_ray.bench.serve_device import READY, SECONDS, StandInAnswerer

        folder, settings = self.new_folder(), run_settings("resnet18", frame)
        ready = folder / "ready"
        ready.mkdir()
        metrics = {SECONDS: self.sizes.device_seconds, READY: str(ready)}
        sha256 = save_checkpoint(folder / "model", build_model(settings.model), settings, metrics)
        service = service_settings(folder, min_detectors=detectors, max_detectors=detectors, detector_cpus=1)
        direct = StandInAnswerer(sha256, settings, 0.0)
        data, _ = jpeg_slices(self.sizes.clients, shape, jpeg_bytes)
        pictures = [Picture(one, direct_answer(direct, one)) for one in data]
        with served(service, folder, stand_in=True) as endpoint:
            yield Unreal(endpoint, pictures, service.serve, ready)


class Unreal(NamedTuple):
    """An endpoint with a stand-in for the device."""

    endpoint: Served
    pictures: list[Picture]
    limits: ServeSettings
    ready: Path
    """Folder of `ready_here`."""


def run_settings(backbone: str, frame: int) -> RunSettings:
    """The recipe's, but for the size of its network and of its frames."""
    return settings_from({"frame": {"size": frame}, "model": {"backbone": backbone, "pretrained": "none"}})


def service_settings(folder: Path, **serve: Any) -> ServiceSettings:
    """The endpoint's usual ones for the model in `folder`, but for those given."""
    return ServiceSettings.model_validate({"serve": {"models": {DEFAULT_MODEL: str(folder / "model")}, **serve}})


def direct_answer(direct: Answerer, data: bytes) -> dict[str, Any]:
    """What the endpoint is to answer, without ``seconds``."""
    prepared = direct.prepare_picture(data, None, ServeSettings().image_pixels)
    answer = picture_of(prepared, direct.look([prepared])[0], direct.sha256)
    del answer["seconds"]
    said: dict[str, Any] = json.loads(json.dumps(answer))
    return said


def write_sparse(path: Path, shape: tuple[int, int, int]) -> int:
    """An MRC file of empty voxels of 16 bits that takes no room on the disk; returns its bytes."""
    import mrcfile

    with mrcfile.new(path) as file:
        file.set_data(np.zeros((1, *shape[1:]), np.int16))
        file.header.nz = file.header.mz = shape[0]
        file.voxel_size = 10.0
    size = 1024 + 2 * int(np.prod(shape))
    os.truncate(path, size)
    return size
