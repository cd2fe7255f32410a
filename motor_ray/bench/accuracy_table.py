"""The accuracy benchmark's results as a table: means over seeds, what they say about what was asked."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from motor_ray.bench.accuracy_rows import ROWS, Role
from motor_ray.bench.accuracy_scores import ALARMS
from motor_ray.bench.verdict import Wanted, judge
from motor_ray.distributed.ablation import Estimate, estimate

Result = Mapping[str, Any]
"""A result.json."""

SCORES = {
    "mAP@0.5": "mAP@0.5",
    "mAP@0.7": "mAP@0.7",
    "mAP@0.9": "mAP@0.9",
    "f2": "F2",
    "f2_unseen_spacings": "F2, unseen spacings",
    "precision": "P",
    "recall": "R",
    "localisation_error_angstrom": "error, Å",
    ALARMS: "false positives",
}
"""Scores of a result, and what the table calls them."""

DECIMALS = {"localisation_error_angstrom": 0, ALARMS: 2}

LEAST_NOISE = 0.001
"""Seeds that agree by chance make no difference endless."""

SINGLE: tuple[Role, ...] = ("seed", "single", "light")

WANTED: Wanted = {
    "single_over_peers_f2": (
        ">=",
        1.0,
        "best single model's F2 less the best peer's, in deviations over seeds",
    ),
    "single_over_peers_map": (">=", 1.0, "the same of mAP@0.5"),
    "ensemble_gain": (">=", 0.02, "best ensemble's F2 over the best single model's, as a share of it"),
    "light_f2": (">=", 0.0, "light model's F2 less that of the seed's model with its own backbone, a ResNet-101"),
    "light_time": ("<=", 0.25, "light model's time per slice over that of the same"),
    "false_positives": ("<=", 0.05, "per motor-free tomogram at recall 0.9, of ours with the fewest there"),
}


class Line(NamedTuple):
    """A row of the table."""

    name: str
    results: Mapping[int, Result]
    """By seed."""

    milliseconds: float | None

    @property
    def role(self) -> Role:
        """What kind of contestant it is."""
        return ROWS[self.name].role

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return sorted(self.results)

    def score(self, name: str) -> Estimate | None:
        """Mean and deviation over seeds; a score that is not defined for a seed is left out.

        But false alarms at a recall that one seed does not reach are not defined for the row, or it would pass for
        better.
        """
        values = [result["scores"][name] for result in self.results.values()]
        return None if name == ALARMS and None in values else estimate(values)

    def rank(self) -> float:
        """What the best of our rows is chosen by: mAP@0.5 on calibration tomograms, as training chooses epochs.

        The test has no say in it.
        """
        one = estimate(result["calibration"]["mAP@0.5"] for result in self.results.values())
        return one.mean if one else 0.0

    def fewest_alarms(self) -> tuple[float, float]:
        """By which the one with the fewest false positives is chosen: those on calibration tomograms, then `rank`.

        Scores by a head that re-scores are there those of heads that did not know the tomogram.
        """
        counts = [result["calibration"][ALARMS] for result in self.results.values()]
        one = None if None in counts else estimate(counts)
        return (-one.mean if one else -math.inf, self.rank())

    def over(self, seeds: Iterable[int]) -> "Line":
        """Of these seeds alone."""
        return self._replace(results={seed: self.results[seed] for seed in seeds})

    def any_result(self) -> Result:
        """For what is the same with all seeds."""
        return next(iter(self.results.values()))


def lines_of(results: Sequence[Result], milliseconds: Mapping[str, float]) -> list[Line]:
    """A line for each row that has results, in the order of ROWS."""
    return [
        Line(name, own, milliseconds.get(name))
        for name in ROWS
        if (own := {result["seed"]: result for result in results if result["row"] == name})
    ]


def markdown(lines: Sequence[Line]) -> str:
    """The table for people, best read as it is; it says that the data are simulated."""
    seed = next((line.milliseconds for line in lines if line.name == "seed"), None)
    columns = ["detector", *SCORES.values(), "ms / slice", "× seed's", "parameters", "images", "seeds"]
    rows = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    rows += [f"| {' | '.join(cells_of(line, seed))} |" for line in lines]
    return "\n".join([*rows, "", *NOTES]) + "\n"


NOTES = (
    "Simulated tomograms. Mean ± standard deviation over seeds; all learned the same slices, for as long, from random "
    "weights. But those with a self-supervised start or pseudo-labels also saw tomograms without labels, one learned "
    "for twice as long, and re-scoring learned from the calibration tomograms.",
    "mAP on the test's slices that show a motor and as many that clearly show none, of those looked at. F2, P and R "
    "on whole tomograms, by the official metric, at the threshold that was best on calibration tomograms. False "
    "positives: motors found in each motor-free tomogram at the threshold with recall 0.9, if every seed gets there. "
    "Images: frames that training went through, those of all models that answer. Time: one thread, in turn in one "
    "process, as when it was scored: ours as detection runs them, YOLO fused; where the CPU has bfloat16 all but YOLO "
    "compute in it.",
)


def cells_of(line: Line, seed_milliseconds: float | None) -> list[str]:
    """A line's cells."""
    spent, ratio = line.milliseconds, times(line.milliseconds, seed_milliseconds)
    return [
        ROWS[line.name].title,
        *(cell(line.score(name), DECIMALS.get(name, 3)) for name in SCORES),
        "-" if spent is None else f"{spent:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{line.any_result()['parameters'] / 1e6:.1f} M",
        f"{line.any_result()['training_images']:,}",
        str(len(line.seeds)),
    ]


