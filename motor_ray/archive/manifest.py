"""The table of tomograms: make it from an archive, check it, read and write it.

What a table must hold is here; where tomograms lie and what their files say is `discover`'s business.
"""

import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from motor_ray.archive.candidates import MRC_SUFFIXES, ZARR_SUFFIX
from motor_ray.archive.discover import discover
from motor_ray.archive.portal import name_apart
from motor_ray.archive.readers import FORMATS
from motor_ray.config import ArchiveSettings
from motor_ray.errors import ManifestError
from motor_ray.storage import exists, read_bytes, read_table, write_table
from motor_ray.tables import FAILURES, MANIFEST

_NULLABLE = ("voxel_spacing_angstrom", "chunk_depth")


def make_manifest(archive_uri: str, settings: ArchiveSettings) -> pa.Table:
    """The MANIFEST of every tomogram under `archive_uri`, sorted by tomo_id.

    `archive_uri` is an archive, a folder of it, a folder of images, or a single file, local or in object storage. A
    tomogram is named after its folder (stacks of images) or its file (MRC, OME-Zarr); where several in the layout of
    the CryoET Data Portal share a name, `portal.name_apart` lengthens it. Raises ManifestError if there is none, if
    two have the same name, or if any cannot be used; StorageError if a folder cannot be listed.
    """
    table, failures = find_tomograms(archive_uri, settings)
    if len(failures):
        others = len(failures) - 1
        more = f" ({others} more cannot be used either)" if others else ""
        raise ManifestError(f"{failures['error'][0]}, or move it out of the archive{more}")
    return table


def find_tomograms(archive_uri: str, settings: ArchiveSettings) -> tuple[pa.Table, pa.Table]:
    """Like `make_manifest`, but tomograms that cannot be used are rows of FAILURES, the second table, without a z."""
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    folders = passed_over = 0
    for found in discover(archive_uri, settings):
        rows += found.tomograms
        failures += found.failures
        folders += found.folders
        passed_over += found.passed_over
    if not rows and not failures:
        others = f", passed over {passed_over} of the CryoET Data Portal's without any" if passed_over else ""
        raise ManifestError(
            f"{archive_uri}: holds no tomogram (looked in {folders} folder{'s' if folders > 1 else ''}{others}); "
            f"expected folders of JPEG or PNG slices, {', '.join(MRC_SUFFIXES)} files or {ZARR_SUFFIX} groups; "
            "check the path"
        )
    name_apart([*rows, *failures])
    _check_names([*rows, *failures], archive_uri)
    return _sorted(rows, MANIFEST), _sorted(failures, FAILURES)


def join_manifests(first: pa.Table, second: pa.Table) -> pa.Table:
    """One MANIFEST of two archives. Raises ManifestError if they use a name for different tomograms."""
    _check_names([*first.to_pylist(), *second.to_pylist()], "the two archives together")
    return pa.concat_tables([first, second]).sort_by("tomo_id")


def check_usable(manifest: pa.Table, unusable: pa.Table) -> None:
    """Raises ManifestError, with the reasons, if there is no tomogram to look at."""
    if len(manifest) == 0:
        raise ManifestError(f"no tomogram of the archive can be used: {'; '.join(unusable['error'].to_pylist()[:3])}")


def read_manifest(uri: str) -> pa.Table:
    """The MANIFEST in the Parquet file `uri`. Raises StorageError if it is unreadable, ManifestError if it is wrong."""
    try:
        table = pq.read_table(io.BytesIO(read_bytes(uri)))
    except pa.ArrowException as error:
        what = str(error).splitlines()[0]
        raise ManifestError(f"{uri}: is not a Parquet file ({what}); make it with 'motor-ray manifest'") from None
    return check_manifest(table, uri)


