"""The accuracy benchmark's results as a table: means over seeds, what they say about what was asked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from motor_ray.bench.accuracy_rows import ROWS, Role
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
    "false_positives_at_recall": "false positives",
}
"""Scores of a result, and what the table calls them."""

DECIMALS = {"localisation_error_angstrom": 0, "false_positives_at_recall": 2}

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
    "false_positives": ("<=", 0.05, "per motor-free tomogram at recall 0.9, of the best single model"),
}


class Line(NamedTuple):
    """A row of the table."""

    name: str
    seeds: list[int]
    scores: dict[str, Estimate | None]
    validation_f2: Estimate | None
    """By which the best of our rows is chosen; the test has no say in it."""

    milliseconds: float | None
    parameters: int
    training_images: int

    @property
    def role(self) -> Role:
        """What kind of contestant it is."""
        return ROWS[self.name].role


def lines_of(results: Sequence[Result], milliseconds: Mapping[str, float]) -> list[Line]:
    """A line for each row that has results, in the order of ROWS."""
    return [
        line_of(name, own, milliseconds.get(name))
        for name in ROWS
        if (own := [result for result in results if result["row"] == name])
    ]


def line_of(name: str, results: Sequence[Result], milliseconds: float | None) -> Line:
    """The line of a row from the results of its seeds. A score that is not defined for a seed is left out.

    But false alarms at a recall that one seed does not reach are not defined for the row, or it would pass for better.
    """
    scores = {score: estimate(result["scores"][score] for result in results) for score in SCORES}
    if any(result["scores"]["false_positives_at_recall"] is None for result in results):
        scores["false_positives_at_recall"] = None
    return Line(
        name,
        sorted(result["seed"] for result in results),
        scores,
        estimate(result["validation"]["f2"] for result in results),
        milliseconds,
        results[0]["parameters"],
        results[0]["training_images"],
    )


def markdown(lines: Sequence[Line]) -> str:
    """The table for people, best read as it is; it says that the data are simulated."""
    seed = next((line.milliseconds for line in lines if line.name == "seed"), None)
    columns = ["detector", *SCORES.values(), "ms / slice", "× seed's", "parameters", "images", "seeds"]
    rows = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    rows += [f"| {' | '.join(cells_of(line, seed))} |" for line in lines]
    return "\n".join([*rows, "", *NOTES]) + "\n"


NOTES = (
    "Simulated tomograms. Mean ± standard deviation over seeds; all learned the same slices, from random weights, but "
    "for those with more images, which saw tomograms without labels, too.",
    "mAP on the test's slices that show a motor and as many that clearly show none. F2, P and R on whole tomograms, "
    "by the official metric, at the threshold that was best on validation tomograms. False positives: motors found in "
    "each motor-free tomogram at the threshold with recall 0.9, if every seed gets there. Images: frames that training "
    "went through. Time: one thread, in turn in one process; ours as detection runs them, a peer's as it comes, in the "
    "faster of float32 and bfloat16.",
)


def cells_of(line: Line, seed_milliseconds: float | None) -> list[str]:
    """A line's cells."""
    spent, ratio = line.milliseconds, times(line.milliseconds, seed_milliseconds)
    return [
        ROWS[line.name].title,
        *(cell(line.scores[name], DECIMALS.get(name, 3)) for name in SCORES),
        "-" if spent is None else f"{spent:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{line.parameters / 1e6:.1f} M",
        f"{line.training_images:,}",
        str(len(line.seeds)),
    ]


def cell(one: Estimate | None, decimals: int) -> str:
    """A mean and its deviation; a dash if there is none."""
    if one is None:
        return "-"
    deviation = "" if one.deviation is None else f" ± {one.deviation:.{decimals}f}"
    return f"{one.mean:.{decimals}f}{deviation}"


def requirements(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """What is asked, as far as the rows that are done say something about it; what cannot be told is not met."""
    single, ensemble = best(lines, SINGLE), best(lines, ("ensemble",))
    seed, light = (next((line for line in lines if line.name == name), None) for name in ("seed-101", "light"))
    peers = [line for line in lines if line.role == "peer"]
    figures: dict[str, float | None] = {}
    if single and peers:
        figures["single_over_peers_f2"] = margin(single, peers, "f2")
        figures["single_over_peers_map"] = margin(single, peers, "mAP@0.5")
    if single and ensemble:
        figures["ensemble_gain"] = mean(ensemble, "f2") / mean(single, "f2") - 1 if mean(single, "f2") else None
    if seed and light:
        figures["light_f2"] = mean(light, "f2") - mean(seed, "f2")
        figures["light_time"] = times(light.milliseconds, seed.milliseconds)
    if single:
        alarms = single.scores["false_positives_at_recall"]
        figures["false_positives"] = alarms.mean if alarms else None
    judged = judge({name: figure for name, figure in figures.items() if figure is not None}, WANTED)
    return judged | {name: untold(name) for name, figure in figures.items() if figure is None}


def untold(name: str) -> dict[str, Any]:
    """A requirement that is not met because its figure is not defined."""
    relation, limit, meaning = WANTED[name]
    return {"figure": None, "wanted": f"{relation} {limit:g}", "ok": False, "meaning": meaning}


def best(lines: Iterable[Line], roles: Sequence[Role]) -> Line | None:
    """Of the lines with these roles that with the highest F2 on validation; of equals the first one."""
    own = [line for line in lines if line.role in roles and line.validation_f2]
    return max(own, key=lambda line: line.validation_f2.mean if line.validation_f2 else 0.0, default=None)


def margin(single: Line, peers: Sequence[Line], score: str) -> float | None:
    """By how many deviations over seeds, the larger of the two, a line is above the best peer; None for one seed."""
    peer = max(peers, key=lambda line: mean(line, score))
    deviations = [one.deviation for line in (single, peer) if (one := line.scores[score]) and one.deviation is not None]
    noise = max(deviations, default=0.0)
    return (mean(single, score) - mean(peer, score)) / noise if noise else None


def times(one: float | None, other: float | None) -> float | None:
    """How many times the other one is; None if either is not known."""
    return one / other if one is not None and other else None


def mean(line: Line, score: str) -> float:
    """Of a score over seeds; 0 where it is not defined."""
    one = line.scores[score]
    return one.mean if one else 0.0


def as_json(line: Line) -> dict[str, Any]:
    """A line for programs."""
    scores = {name: one and one._asdict() for name, one in line.scores.items()}
    return line._asdict() | {"scores": scores, "validation_f2": line.validation_f2 and line.validation_f2._asdict()}
