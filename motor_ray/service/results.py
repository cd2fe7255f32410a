"""What was found in a tomogram, as requests get to see it."""

from collections.abc import Iterable
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from fastapi import Response

from motor_ray.motors.export import motors_csv, relion_star
from motor_ray.service.jobs import Record
from motor_ray.service.problems import ProblemError
from motor_ray.tables import MOTORS

KEPT_BACK = ("uri", "ticket", "attempts", "model_name")
"""What only the endpoint itself needs of a record."""

TYPES = {"csv": "text/csv", "star": "text/plain"}


def shown(record: Record) -> Record:
    """A record without what is only ours."""
    return {name: value for name, value in record.items() if name not in KEPT_BACK}


def motors_shown(motors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """MOTORS rows of one tomogram, best first, with their place in angstrom, None where the spacing is unknown."""
    rows = []
    for motor in sorted(motors, key=lambda one: -one["score"]):
        spacing = motor["voxel_spacing_angstrom"]
        places = {f"{axis}_angstrom": motor[axis] * spacing if spacing else None for axis in "zyx"}
        own = {name: value for name, value in motor.items() if name not in ("tomo_id", "voxel_spacing_angstrom")}
        rows.append(own | places)
    return rows


def downloaded(record: Record, kind: Literal["csv", "star"], threshold: float, relion: int) -> Response:
    """The motors from `threshold` on as a file. Raises ProblemError without the voxel spacing that it takes, and
    ExportError for a name that STAR cannot hold.
    """
    name = record["name"].rsplit(".", 1)[0] or "tomogram"
    own = {"tomo_id": name, "voxel_spacing_angstrom": record["voxel_spacing_angstrom"]}
    chosen = [motor | own for motor in record["motors"] if motor["score"] >= threshold]
    if kind == "star" and relion == 5 and chosen and not record["voxel_spacing_angstrom"]:
        raise ProblemError(
            409,
            "The tomogram's voxel spacing is not known, and RELION 5 wants angstrom: ask for relion=4, which takes "
            "voxels, or hand the tomogram in again with voxel_spacing_angstrom",
        )
    motors = _table(chosen)
    size = (record["size_z"], record["size_y"], record["size_x"])
    data = motors_csv(motors) if kind == "csv" else relion_star(motors, {name: size}, relion)
    # The name is one that a client gave; only what is safe in a header goes into it.
    safe = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name)
    disposition = f'attachment; filename="{safe}-motors.{kind}"'
    return Response(data, media_type=TYPES[kind], headers={"Content-Disposition": disposition})


def _table(motors: list[dict[str, Any]]) -> pd.DataFrame:
    table: pd.DataFrame = pa.Table.from_pylist(motors, schema=MOTORS).to_pandas()
    return table
