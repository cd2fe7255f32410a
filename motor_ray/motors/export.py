"""Motors in the formats of other programs, as bytes by file name; knows tables and formats, not files.

All formats mean the same place. A position is an index of voxels, 0 at the centre of the first one; times the voxel
spacing it is in angstrom from there, as copick and the CryoET Data Portal have it. RELION has two conventions of its
own, see `relion_star`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import quote

import pandas as pd

from motor_ray.errors import ExportError
from motor_ray.motors.metrics import AXES, best_of

Format = Literal["kaggle", "star", "copick", "ndjson", "csv"]
"""What motors can be written as."""

Files = dict[str, bytes]
"""What is in each file, by its path below the place asked for; that of a single file is empty."""

PLACE = ["z", "y", "x"]

OBJECT = {"name": "bacterial-type-flagellum-motor", "identifier": "GO:0120100"}
"""What was found, as the Gene Ontology, copick and the portal call it."""

RADIUS_ANGSTROM = 225.0
"""Of the sphere that viewers draw: a motor is about 450 angstrom wide."""

COPICK_USER, COPICK_SESSION = "motor-ray", "0"
"""copick splits file names at underscores; session 0 says that a tool, not a person, picked."""

NDJSON_SUFFIX = "-bacterial_type_flagellum_motor-1.0_point.ndjson"
"""The portal's own name of such a file: object, version, shape."""

UPRIGHT = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]

STAR_BARE = re.compile(r"(?!(?:data|loop|save|stop|global)?_)[\w.+-]+", re.IGNORECASE)
"""A word that no reader of STAR files takes for something else, so that it needs no quotes."""


def chosen_motors(motors: pd.DataFrame, to: Format, threshold: float) -> pd.DataFrame:
    """The rows of `motors`, in MOTORS's columns, that are written: from `threshold` on, for Kaggle one a tomogram."""
    chosen = motors[motors["score"] >= threshold]
    return best_of(chosen) if to == "kaggle" else chosen


def export_files(
    to: Format, motors: pd.DataFrame, sizes: Mapping[str, tuple[int, int, int]], tomo_ids: Iterable[str], relion: int
) -> Files:
    """The files that hold `motors`, all that are to be written, in MOTORS's columns.

    `sizes` gives the voxels along z, y, x of every tomogram with a motor, `tomo_ids` all tomograms of the run, those
    without motor and those that could not be read included; `relion` is 4 or 5.

    Raises ExportError if a format in angstrom meets a tomogram without voxel spacing, or STAR a name it cannot hold.
    """
    match to:
        case "kaggle":
            return {"": kaggle_csv(motors, tomo_ids)}
        case "csv":
            return {"": motors_csv(motors)}
        case "star":
            return {"": relion_star(motors, sizes, relion)}
        case "ndjson":
            return portal_ndjson(motors)
        case "copick":
            return copick_picks(motors)


def kaggle_csv(motors: pd.DataFrame, tomo_ids: Iterable[str]) -> bytes:
    """The submission to the official metric: a row for each of `tomo_ids`, by name; -1 where `motors` has none.

    `motors` has at most one row a tomogram.
    """
    rows = motors.set_index("tomo_id")[PLACE].reindex(pd.Index(sorted(tomo_ids), name="tomo_id"))
    return _csv(rows.set_axis(AXES, axis="columns").fillna(-1).reset_index())


def motors_csv(motors: pd.DataFrame) -> bytes:
    """Every column of MOTORS, and the place in angstrom, which is empty where the voxel spacing is unknown."""
    places = motors[PLACE].mul(motors["voxel_spacing_angstrom"], axis="index")
    return _csv(motors.join(places.add_suffix("_angstrom")))


def relion_star(motors: pd.DataFrame, sizes: Mapping[str, tuple[int, int, int]], version: int) -> bytes:
    """Coordinates for RELION 4 or 5: one table, without optics, which RELION takes from its own tomograms.

    RELION 4 (``rlnCoordinateX``): pixels, 0 at the centre of the first one. Though that program counts from 1
    inside, it adds the 1 itself (ParticleSet::getPosition) and reconstructs from an origin of 1. They are voxels of
    the tomogram that was looked at; RELION means pixels of the tilt series, so those of a binned tomogram must be
    multiplied by the binning.

    RELION 5 (``rlnCenteredCoordinateXAngst``): angstrom from half the size, for even and odd sizes alike: voxel i of n
    lies at (i - n / 2) * spacing. So its C++ has it (TomogramSet::loadTomogram; reconstruction from an origin of 0),
    and the binning drops out. RELION's own picker is off that by one pixel of the tilt series.

    Source: https://github.com/3dem/relion, ver4.0 and ver5.0, and its issues 1137 and 1280.
    """
    names = {"rlnTomoName": [_star_word(name) for name in motors["tomo_id"]]}
    score = {"rlnAutopickFigureOfMerit": motors["score"].tolist()}
    if version == 4:
        note = "voxels of the tomogram that was looked at, 0 at the centre of the first one"
        return _star(note, names | {f"rlnCoordinate{axis}": motors[axis.lower()].tolist() for axis in "XYZ"} | score)
    _need_spacing(motors, "RELION 5")
    spacing = motors["voxel_spacing_angstrom"]
    shapes = pd.DataFrame([sizes[name] for name in motors["tomo_id"]], columns=PLACE, index=motors.index)
    centred = (motors[PLACE] - shapes / 2).mul(spacing, axis="index")
    places = {f"rlnCenteredCoordinate{axis}Angst": centred[axis.lower()].tolist() for axis in "XYZ"}
    return _star(
        "angstrom from half the size of the tomogram", names | places | score | {"rlnImagePixelSize": spacing.tolist()}
    )