def write_manifest(table: pa.Table, uri: str, unusable: pa.Table) -> None:
    """Write `table` to the Parquet file `uri`, and FAILURES of tomograms that cannot be used to one beside it.

    Raises ManifestError if `table` is no MANIFEST, StorageError if it cannot be written.
    """
    write_table(check_manifest(table, uri), uri)
    write_table(unusable, _beside(uri))


def read_unusable(uri: str) -> pa.Table:
    """The FAILURES that were written beside the manifest `uri`; none if it was made otherwise."""
    return read_table(_beside(uri)) if exists(_beside(uri)) else FAILURES.empty_table()


def _beside(uri: str) -> str:
    return f"{uri.removesuffix('.parquet')}.failures.parquet"


def check_manifest(table: pa.Table, source: str = "manifest") -> pa.Table:
    """`table` in exactly MANIFEST's columns and types; other columns are left out.

    Raises ManifestError, naming `source`, for missing columns, values of other types, no rows, repeated names, sizes,
    spacings or chunk depths that are not positive, or unknown formats. A spacing or chunk depth of NaN becomes null;
    so does the whole column `chunk_depth` if it is not there.
    """
    if "chunk_depth" not in table.column_names:
        table = table.append_column("chunk_depth", pa.nulls(len(table), pa.int32()))
    missing = [name for name in MANIFEST.names if name not in table.column_names]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise ManifestError(
            f"{source}: lacks the column{plural} {', '.join(missing)}; expected {', '.join(MANIFEST.names)}"
        )
    checked = pa.table([_cast(table[wanted.name], wanted, source) for wanted in MANIFEST], schema=MANIFEST)
    if len(checked) == 0:
        raise ManifestError(f"{source}: has no rows; expected one per tomogram")
    _check_names(checked.select(["tomo_id", "uri"]).to_pylist(), source)
    for name in ("size_z", "size_y", "size_x", *_NULLABLE):
        _refuse(checked, pc.less_equal(checked[name], 0), name, "more than 0", source)
    unknown = pc.invert(pc.is_in(checked["format"], pa.array(FORMATS)))
    _refuse(checked, unknown, "format", f"one of {', '.join(FORMATS)}", source)
    return checked


def _cast(column: pa.ChunkedArray, wanted: pa.Field, source: str) -> pa.ChunkedArray:
    text = pa.types.is_string(wanted.type)
    nullable = wanted.name in _NULLABLE
    try:
        if text and not _is_text(column.type):
            raise pa.ArrowTypeError(f"{column.type} is not text")
        if nullable:
            column = _nan_to_null(column.cast(pa.float64()))  # NaN is what pandas makes of null
        column = column.cast(wanted.type)
    except pa.ArrowException as error:
        raise ManifestError(
            f"{source}: the column {wanted.name} holds {column.type}, expected {wanted.type} ({error}); convert it"
        ) from None
    if column.null_count and not nullable:
        row = pc.index(pc.is_null(column), True).as_py() + 1
        raise ManifestError(f"{source}: the column {wanted.name} is empty in row {row}; every tomogram needs a value")
    return column


def _nan_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.is_nan(column), None, column)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _refuse(table: pa.Table, wrong: pa.ChunkedArray, column: str, expected: str, source: str) -> None:
    at = pc.index(wrong, True).as_py()
    if at >= 0:
        got = table[column][at].as_py()
        raise ManifestError(
            f"{source}: {table['tomo_id'][at]} has {got!r} in {column}, expected {expected}; correct it"
        )


def _check_names(rows: list[dict[str, Any]], source: str) -> None:
    uris: dict[str, str] = {}
    for row in rows:
        tomo_id, uri = row["tomo_id"], row["uri"]
        if not tomo_id:
            raise ManifestError(f"{source}: {uri} has no tomo_id; every tomogram needs a name")
        if tomo_id in uris:
            raise ManifestError(
                f"{source}: two tomograms are called {tomo_id}: {uris[tomo_id]} and {uri}; rename or leave out one"
            )
        uris[tomo_id] = uri


def _sorted(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["tomo_id"])), schema=schema)
