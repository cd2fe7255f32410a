"""Pseudo-labels: what a model finds for sure on unlabelled tomograms is taught to the next one, round by round.

    labelled archive -> train -> model -> detect on the unlabelled archive -> choose the surest -> train on both -> ...

Under ``storage/name`` appear, for every round N, found-N/ (a run of `detect`), labels-N.csv (what was believed, in the
columns of train_labels.csv), doubtful-N.csv, round-N/ (a run of `train`) and validation-N/; and pseudo.json and
report.md. Only what somebody labelled validates. Every step goes on where it stopped, and so do all together.
"""

import logging
import os
from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from motor_ray.archive.labels import Labels, split_labelled
from motor_ray.archive.manifest import check_usable, join_manifests
from motor_ray.config import RunSettings
from motor_ray.config_values import settings_differences
from motor_ray.detector.description import describe_checkpoint
from motor_ray.distributed.cluster import connected
from motor_ray.distributed.ledger import alone, storage_watched
from motor_ray.distributed.pseudo_report import report
from motor_ray.distributed.pseudo_steps import Data, first_model, one_round, starting_from
from motor_ray.distributed.samples import with_labelled_spacing
from motor_ray.distributed.study import study_at
from motor_ray.distributed.team import slots_for, team_of_this_machine
from motor_ray.distributed.training import new_model, plan_part
from motor_ray.distributed.worker import PARTS
from motor_ray.errors import ConfigError, LabelsError, RunError
from motor_ray.motors.pseudo import Choice
from motor_ray.storage import exists, join, read_json, write_bytes, write_json
from motor_ray.tables import table_hash

log = logging.getLogger(__name__)

RECORD = "pseudo.json"