def portal_ndjson(motors: pd.DataFrame) -> Files:
    """The CryoET Data Portal's point annotations, in voxels, a file for each tomogram with motors, best first.

    The portal's points have a place and no more, so the score is not in them.
    """
    files = {}
    for name, own in _by_tomogram(motors):
        points = [{"type": "point", "location": {letter: row[letter] for letter in "xyz"}} for row in own]
        files[safe_name(name) + NDJSON_SUFFIX] = "".join(json.dumps(point) + "\n" for point in points).encode()
    return files


def copick_picks(motors: pd.DataFrame) -> Files:
    """The folder of a copick project: picks in angstrom for each run, that is tomogram, with motors, best first.

    A motor's orientation is not known, and the picks say so. The project's configuration is `copick_config`.
    """
    _need_spacing(motors, "copick")
    files = {}
    for name, own in _by_tomogram(motors):
        run, spacing = safe_name(name), own[0]["voxel_spacing_angstrom"]
        picks = {
            "pickable_object_name": OBJECT["name"],
            "user_id": COPICK_USER,
            "session_id": COPICK_SESSION,
            "run_name": run,
            "voxel_spacing": spacing,
            "unit": "angstrom",
            "trust_orientation": False,
            "points": [
                {
                    "location": {letter: row[letter] * spacing for letter in "xyz"},
                    "transformation_": UPRIGHT,
                    "instance_id": number,
                    "score": row["score"],
                }
                for number, row in enumerate(own, start=1)
            ],
        }
        file = f"{COPICK_USER}_{COPICK_SESSION}_{OBJECT['name']}.json"
        files[f"ExperimentRuns/{run}/Picks/{file}"] = _json(picks)
    return files


def copick_config(root: str) -> bytes:
    """What copick opens: a project whose files lie under `root`, an absolute path or URI."""
    local = "://" not in root
    found = {**OBJECT, "is_particle": True, "label": 1, "color": [230, 97, 1, 255], "radius": RADIUS_ANGSTROM}
    return _json(
        {
            "config_type": "filesystem",
            "name": "motor_ray",
            "description": "Bacterial flagellar motors found by motor_ray",
            "version": "1.0.0",
            "pickable_objects": [found],
            "overlay_root": f"local://{root}" if local else root,
            "overlay_fs_args": {"auto_mkdir": True} if local else {},
        }
    )


def safe_name(name: str) -> str:
    """`name` as one part of a path, in any folder and for any glob: other names give other parts.

    >>> safe_name("tomo_1"), safe_name("../a[1]"), safe_name("50%")
    ('tomo_1', '%2E.%2Fa%5B1%5D', '50%25')
    """
    escaped = re.sub(r"[^\w .+,=@~()-]", lambda found: quote(found[0], safe=""), name)
    return f"%2E{escaped[1:]}" if escaped.startswith(".") else escaped


def _by_tomogram(motors: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each tomogram, best first."""
    best_first = motors.sort_values("score", ascending=False, kind="stable")
    return [(str(name), own.to_dict("records")) for name, own in best_first.groupby("tomo_id")]  # type: ignore[misc]


def _need_spacing(motors: pd.DataFrame, what: str) -> None:
    unknown = motors.loc[motors["voxel_spacing_angstrom"].isna(), "tomo_id"].unique().tolist()
    if unknown:
        raise ExportError(
            f"{len(unknown)} of {motors['tomo_id'].nunique()} tomograms with motors have no voxel spacing, such as "
            f"{', '.join(unknown[:3])}, and {what} wants angstrom; detect again, to another --out, with "
            "--archive.voxel-spacing-angstrom or with the column voxel_spacing_angstrom filled in the --manifest, or "
            "export in voxels: --to csv, --to ndjson, or --to star --relion 4"
        )


def _star_word(name: str) -> str:
    """`name` as a value in a STAR table. Readers drop control characters and disagree about quotes in a value."""
    if re.search(r"[\x00-\x1f\x7f\"']", name):
        raise ExportError(f"tomogram {name!r}: STAR cannot hold such a name; rename it or export to another format")
    return name if STAR_BARE.fullmatch(name) else f'"{name}"'


def _star(note: str, columns: Mapping[str, list[Any]]) -> bytes:
    """A STAR file with the one table `columns`, its values as they are to be written."""
    labels = [f"_{name} #{number}" for number, name in enumerate(columns, start=1)]
    rows = [" ".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    return "\n".join([f"# motor_ray: {note}", "", "data_particles", "", "loop_", *labels, *rows, "", ""]).encode()


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