def cell(one: Estimate | None, decimals: int) -> str:
    """A mean and its deviation; a dash if there is none."""
    if one is None:
        return "-"
    deviation = "" if one.deviation is None else f" ± {one.deviation:.{decimals}f}"
    return f"{one.mean:.{decimals}f}{deviation}"


def requirements(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """What is asked, as far as the rows that are done say something about it; what cannot be told is not met.

    Rows are compared over the seeds that both have, and with peers only if all peers are done.
    """
    single, ensemble = best(lines, SINGLE), best(lines, ("ensemble",))
    seed, light = (next((line for line in lines if line.name == name), None) for name in ("seed-101", "light"))
    peers = [line for line in lines if line.role == "peer"]
    said: dict[str, Said] = {}
    if single and len(peers) == sum(row.role == "peer" for row in ROWS.values()):
        said["single_over_peers_f2"] = over_peers(single, peers, "f2")
        said["single_over_peers_map"] = over_peers(single, peers, "mAP@0.5")
    if single and ensemble:
        said["ensemble_gain"] = compare(ensemble, single, lambda one, other: one / other - 1 if other else None)
    if seed and light:
        said["light_f2"] = compare(light, seed, lambda one, other: one - other)
        said["light_time"] = Said(times(light.milliseconds, seed.milliseconds), said["light_f2"].of)
    if ours := max((line for line in lines if line.role != "peer"), key=Line.fewest_alarms, default=None):
        alarms = ours.score(ALARMS)
        said["false_positives"] = Said(alarms.mean if alarms else None, named(ours))
    return {name: verdict(name, one) for name, one in said.items()}


class Said(NamedTuple):
    """A figure, None if it is not defined, and of whom."""

    figure: float | None
    of: str


def verdict(name: str, said: Said) -> dict[str, Any]:
    """Whether a figure is as wanted; one that is not defined is not."""
    if said.figure is not None:
        return judge({name: said.figure}, WANTED)[name] | {"of": said.of}
    relation, limit, meaning = WANTED[name]
    return {"figure": None, "wanted": f"{relation} {limit:g}", "ok": False, "meaning": meaning, "of": said.of}


def best(lines: Iterable[Line], roles: Sequence[Role]) -> Line | None:
    """Of the lines with these roles the one of the highest rank; of equals the first one."""
    return max((line for line in lines if line.role in roles), key=Line.rank, default=None)


def over_peers(single: Line, peers: Sequence[Line], score: str) -> Said:
    """By how many deviations over seeds, the larger of the two, a line is above the best peer; None for one seed."""
    seeds = set(single.seeds).intersection(*(peer.seeds for peer in peers))
    if len(seeds) < 2:
        return Said(None, f"{named(single)}: fewer than two seeds of it and of all peers")
    single, *peers = (line.over(seeds) for line in (single, *peers))
    peer = max(peers, key=lambda line: mean(line, score))
    deviations = [one.deviation for line in (single, peer) if (one := line.score(score)) and one.deviation is not None]
    noise = max([LEAST_NOISE, *deviations])
    return Said((mean(single, score) - mean(peer, score)) / noise, f"{named(single)} and {named(peer)}")


def compare(one: Line, other: Line, how: Callable[[float, float], float | None]) -> Said:
    """What `how` says of the F2 of two lines over the seeds of both."""
    seeds = set(one.seeds) & set(other.seeds)
    if not seeds:
        return Said(None, f"{named(one)} and {named(other)}: no seed of both")
    one, other = one.over(seeds), other.over(seeds)
    return Said(how(mean(one, "f2"), mean(other, "f2")), f"{named(one)} and {named(other)}")


def named(line: Line) -> str:
    """For people."""
    return f"{ROWS[line.name].title} (seeds {', '.join(map(str, line.seeds))})"


def times(one: float | None, other: float | None) -> float | None:
    """How many times the other one is; None if either is not known."""
    return one / other if one is not None and other else None


def mean(line: Line, score: str) -> float:
    """Of a score over seeds; 0 where it is not defined."""
    one = line.score(score)
    return one.mean if one else 0.0


def as_json(line: Line) -> dict[str, Any]:
    """A line for programs."""
    scores = {name: line.score(name) for name in SCORES}
    return {
        "name": line.name,
        "seeds": line.seeds,
        "scores": {name: one and one._asdict() for name, one in scores.items()},
        "calibration": {"mAP@0.5": line.rank()},
        "milliseconds": line.milliseconds,
        "parameters": line.any_result()["parameters"],
        "training_images": line.any_result()["training_images"],
    }