def pseudo_label(
    manifest: pa.Table,
    labels: Labels,
    unlabelled: pa.Table | None,
    unusable: pa.Table,
    settings: RunSettings,
    storage: str,
    name: str,
    *,
    rounds: int,
    workers: tuple[int, int],
    model: str | None = None,
) -> dict[str, Any]:
    """Train on labels, or start from the checkpoint `model`; then so many rounds of detecting, choosing and training.

    Each round detects with the best model so far, starts from its weights, and trains on the labels and on what was
    chosen. Rounds end early when one is worse on the validation tomograms: the next would choose the same again.
    The same call goes on where it stopped; more rounds may be asked for, and fewer take none away. `unusable` are
    FAILURES of tomograms that are in neither MANIFEST.

    `unlabelled` are tomograms of another archive; those of `manifest` that `labels` do not mention if that is None.
    Returns what pseudo.json says. Raises ConfigError, ManifestError or LabelsError before any work for what cannot be,
    RunError if ``storage/name`` holds something else, UnfinishedError if a round cannot be done, for instance because
    nothing is found for sure.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: expected 1 or more")
    data = prepare(manifest, labels, unlabelled, unusable, settings, study_at(storage, name), workers)
    require_possible(data, model)
    rounds = max(rounds, begin(data, model))
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        data = data._replace(workers=team_of_this_machine(workers, data.settings))
    with connected(slots_for(data.workers[0], data.settings)), alone(data.uri), storage_watched(data.uri):
        best = first_model(data, model)
        done: list[dict[str, Any]] = []
        choice: Choice | None = None
        for number in range(1, rounds + 1):
            choice, after, line = one_round(data, number, best, choice)
            done.append(line)
            note(data, done)
            if not line["kept"]:
                log.info("%s: round %d was worse; the next would choose the same again", data.uri, number)
                break
            best = after
    return note(data, done)


def prepare(
    manifest: pa.Table,
    labels: Labels,
    unlabelled: pa.Table | None,
    unusable: pa.Table,
    settings: RunSettings,
    uri: str,
    workers: tuple[int, int],
) -> Data:
    """All that rounds need; without `unlabelled` it is those of `manifest` that `labels` do not mention.

    Raises ManifestError if a name is used twice, LabelsError if there are no unlabelled tomograms, or labelled ones
    among them.
    """
    known = pa.array(labels.tomograms["tomo_id"].to_list(), pa.string())
    labelled = with_labelled_spacing(manifest, labels)
    if unlabelled is None:
        unlabelled = manifest.filter(pc.invert(pc.is_in(manifest["tomo_id"], known)))
        if len(unlabelled) == 0:
            raise LabelsError(
                f"all {len(manifest)} tomograms of the archive are labelled; give unlabelled ones with --unlabelled"
            )
    check_usable(unlabelled, unusable)
    join_manifests(labelled, unlabelled)
    if both := unlabelled.filter(pc.is_in(unlabelled["tomo_id"], known))["tomo_id"].to_pylist():
        raise LabelsError(
            f"{both[0]}: is among the unlabelled tomograms, but the labels speak of it; leave it out of one of them"
        )
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"tomograms": "no"})})
    return Data(uri, labelled, labels, unlabelled, unusable, settings, workers)


def require_possible(data: Data, model: str | None) -> None:
    """Raises now what would otherwise stop a later round: thresholds, labels, weights that do not fit."""
    pseudo, detection = data.settings.pseudo, data.settings.detect
    if pseudo.negative_score is not None and pseudo.negative_score < detection.score_threshold:
        raise ConfigError(
            f"pseudo.negative_score {pseudo.negative_score:g}: detections below detect.score_threshold "
            f"{detection.score_threshold:g} are not kept, so nobody could tell; lower --detect.score-threshold"
        )
    split = split_labelled(data.manifest["tomo_id"].to_pylist(), data.labels, data.settings.train.split_seed)
    for part in PARTS:
        plan_part(data.manifest, data.labels, data.settings, split[part], part)
    new_model(starting_from(data.settings, model))
    if model:
        require_unseen(model, split["validation"])


def require_unseen(model: str, validation: Collection[str]) -> None:
    """Raises LabelsError if the run that left the checkpoint `model` says that it was trained on one to validate with.

    A checkpoint that was copied away from its run can't be asked.
    """
    where = join(model.rstrip("/").rpartition("/")[0], "run.json")
    run = read_json(where) if exists(where) else {}
    if seen := sorted(set(run.get("split", {}).get("train", [])) & set(validation)):
        raise LabelsError(
            f"{model}: was trained on {seen[0]} and {len(seen) - 1} others that validate here, so it would seem better "
            "than it is; give the labels and --train.split-seed that it was trained with, or leave out --model"
        )


def begin(data: Data, model: str | None) -> int:
    """Write down what the rounds are about; returns how many are done. Raises RunError for a folder about others."""
    record: dict[str, Any] = {
        "settings": data.settings.model_dump(mode="json"),
        "data_hash": table_hash(
            data.manifest, data.unlabelled, pa.Table.from_pandas(data.labels.motors, preserve_index=False)
        ),
        "start": describe_checkpoint(model).sha256 if model else None,
    }
    where = join(data.uri, RECORD)
    if not exists(where):
        if exists(data.uri):
            raise RunError(f"{data.uri}: is there already and holds no {RECORD}; give another --name")
        write_json(where, record | {"rounds": []})
        return 0
    there = read_json(where)
    if differences := settings_differences(there["settings"], record["settings"], whole=True):
        raise RunError(f"{data.uri}: was started with other settings: {'; '.join(differences)}; go on with the same")
    for what, words in (("data_hash", "labels or tomograms"), ("start", "weights in --model")):
        if there[what] != record[what]:
            raise RunError(f"{data.uri}: was started with other {words}; go on with the same, or give another --name")
    return len(there["rounds"])


def note(data: Data, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Write down what came of the rounds so far, for programs and for people; returns it."""
    kept = [line for line in rounds if line["kept"]]
    record: dict[str, Any] = read_json(join(data.uri, RECORD)) | {
        "rounds": rounds,
        "model": kept[-1]["model"] if kept else rounds[0]["teacher"],
    }
    write_json(join(data.uri, RECORD), record)
    write_bytes(join(data.uri, "report.md"), report(rounds).encode())
    return record
