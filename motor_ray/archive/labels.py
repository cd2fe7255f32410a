"""Where the motors are known to be: Kaggle's ``train_labels.csv``, and the split into parts.

It knows the table only; that the tomograms exist is the manifest's business.
"""

import io
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

from motor_ray.config import ArchiveSettings
from motor_ray.errors import LabelsError
from motor_ray.storage import DEFAULTS, read_bytes, write_bytes

AXES = ["Motor axis 0", "Motor axis 1", "Motor axis 2"]
SHAPE = ["Array shape (axis 0)", "Array shape (axis 1)", "Array shape (axis 2)"]
SPACING = "Voxel spacing"
COUNT = "Number of motors"
COLUMNS = ["row_id", "tomo_id", *AXES, *SHAPE, SPACING, COUNT]
"""The columns of the file, in order. The axes are z, y, x."""

GUESSED = "guessed by a model"
"""A further column, of files in which somebody's labels stand beside a model's: True or False."""

TOMOGRAM_COLUMNS = ["tomo_id", "size_z", "size_y", "size_x", "voxel_spacing_angstrom", "n_motors"]
MOTOR_COLUMNS = ["tomo_id", "z", "y", "x"]

NO_MOTOR = -1.0

NOWHERE = np.empty((0, 3))

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known about the motors of some tomograms."""

    tomograms: pd.DataFrame
    """One row per tomogram: tomo_id, size_z, size_y, size_x, voxel_spacing_angstrom, n_motors.

    `n_motors` is the number that the file declares. It may exceed the rows in `motors`: in the public labels four
    tomograms declare two motors and place one.
    """

    motors: pd.DataFrame
    """One row per motor: tomo_id, z, y, x in voxels."""

    guessed: frozenset[str] = frozenset()
    """Tomograms whose motors a model says and nobody looked at: to be learned from, never to judge by."""

    doubtful: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=MOTOR_COLUMNS))
    """Places that may be motors or not: tomo_id, z, y, x in voxels. Slices near one are not learned from."""

    def spacing_of(self, tomo_id: str) -> float:
        """The tomogram's voxel spacing in angstrom. Raises LabelsError for one that the labels do not mention."""
        if tomo_id not in self._spacings:
            raise LabelsError(
                f"{tomo_id}: is not among the {len(self.tomograms)} tomograms of the labels; "
                "leave it out, or give it a row of -1 if it holds no motor"
            )
        return self._spacings[tomo_id]

    def motors_of(self, tomo_id: str) -> np.ndarray:
        """`(n, 3)` float64 positions z, y, x in voxels, `(0, 3)` for a tomogram without a motor.

        Raises LabelsError for a tomogram that the labels do not mention: nothing is known about it.
        """
        self.spacing_of(tomo_id)
        return self._motors.get(tomo_id, NOWHERE).copy()

    def doubtful_of(self, tomo_id: str) -> np.ndarray:
        """`(n, 3)` float64 positions z, y, x in voxels, of what may be a motor or not."""
        return self._doubtful.get(tomo_id, NOWHERE).copy()

    # Looked up for every sample of a training, for which pandas would compare all ids each time.

    @cached_property
    def _spacings(self) -> dict[str, float]:
        columns = (self.tomograms[name].tolist() for name in ("tomo_id", "voxel_spacing_angstrom"))
        return dict(zip(*columns, strict=True))

    @cached_property
    def _motors(self) -> dict[str, np.ndarray]:
        return _places(self.motors)

    @cached_property
    def _doubtful(self) -> dict[str, np.ndarray]:
        return _places(self.doubtful)


def _places(table: pd.DataFrame) -> dict[str, np.ndarray]:
    places = table[["z", "y", "x"]].to_numpy(np.float64)
    return {str(tomo_id): places[rows] for tomo_id, rows in table.groupby("tomo_id").indices.items()}


def read_labels(uri: str, settings: ArchiveSettings = DEFAULTS) -> Labels:
    """Read a CSV file in the columns of `COLUMNS`: one row per motor, or a single row of -1.

    Tomograms and motors keep the file's order; other columns but GUESSED are ignored. Raises LabelsError naming the
    rows (counted from 1 after the header) that are malformed or contradict one another, StorageError if the file cannot
    be read.
    """
    try:
        text = read_bytes(uri, settings).decode("utf-8-sig")
        # As text, so that a cell that is not a number can be quoted as it stands in the file.
        cells = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        cells = pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise LabelsError(f"{uri}: is not a CSV file ({' '.join(str(error).split())})") from None
    missing = [column for column in COLUMNS if column not in cells.columns]
    if missing and len(cells.columns) > 0:
        raise LabelsError(f"{uri}: lacks the column{_plural(missing)} {_names(missing)}; expected {_names(COLUMNS)}")
    if cells.empty:
        raise LabelsError(f"{uri}: holds no rows; expected one per motor, or one of -1 per tomogram without a motor")
    labels = _labels(_parse(cells, uri), uri)
    if GUESSED not in cells.columns:
        return labels
    said = cells[GUESSED].str.strip().str.lower()  # spreadsheets write TRUE
    if (wrong := ~said.isin(["true", "false"])).any():
        value = cells.loc[wrong, GUESSED].iloc[0]
        raise LabelsError(f"{uri}: {_rows(wrong)} has {value!r} in '{GUESSED}', expected True or False")
    return replace(labels, guessed=frozenset(cells.loc[said == "true", "tomo_id"]))


