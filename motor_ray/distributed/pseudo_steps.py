"""One round of pseudo-labels: detect, choose, train, validate. Each of them goes on where it stopped."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from motor_ray.archive.labels import (
    MOTOR_COLUMNS,
    TOMOGRAM_COLUMNS,
    Labels,
    split_labelled,
    with_guesses,
    write_labels,
)
from motor_ray.archive.manifest import join_manifests
from motor_ray.config import RunSettings
from motor_ray.distributed.detect import detect
from motor_ray.distributed.training import train
from motor_ray.distributed.training_loop import SCORES, rank_of
from motor_ray.errors import UnfinishedError
from motor_ray.motors.pseudo import PLACE, Choice, Limits, Sure, choose, compare_choices, sure_scores
from motor_ray.results import evaluate_run
from motor_ray.storage import exists, join, read_table, write_bytes
from motor_ray.tables import FAILURES

TOMOGRAM_SCORES = ("f2", "precision", "recall")


class Data(NamedTuple):
    """What rounds have in common."""

    uri: str
    manifest: pa.Table
    """MANIFEST of the labelled tomograms, voxel spacings filled in."""

    labels: Labels
    unlabelled: pa.Table
    """MANIFEST of the others."""

    unusable: pa.Table
    """FAILURES of tomograms that cannot be used."""

    settings: RunSettings
    workers: tuple[int, int]


class Model(NamedTuple):
    """A detector, and how it does on the validation tomograms."""

    uri: str
    scores: dict[str, Any]

    looked: str
    """The run of `detect` on them."""


def first_model(data: Data, model: str | None) -> Model:
    """Round 0: the model that was given, else one that is trained on the labels alone."""
    if model is None:
        model = trained(data, "round-0", data.manifest, data.labels, data.settings)
    return validated(data, 0, model)


def one_round(data: Data, number: int, best: Model, before: Choice | None) -> tuple[Choice, Model, dict[str, Any]]:
    """Detect with the best model, choose, train on that, too, and validate.

    Returns the choice, the new model, and what is told of the round.
    """
    found = join(data.uri, f"found-{number}")
    run = detect(data.unlabelled, data.unusable, best.uri, found, data.settings)
    sure = sure_of(data, best.looked)
    choice = chosen(data, found, sure)
    if not choice.with_motor:
        raise UnfinishedError(refusal(data, number, choice, sure, found))
    guesses = as_labels(choice, data.unlabelled, data.settings)
    uris = {name: join(data.uri, f"{name}-{number}.csv") for name in ("labels", "doubtful")}
    write_labels(guesses, uris["labels"])
    write_bytes(uris["doubtful"], choice.doubtful.to_csv(index=False, lineterminator="\n").encode())
    believed = pc.is_in(data.unlabelled["tomo_id"], pa.array([*choice.with_motor, *choice.negatives]))
    model = trained(
        data,
        f"round-{number}",
        join_manifests(data.manifest, data.unlabelled.filter(believed)),
        with_guesses(data.labels, guesses),
        starting_from(data.settings, best.uri),
    )
    after = validated(data, number, model)
    spacings = spacings_of(data.unlabelled, data.settings)
    changes = compare_choices(before, choice, spacings, data.settings.link.merge_distance_angstrom)
    told = {
        "round": number,
        "sure": sure._asdict(),
        "tomograms_with_motors": len(choice.with_motor),
        "motors": len(choice.motors),
        "tomograms_without": len(choice.negatives),
        "doubtful_motors": len(choice.doubtful),
        **choice.counts,
        "changes": changes._asdict(),
        "failures": run["counts"]["failures"],
        "teacher": best.uri,
        "before": best.scores,
        "after": after.scores,
        "kept": rank_of(after.scores) >= rank_of(best.scores),
        "model": model,
        "labels": uris["labels"],
    }
    return choice, after, told


def trained(data: Data, name: str, manifest: pa.Table, labels: Labels, settings: RunSettings) -> str:
    """The best checkpoint of the run `name`, which is begun, gone on with, or done."""
    resume = exists(join(data.uri, name, "run.json"))
    run = train(manifest, labels, settings, data.uri, name, workers=data.workers, resume=resume)
    return str(run["model"])


def validated(data: Data, number: int, model: str) -> Model:
    """A model, and how it does on whole validation tomograms, all of their slices: the same for every round.

    All are judged at one threshold, though the first may have learned one of its own.
    """
    split = split_labelled(data.manifest["tomo_id"].to_pylist(), data.labels, data.settings.train.split_seed)
    held_out = data.manifest.filter(pc.is_in(data.manifest["tomo_id"], pa.array(split["validation"])))
    settings = data.settings.model_copy(update={"detect": data.settings.detect.model_copy(update={"exhaustive": True})})
    found = join(data.uri, f"validation-{number}")
    detect(held_out, FAILURES.empty_table(), model, found, settings)
    same = settings.evaluate.model_copy(update={"threshold": settings.evaluate.threshold_or_usual})
    scores = evaluate_run(found, data.labels, same)
    told = {name: scores["slices"][name] for name in SCORES}
    return Model(model, told | {name: scores["tomograms"][name] for name in TOMOGRAM_SCORES}, found)


def sure_of(data: Data, looked: str) -> Sure:
    """From which scores on the model is believed whose run on validation tomograms is under `looked`."""
    motors, manifest = (read_table(join(looked, f"{name}.parquet")).to_pandas() for name in ("motors", "tomograms"))
    true_motors, tomograms = (
        table[table["tomo_id"].isin(manifest["tomo_id"])] for table in (data.labels.motors, data.labels.tomograms)
    )
    return sure_scores(motors, true_motors, tomograms, data.settings.pseudo, data.settings.link.merge_distance_angstrom)


def chosen(data: Data, found: str, sure: Sure) -> Choice:
    """What is believed of the run of `detect` under `found`."""
    motors = read_table(join(found, "motors.parquet")).to_pandas()
    failures = read_table(join(found, "failures.parquet"))
    unreadable = set(failures.filter(pc.is_null(failures["z"]))["tomo_id"].to_pylist())
    tomo_ids = data.unlabelled["tomo_id"].to_pylist()
    seed = data.settings.train.seed
    min_slices = data.settings.pseudo.min_slices
    return choose(motors, tomo_ids, unreadable & set(tomo_ids), limits_of(data), sure, min_slices, seed)


def limits_of(data: Data) -> Limits:
    """How many tomograms may be pseudo-labelled, for those that are trained on."""
    split = split_labelled(data.manifest["tomo_id"].to_pylist(), data.labels, data.settings.train.split_seed)
    with_motor = sum(len(data.labels.motors_of(tomo_id)) > 0 for tomo_id in split["train"])
    share = data.settings.pseudo.share
    return Limits(int(share * with_motor), int(share * len(split["train"])))


def as_labels(choice: Choice, manifest: pa.Table, settings: RunSettings) -> Labels:
    """A choice as labels; a spacing that is not known is the one that detection assumes."""
    sizes = ["size_z", "size_y", "size_x"]
    believed = pc.is_in(manifest["tomo_id"], pa.array([*choice.with_motor, *choice.negatives]))
    tomograms = manifest.filter(believed).select(["tomo_id", *sizes]).to_pandas()
    tomograms["voxel_spacing_angstrom"] = tomograms["tomo_id"].map(spacings_of(manifest, settings))
    counts = choice.motors["tomo_id"].value_counts()
    tomograms["n_motors"] = tomograms["tomo_id"].map(counts).fillna(0).astype(np.int64)
    shapes = tomograms.set_index("tomo_id")[sizes]
    motors = choice.motors[MOTOR_COLUMNS].copy()
    # A mean of boxes' centres may lie half a voxel beyond the last.
    motors[PLACE] = motors[PLACE].clip(0, shapes.loc[motors["tomo_id"]].to_numpy() - 1)
    return Labels(tomograms[TOMOGRAM_COLUMNS], motors, frozenset(tomograms["tomo_id"]), choice.doubtful[MOTOR_COLUMNS])


def spacings_of(manifest: pa.Table, settings: RunSettings) -> dict[str, float]:
    """Voxel spacing by tomogram; where it is not known the one that detection assumes."""
    spacings = manifest["voxel_spacing_angstrom"].fill_null(settings.link.assumed_spacing_angstrom).to_pylist()
    return dict(zip(manifest["tomo_id"].to_pylist(), spacings, strict=True))


def starting_from(settings: RunSettings, model: str | None) -> RunSettings:
    """`settings` of a training that starts with the weights of `model`, if that is given."""
    if model is None:
        return settings
    return settings.model_copy(update={"train": settings.train.model_copy(update={"start_from": model})})


def refusal(data: Data, number: int, choice: Choice, sure: Sure, found: str) -> str:
    """Why a round cannot go on, and what to do about it.

    Without a sure motor even tomograms where nothing is found say nothing: the model may be blind.
    """
    pseudo = data.settings.pseudo
    if limits_of(data).with_motor == 0:
        return (
            f"{data.uri}: --pseudo.share {pseudo.share:g} leaves room for no tomogram with a motor; give a larger one"
        )
    takes = (
        f"a pseudo-label takes {sure.positive:.2g} on {pseudo.min_slices} slices"
        if sure.positive <= 1
        else f"in validation tomograms {pseudo.precision:.0%} of what it found were true from no score on"
    )
    return (
        f"{data.uri}: round {number} is sure of no motor in {choice.counts['looked_at']} unlabelled tomograms: the "
        f"best scores {max(choice.best.values()):.2f}, and {takes}. Look at {found}; "
        "train a better model first, or start anew with a lower --pseudo.positive-score or --pseudo.min-slices"
    )
