"""Measuring on a machine that also does other things; what is measured is not known here."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision

from motor_ray import __version__


def time_in_turn(contestants: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of `runs` calls of each contestant. They take turns, so that a slow spell strikes all alike.

    A first call of each, which may compile or allocate, is not counted.
    """
    for call in contestants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, call in contestants.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "motor_ray": __version__,
    }