def write_labels(labels: Labels, path: str) -> None:
    """Write `labels` to the file or URI `path` in Kaggle's columns, so that `read_labels` gives them back.

    If some are guessed, one more says which; what is doubtful is not written.

    Raises LabelsError, and writes nothing, for labels that `read_labels` would refuse.
    """
    rows = labels.tomograms[TOMOGRAM_COLUMNS].merge(labels.motors[MOTOR_COLUMNS], on="tomo_id", how="left")
    if rows.empty:
        raise LabelsError(f"{path}: there are no tomograms to write labels of")
    strays = sorted(set(labels.motors["tomo_id"]) - set(labels.tomograms["tomo_id"]))
    if strays:
        raise LabelsError(f"{path}: there are motors in {strays[0]}, which is not among the tomograms; add its row")
    table = pd.DataFrame({"row_id": np.arange(len(rows)), "tomo_id": rows["tomo_id"]})
    table[AXES] = rows[["z", "y", "x"]].astype(np.float64).fillna(NO_MOTOR).to_numpy()
    table[SHAPE] = rows[["size_z", "size_y", "size_x"]].to_numpy()
    table[SPACING] = rows["voxel_spacing_angstrom"].astype(np.float64)
    table[COUNT] = rows["n_motors"]
    _labels(table, path)
    if labels.guessed:
        table[GUESSED] = table["tomo_id"].isin(labels.guessed)
    columns = [*COLUMNS, *([GUESSED] if labels.guessed else [])]
    write_bytes(path, table[columns].to_csv(index=False, lineterminator="\n").encode())


def split_tomograms(tomo_ids: Iterable[str], seed: int = 420) -> dict[Part, list[str]]:
    """Divide tomograms 80/10/10 into "train", "validation" and "test"; no tomogram is in two parts.

    The order of `tomo_ids` and repetitions do not matter: the ids are sorted, then shuffled with `seed`. With three
    tomograms or more no part is empty; one alone is for training, of two the other is for validation.
    """
    ids = sorted(set(tomo_ids))
    random.Random(seed).shuffle(ids)
    tenth = max(1, round(len(ids) / 10))
    validation, test = (tenth, tenth) if len(ids) >= 3 else (max(0, len(ids) - 1), 0)
    train = len(ids) - validation - test
    return {"train": ids[:train], "validation": ids[train : train + validation], "test": ids[train + validation :]}


def split_labelled(tomo_ids: Iterable[str], labels: Labels, seed: int) -> dict[Part, list[str]]:
    """`split_tomograms` of those that somebody labelled; those whose labels are guessed are all for training.

    So guesses change neither what a model is validated with nor what is left alone.
    """
    ids = set(tomo_ids)
    split = split_tomograms(ids - labels.guessed, seed)
    return split | {"train": split["train"] + sorted(ids & labels.guessed)}


def with_guesses(labels: Labels, guesses: Labels) -> Labels:
    """`labels` and those that a model guessed, of other tomograms. Raises LabelsError if a tomogram is in both."""
    if both := sorted(set(labels.tomograms["tomo_id"]) & set(guesses.tomograms["tomo_id"])):
        raise LabelsError(f"{both[0]}: is labelled already; a guess must not take a label's place")
    tomograms, motors, doubtful = (
        pd.concat([ours, theirs], ignore_index=True) if len(theirs) else ours
        for ours, theirs in (
            (labels.tomograms, guesses.tomograms),
            (labels.motors, guesses.motors),
            (guesses.doubtful, labels.doubtful),
        )
    )
    return Labels(tomograms, motors, labels.guessed | set(guesses.tomograms["tomo_id"]), doubtful)


def _parse(cells: pd.DataFrame, uri: str) -> pd.DataFrame:
    table = cells[["row_id", "tomo_id"]].copy()
    for column in [*AXES, *SHAPE, SPACING, COUNT]:
        numbers = pd.to_numeric(cells[column], errors="coerce").astype(np.float64)
        wrong = ~np.isfinite(numbers)
        if column in (*SHAPE, COUNT):
            wrong |= numbers % 1 != 0
        if wrong.any():
            kind = "a whole number" if column in (*SHAPE, COUNT) else "a number"
            at = int(np.flatnonzero(wrong)[0])
            raise LabelsError(f"{uri}: row {at + 1} has {cells[column].iloc[at]!r} in '{column}', expected {kind}")
        table[column] = numbers.astype(np.int64) if column in (*SHAPE, COUNT) else numbers
    return table


