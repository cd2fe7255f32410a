"""Whether what was measured meets what is asked, of detection where nothing else is said."""

from collections.abc import Iterable, Mapping
from typing import Any

from motor_ray.bench.memory import Peaks

Wanted = Mapping[str, tuple[str, float, str]]
"""Of each figure: the relation and the limit that are asked, and what it is."""

WANTED: Wanted = {
    "device_share": (">=", 0.98, "slices/s in steady state, of what a device of 10 ms a slice can take"),
    "first_result_seconds": ("<=", 8.0, "from the start of the process, Python's and Ray's own included, to a score"),
    "slices_per_second": (">=", 230.0, "in steady state with a device that takes no time, the S3 server on its cores"),
    "times_as_fast_as_daft": (">=", 1.0, "the same, over Daft's in the same run"),
    "memory_growth": ("<=", 0.10, "of the peak of the driver or an actor with ten times the tomograms"),
    "row_megabytes": ("<=", 10.0, "the heaviest row in the object store"),
    "time_per_slice_growth": ("<=", 0.05, "in steady state with ten times the tomograms"),
    "model_share": (">=", 0.90, "slices/s of the real model in steady state, of those on frames in memory"),
}
"""What is asked of detection; growth is a share of the smaller archive's."""

JUDGED = ("driver", "LoadSlab", "StandIn")
"""Processes whose memory must not grow with the archive."""


def judge(figures: Mapping[str, float], wanted: Wanted = WANTED) -> dict[str, dict[str, Any]]:
    """Each figure, what is wanted of it, whether it is so, and what it says."""
    judged = {}
    for name, (relation, limit, meaning) in wanted.items():
        if name in figures:
            figure = figures[name]
            is_met = figure >= limit if relation == ">=" else figure <= limit
            asked = f"{relation} {limit:g}"
            judged[name] = {"figure": round(figure, 4), "wanted": asked, "ok": is_met, "meaning": meaning}
    return judged


def memory_growth(few: Mapping[str, float], many: Mapping[str, float]) -> float:
    """By what share the peak of the driver, or of an actor, is higher with many tomograms; of that which grew most."""
    return max(many[name] / few[name] for name in JUDGED) - 1


def highest(peaks: Iterable[Mapping[str, float]]) -> Peaks:
    """The highest peak of each name."""
    most: Peaks = {}
    for one in peaks:
        most = {name: max(most.get(name, 0.0), one.get(name, 0.0)) for name in {**most, **one}}
    return most


def rounded(peaks: Peaks) -> Peaks:
    """In whole megabytes."""
    return {name: round(megabytes) for name, megabytes in sorted(peaks.items())}
