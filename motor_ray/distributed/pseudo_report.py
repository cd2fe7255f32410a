"""What came of rounds of pseudo-labels, as a page for people."""

from collections.abc import Sequence
from typing import Any

HEAD = (
    "| round | sure from / none below | with motors | motors | doubtful | without | undecided "
    "| tomograms added / dropped / changed | motors added / dropped "
    "| mAP@0.5 before -> after | tomogram F2 before -> after | |"
)


def report(rounds: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per round, and what the columns mean."""
    lines = [_line(line) for line in rounds]
    return "\n".join(
        [
            "# Pseudo-labels",
            "",
            HEAD,
            "|" + "---|" * (HEAD.count("|") - 1),
            *lines,
            "",
            "Sure from, none below: scores from which a motor was believed, and below which there was none. With "
            "motors, without: unlabelled tomograms that were taught as if they were labelled, holding a motor or "
            "none. Doubtful: motors in them that scored too low to be believed and too high to be ignored; no slice "
            "near one was taught. Undecided: tomograms that were left out. Scores are of whole validation tomograms, "
            "which somebody labelled, before and after the round.",
            "",
        ]
    )


def _line(line: dict[str, Any]) -> str:
    changes, before, after = line["changes"], line["before"], line["after"]
    cells = [
        line["round"],
        f"{line['sure']['positive']:.2f} / {line['sure']['negative']:.2f}",
        f"{line['tomograms_with_motors']} of {line['sure_of_motors']}",
        line["motors"],
        line["doubtful_motors"],
        f"{line['tomograms_without']} of {line['sure_of_none']}",
        line["undecided"],
        f"{changes['tomograms_added']} / {changes['tomograms_dropped']} / {changes['tomograms_changed']}",
        f"{changes['motors_added']} / {changes['motors_dropped']}",
        *(f"{_score(before[name])} -> {_score(after[name])}" for name in ("mAP@0.5", "f2")),
        "kept" if line["kept"] else "worse, dropped",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