def _labels(table: pd.DataFrame, uri: str) -> Labels:
    """The labels in `table`, which has the columns of the file and numbers in its cells."""
    _check_ids(table, uri)
    _check_tomograms(table, uri)
    _check_positions(table, uri)
    placed = table[(table[AXES] != NO_MOTOR).any(axis=1)]
    _check_counts(table, placed, uri)
    tomograms = table.drop_duplicates("tomo_id")[["tomo_id", *SHAPE, SPACING, COUNT]].reset_index(drop=True)
    motors = placed[["tomo_id", *AXES]].reset_index(drop=True)
    return Labels(tomograms.set_axis(TOMOGRAM_COLUMNS, axis=1), motors.set_axis(MOTOR_COLUMNS, axis=1))


def _check_ids(table: pd.DataFrame, uri: str) -> None:
    nameless = table["tomo_id"].str.strip() == ""
    if nameless.any():
        raise LabelsError(f"{uri}: {_rows(nameless)} without a tomo_id; every row belongs to a tomogram")
    repeated = table["row_id"].duplicated(keep=False)
    if repeated.any():
        first = table.loc[repeated, "row_id"].iloc[0]
        raise LabelsError(
            f"{uri}: row_id {first} stands in {_rows(table['row_id'] == first)}; every row_id must be unique"
        )
    twice = table.duplicated(["tomo_id", *AXES], keep=False)
    if twice.any():
        tomo_id, *axes = table.loc[twice, ["tomo_id", *AXES]].iloc[0]
        same = (table["tomo_id"] == tomo_id) & (table[AXES] == axes).all(axis=1)
        position = ", ".join(f"{axis:g}" for axis in axes)
        raise LabelsError(f"{uri}: {tomo_id} has ({position}) more than once, in {_rows(same)}; list each motor once")


def _check_tomograms(table: pd.DataFrame, uri: str) -> None:
    for column in [*SHAPE, SPACING, COUNT]:
        smallest = 0 if column == COUNT else np.nextafter(0, 1)
        small = table[column] < smallest
        if small.any():
            tomo_id, value = table.loc[small, ["tomo_id", column]].iloc[0]
            kind = "zero or more" if column == COUNT else "more than zero"
            raise LabelsError(f"{uri}: {tomo_id} has {value:g} in '{column}' ({_rows(small)}), expected {kind}")
        values = table.groupby("tomo_id", sort=False)[column].nunique()
        if (values > 1).any():
            tomo_id = values.index[values > 1][0]
            got = ", ".join(f"{value:g}" for value in table.loc[table["tomo_id"] == tomo_id, column].unique())
            raise LabelsError(f"{uri}: {tomo_id} has different values in '{column}': {got}; its rows must agree")


def _check_positions(table: pd.DataFrame, uri: str) -> None:
    no_motor = (table[AXES] == NO_MOTOR).all(axis=1)
    for axis, size in zip(AXES, SHAPE, strict=True):
        outside = ~no_motor & ((table[axis] < 0) | (table[axis] >= table[size]))
        if outside.any():
            tomo_id, got, expected = table.loc[outside, ["tomo_id", axis, size]].iloc[0]
            raise LabelsError(
                f"{uri}: {tomo_id} has a motor at {got:g} in '{axis}' ({_rows(outside)}), outside its shape of "
                f"{expected:g}; expected 0 to {expected - 1:g}, or -1 in all three axes for no motor"
            )


def _check_counts(table: pd.DataFrame, placed: pd.DataFrame, uri: str) -> None:
    rows = table.groupby("tomo_id", sort=False).size()
    motors = placed.groupby("tomo_id").size().reindex(rows.index, fill_value=0)
    declared = table.groupby("tomo_id", sort=False)[COUNT].first()
    mixed = (motors > 0) & (rows > motors)
    if mixed.any():
        tomo_id = mixed.index[mixed][0]
        raise LabelsError(
            f"{uri}: {tomo_id} has a row of -1, 'no motor', beside rows of motors; remove one or the other"
        )
    # Fewer rows than declared is what the public labels themselves do.
    wrong = (motors > declared) | ((motors == 0) & (declared > 0))
    if wrong.any():
        tomo_id = wrong.index[wrong][0]
        raise LabelsError(
            f"{uri}: {tomo_id} declares {declared[tomo_id]} in '{COUNT}' but has {motors[tomo_id]} rows of motors; "
            "declare the number there is"
        )


def _rows(chosen: pd.Series) -> str:
    numbers = (np.flatnonzero(chosen) + 1).tolist()
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"row{_plural(numbers)} {shown}"


def _plural(things: list[str] | list[int]) -> str:
    return "s" if len(things) > 1 else ""


def _names(columns: list[str]) -> str:
    return ", ".join(f"'{column}'" for column in columns)
