import io
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import starfile
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from motor_ray.config import EvaluateSettings, RunSettings
from motor_ray.errors import ExportError, RunError
from motor_ray.motors.export import chosen_motors, copick_config, export_files, safe_name
from motor_ray.motors.metrics import AXES, best_motors, count_tomograms, official_counts
from motor_ray.results import export_run
from motor_ray.storage import exists, join, read_bytes, read_json, write_bytes, write_json, write_table
from motor_ray.tables import FAILURES, MANIFEST, MOTORS

FORMATS = ("kaggle", "star", "copick", "ndjson", "csv")
SUFFIX = "-bacterial_type_flagellum_motor-1.0_point.ndjson"
PICKS = "motor-ray_0_bacterial-type-flagellum-motor.json"

Row = dict[str, Any]


def tomogram(name: str, spacing: float | None = 10.0, shape: tuple[int, int, int] = (40, 300, 301)) -> Row:
    sizes = dict(zip(("size_z", "size_y", "size_x"), shape, strict=True))
    return {"tomo_id": name, "uri": f"s3://b/{name}", "format": "mrc", "voxel_spacing_angstrom": spacing, **sizes}


def motor(of: Row, place: tuple[float, float, float], score: float = 0.9) -> Row:
    z, y, x = place
    spacing = of["voxel_spacing_angstrom"]
    found = {"height": 34.0, "width": 35.0, "score": score, "n_slices": 9, "voxel_spacing_angstrom": spacing}
    return {"tomo_id": of["tomo_id"], "z": z, "y": y, "x": x, **found}


def motors_of(rows: list[Row]) -> pd.DataFrame:
    table: pd.DataFrame = pa.Table.from_pylist(rows, schema=MOTORS).to_pandas()
    return table


def files_of(to: Any, tomograms: list[Row], motors: list[Row], relion: int = 5) -> dict[str, bytes]:
    """What is written of all `motors`, whatever their score."""
    sizes = {row["tomo_id"]: (row["size_z"], row["size_y"], row["size_x"]) for row in tomograms}
    return export_files(to, chosen_motors(motors_of(motors), to, 0), sizes, sizes, relion)


def make_run(folder: str, tomograms: list[Row], motors: list[Row], unreadable: tuple[str, ...] = ()) -> str:
    """The tables of a finished run."""
    failures: list[Row] = [{"tomo_id": name, "z": None, "uri": "u", "error": "torn"} for name in unreadable]
    failures += [{"tomo_id": row["tomo_id"], "z": 3, "uri": "u", "error": "cut short"} for row in tomograms[:1]]
    write_json(join(folder, "run.json"), {"status": "done", "settings": RunSettings().model_dump(mode="json")})
    write_table(pa.Table.from_pylist(tomograms, schema=MANIFEST), join(folder, "tomograms.parquet"))
    write_table(pa.Table.from_pylist(motors, schema=MOTORS), join(folder, "motors.parquet"))
    write_table(pa.Table.from_pylist(failures, schema=FAILURES), join(folder, "failures.parquet"))
    return folder


def export(run: str, to: Any, out: str, relion: int = 5, threshold: float = 0.15) -> Row:
    return export_run(run, to, out, EvaluateSettings(threshold=threshold), relion=relion)


def read_csv(data: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(data), dtype={"tomo_id": str}, keep_default_na=False, na_values={"z_angstrom": ""})


def read_star(data: bytes, path: Path) -> pd.DataFrame:
    path.write_bytes(data)
    table = starfile.read(path, always_dict=True, parse_as_string=["rlnTomoName"])["particles"]
    assert isinstance(table, pd.DataFrame)
    return table


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Location(Strict):
    x: float
    y: float
    z: float


class Point(Strict):
    """CopickPoint of copick 1.31."""

    location: Location
    transformation_: list[list[float]]
    instance_id: int
    score: float


class Picks(Strict):
    """CopickPicksFile of copick 1.31."""

    pickable_object_name: str
    user_id: str
    session_id: str
    run_name: str
    voxel_spacing: float
    unit: str
    points: list[Point]
    trust_orientation: bool


@st.composite
def archives(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Tomograms and motors in them."""
    names = draw(st.lists(st.text("abz019_-. #/\\[*ü%", min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
    tomograms, motors = [], []
    for name in names:
        shape = draw(st.tuples(*[st.integers(1, 2000)] * 3))
        tomograms.append(tomogram(name, draw(st.floats(0.5, 60)), shape))
        places = st.tuples(*[st.floats(0, size - 1, allow_subnormal=False) for size in shape])
        found = st.lists(st.tuples(places, st.floats(0, 1, allow_subnormal=False)), max_size=3)
        motors += [motor(tomograms[-1], place, score) for place, score in draw(found)]
    return tomograms, motors


def assert_same_places(found: list[tuple[str, float, float, float]], motors: list[Row]) -> None:
    """`found` has tomogram and z, y, x in voxels of each of `motors`, in any order."""
    expected = sorted((row["tomo_id"], row["z"], row["y"], row["x"]) for row in motors)
    assert sorted(name for name, *_ in found) == [name for name, *_ in expected]
    for name in {name for name, *_ in expected}:
        ours, theirs = (np.array([row[1:] for row in rows if row[0] == name]) for rows in (expected, found))
        gaps = np.abs(ours[:, None] - theirs[None]).max(axis=2)
        assert gaps.min(axis=0).max() < 1e-6
        assert gaps.min(axis=1).max() < 1e-6


@given(archives())
def test_csv_has_every_column_and_the_place_in_angstrom(archive: tuple[list[Row], list[Row]]) -> None:
    tomograms, motors = archive
    table = read_csv(files_of("csv", tomograms, motors)[""])
    assert list(table) == [*MOTORS.names, "z_angstrom", "y_angstrom", "x_angstrom"]
    for name in MOTORS.names:
        assert list(table[name]) == pytest.approx([row[name] for row in motors]) or name == "tomo_id"
    spacing = table["voxel_spacing_angstrom"]
    columns = [table["tomo_id"], *(table[f"{axis}_angstrom"] / spacing for axis in "zyx")]
    assert_same_places(list(zip(*columns, strict=True)), motors)


@given(archives(), st.sampled_from([1, 2, 4]))
def test_relion_4_puts_the_pixels_where_the_voxels_are(
    tmp_path_factory: pytest.TempPathFactory, archive: tuple[list[Row], list[Row]], binning: int
) -> None:
    tomograms, motors = archive
    table = read_star(files_of("star", tomograms, motors, relion=4)[""], tmp_path_factory.mktemp("star") / "p.star")
    assert list(table["rlnAutopickFigureOfMerit"]) == pytest.approx([row["score"] for row in motors])
    pixels = table[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy(dtype=float) * binning
    position = pixels + 1  # ParticleSet::getPosition
    voxels = (position - 1) / binning  # relion_tomo_reconstruct_tomogram --bin, whose --x0 is 1
    assert_same_places([(name, *row) for name, row in zip(table["rlnTomoName"], voxels.tolist(), strict=True)], motors)


@given(archives(), st.sampled_from([1, 2, 4]))
def test_relion_5_puts_the_angstrom_where_the_voxels_are(
    tmp_path_factory: pytest.TempPathFactory, archive: tuple[list[Row], list[Row]], binning: int
) -> None:
    tomograms, motors = archive
    table = read_star(files_of("star", tomograms, motors)[""], tmp_path_factory.mktemp("star") / "p.star")
    rows = {row["tomo_id"]: row for row in tomograms}
    found = []
    for _, particle in table.iterrows():
        of = rows[particle["rlnTomoName"]]
        pixel = of["voxel_spacing_angstrom"] / binning
        assert particle["rlnImagePixelSize"] == pytest.approx(of["voxel_spacing_angstrom"])
        voxel = []
        for axis in "zyx":
            centre = of[f"size_{axis}"] * binning / 2  # TomogramSet::loadTomogram
            position = particle[f"rlnCenteredCoordinate{axis.upper()}Angst"] / pixel + centre
            voxel.append(position / binning)  # relion_tomo_reconstruct_tomogram --bin, whose --x0 is 0
        found.append((of["tomo_id"], *voxel))
    assert_same_places(found, motors)


@pytest.mark.parametrize(("size", "angstrom"), [(10, 0), (11, -5)])
def test_relion_5_counts_from_half_the_size_be_it_even_or_odd(size: int, angstrom: float, tmp_path: Path) -> None:
    of = tomogram("a", 10.0, (size, size, size))
    table = read_star(files_of("star", [of], [motor(of, (5, 5, 5))])[""], tmp_path / "p.star")
    assert table[[f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]].to_numpy().tolist() == [[angstrom] * 3]


@given(archives())
def test_the_portals_points_are_voxels_and_nothing_else(archive: tuple[list[Row], list[Row]]) -> None:
    tomograms, motors = archive
    files = files_of("ndjson", tomograms, motors)
    names = {safe_name(row["tomo_id"]) + SUFFIX: row["tomo_id"] for row in motors}
    assert files.keys() == names.keys()
    found = []
    for file, data in files.items():
        for point in map(json.loads, data.decode().splitlines()):
            assert point.keys() == {"type", "location"}
            assert point["type"] == "point"
            found.append((names[file], *(point["location"][axis] for axis in "zyx")))
    assert_same_places(found, motors)


@given(archives())
def test_copicks_points_are_angstrom_from_the_first_voxel(archive: tuple[list[Row], list[Row]]) -> None:
    tomograms, motors = archive
    files = files_of("copick", tomograms, motors)
    names = {f"ExperimentRuns/{safe_name(row['tomo_id'])}/Picks/{PICKS}": row["tomo_id"] for row in motors}
    assert files.keys() == names.keys()
    found = []
    for file, data in files.items():
        picks = Picks.model_validate_json(data)
        assert file.split("/")[1] == picks.run_name
        assert [picks.user_id, picks.session_id, picks.pickable_object_name] == PICKS.removesuffix(".json").split("_")
        assert (picks.unit, picks.session_id, picks.trust_orientation) == ("angstrom", "0", False)
        assert [point.instance_id for point in picks.points] == list(range(1, len(picks.points) + 1))
        scores = [point.score for point in picks.points]
        assert scores == sorted((row["score"] for row in motors if row["tomo_id"] == names[file]), reverse=True)
        for point in picks.points:
            assert np.array_equal(point.transformation_, np.eye(4))
            place = np.array([point.location.z, point.location.y, point.location.x]) / picks.voxel_spacing
            found.append((names[file], *place.tolist()))
    assert_same_places(found, motors)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([6.5, 13.1, 15.6, 19.7]),
            st.none() | st.tuples(*[st.integers(0, 300)] * 3),
            st.lists(st.tuples(st.tuples(*[st.integers(0, 300)] * 3), st.floats(0, 1)), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
    st.floats(0, 1),
)
def test_the_official_metric_of_a_submission_is_what_evaluate_says(drawn: list[Any], threshold: float) -> None:
    tomograms = [tomogram(f"t{number}", spacing) for number, (spacing, _, _) in enumerate(drawn)]
    truth = [place for _, place, _ in drawn]
    motors = motors_of(
        [motor(of, place, score) for of, (_, _, found) in zip(tomograms, drawn, strict=True) for place, score in found]
    )
    names = [of["tomo_id"] for of in tomograms]
    submission = read_csv(export_files("kaggle", chosen_motors(motors, "kaggle", threshold), {}, names, 5)[""])
    solution = pd.DataFrame([place or (-1, -1, -1) for place in truth], columns=AXES)
    solution = solution.assign(**{"tomo_id": names, "Voxel spacing": [spacing for spacing, _, _ in drawn]})
    true = [(name, *place) for name, place in zip(names, truth, strict=True) if place]
    best = best_motors(
        motors,
        pd.DataFrame(true, columns=["tomo_id", "z", "y", "x"]),
        pd.DataFrame({"tomo_id": names, "voxel_spacing_angstrom": [spacing for spacing, _, _ in drawn]}),
    )
    assert official_counts(solution, submission) == count_tomograms(best, threshold, 1000)


def test_a_submission_has_a_row_for_every_tomogram_even_if_it_could_not_be_read(tmp_path: Path) -> None:
    b, a, faint = tomogram("b"), tomogram("a", None), tomogram("faint")
    motors = [motor(b, (1.5, 2, 3), 0.4), motor(b, (4, 5.25, 6), 0.6), motor(faint, (7, 8, 9), 0.1)]
    run = make_run(str(tmp_path / "run"), [b, a, faint], motors, unreadable=("torn", "b"))
    result = export(run, "kaggle", str(tmp_path / "submission.csv"))
    assert (tmp_path / "submission.csv").read_text().splitlines() == [
        "tomo_id,Motor axis 0,Motor axis 1,Motor axis 2",
        "a,-1.0,-1.0,-1.0",
        "b,4.0,5.25,6.0",
        "faint,-1.0,-1.0,-1.0",
        "torn,-1.0,-1.0,-1.0",
    ]
    counts = ("tomograms", "unreadable", "with_motors", "motors")
    assert [result[name] for name in counts] == [4, 2, 1, 1]
    assert result["files"] == [str(tmp_path / "submission.csv")]


@pytest.mark.parametrize("to", FORMATS)
def test_only_motors_from_the_threshold_on_are_written(to: str, tmp_path: Path) -> None:
    of = tomogram("a")
    run = make_run(str(tmp_path / "run"), [of], [motor(of, (1, 2, 3), 0.5), motor(of, (4, 5, 6), 0.7)])
    counts = {at: export(run, to, str(tmp_path / str(at)), threshold=at)["motors"] for at in (0.5, 0.6, 0.8)}
    assert counts == {0.5: 1 if to == "kaggle" else 2, 0.6: 1, 0.8: 0}


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("to", FORMATS)
def test_what_is_told_is_what_lies_there(to: str, place: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}-{to}"
    a, b = tomogram("a"), tomogram("b")
    run = make_run(join(folder, "run"), [a, b], [motor(a, (1, 2, 3)), motor(b, (4, 5, 6)), motor(b, (7, 8, 9))])
    result = export(run, to, join(folder, "out"))
    expected = {
        "ndjson": [f"out/{name}{SUFFIX}" for name in "ab"],
        "copick": [*(f"out/ExperimentRuns/{name}/Picks/{PICKS}" for name in "ab"), "out/copick_config.json"],
    }.get(to, ["out"])
    assert result["files"] == [join(folder, name) for name in expected]
    assert all(read_bytes(uri) for uri in result["files"])
    assert result["with_motors"] == 2


@pytest.mark.parametrize("tomograms", [[], [tomogram("a"), tomogram("b", None)]], ids=["empty", "no motors"])
def test_a_run_without_motors_gives_tables_without_rows(tomograms: list[Row], tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), tomograms, [])
    files = {to: export(run, to, str(tmp_path / to))["files"] for to in FORMATS}
    assert (read_csv(read_bytes(files["kaggle"][0]))[AXES] == -1).all(axis=None)
    assert len(read_csv(read_bytes(files["kaggle"][0]))) == len(tomograms)
    assert len(read_csv(read_bytes(files["csv"][0]))) == 0
    assert len(read_star(read_bytes(files["star"][0]), tmp_path / "again.star")) == 0
    assert files["ndjson"] == []
    assert [Path(uri).name for uri in files["copick"]] == ["copick_config.json"]


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten_or_added_to(to: str, place: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}-{to}"
    a = tomogram("a")
    run = make_run(join(folder, "run"), [a], [motor(a, (1, 2, 3))])
    write_bytes(join(folder, "file"), b"mine")
    write_bytes(join(folder, "folder", "thesis.tex"), b"mine")
    for out in ("file", "folder"):
        with pytest.raises(ExportError, match=rf"{out}: is there already.* remove it or give another --out"):
            export(run, to, join(folder, out))
    assert read_bytes(join(folder, "file")) == read_bytes(join(folder, "folder", "thesis.tex")) == b"mine"
    assert not any(exists(join(folder, "folder", name)) for name in ("copick_config.json", f"a{SUFFIX}"))


@pytest.mark.parametrize("to", ["star", "copick"])
def test_angstrom_of_an_unknown_spacing_are_refused_unless_no_motor_needs_them(to: str, tmp_path: Path) -> None:
    known, unknown, faint = tomogram("known"), tomogram("unknown", None), tomogram("faint", None)
    motors = [motor(known, (1, 2, 3)), motor(faint, (1, 2, 3), 0.1)]
    run = make_run(str(tmp_path / "run"), [known, unknown, faint], motors)
    assert export(run, to, str(tmp_path / "fine"))["motors"] == 1
    make_run(run, [known, unknown, faint], [*motors, motor(unknown, (4, 5, 6))])
    remedy = r"1 of 2 tomograms with motors .* such as unknown, .*--archive\.voxel-spacing-angstrom.*--relion 4"
    with pytest.raises(ExportError, match=remedy):
        export(run, to, str(tmp_path / "out"))
    assert not exists(str(tmp_path / "out"))


def test_voxels_need_no_spacing(tmp_path: Path) -> None:
    of = tomogram("a", None)
    motors = [motor(of, (1.5, 2, 3))]
    star = read_star(files_of("star", [of], motors, relion=4)[""], tmp_path / "p.star")
    assert star[["rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ"]].to_numpy().tolist() == [[3, 2, 1.5]]
    table = read_csv(files_of("csv", [of], motors)[""])
    assert table[["z", "y", "x"]].to_numpy().tolist() == [[1.5, 2, 3]]
    assert table["z_angstrom"].isna().all()
    location = json.loads(files_of("ndjson", [of], motors)[f"a{SUFFIX}"])["location"]
    assert location == {"x": 3, "y": 2, "z": 1.5}
    assert read_csv(files_of("kaggle", [of], motors)[""])[AXES].to_numpy().tolist() == [[1.5, 2, 3]]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=6, unique=True))
def test_every_name_makes_one_part_of_a_path_of_its_own(names: list[str]) -> None:
    parts = [safe_name(name) for name in [*names, "..", ".", "/", "../../etc/passwd"]]
    assert len(set(parts)) == len({*names, "..", ".", "/", "../../etc/passwd"})
    for part in parts:
        assert PurePosixPath(part).parts == (part,)
        assert not part.startswith(".")
        assert not set("/\\*?[]:\0\n") & set(part)


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("tomo_00e047", "TS_026", "rec-12.5A (bin 4)", "Messung_ü"):
        assert safe_name(name) == name


@pytest.mark.parametrize("to", ["copick", "ndjson"])
def test_no_name_leads_out_of_the_folder(to: str, tmp_path: Path) -> None:
    tomograms = [tomogram(name) for name in ("../../up", "/root", "a/b", "..", ".hidden", "a%2Fb", "c:\\d", "[x]*")]
    run = make_run(str(tmp_path / "run"), tomograms, [motor(of, (1, 2, 3)) for of in tomograms])
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "out"
    files = [Path(uri) for uri in export(run, to, str(out))["files"]]
    assert all(file.resolve().is_relative_to(out) and file.is_file() for file in files)
    assert len({file for file in files if file.name != "copick_config.json"}) == len(tomograms)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "deep")} == before


def test_names_that_mean_something_to_star_are_quoted(tmp_path: Path) -> None:
    names = ["data_5", "loop_", "_x", "#1", "a b", "a#b", ";", "$x", "007", "NA", "ü/ä", "stop_", "global_", "save_x"]
    tomograms = [tomogram(name) for name in names]
    for relion in (4, 5):
        motors = [motor(of, (1, 2, 3)) for of in tomograms]
        table = read_star(files_of("star", tomograms, motors, relion)[""], tmp_path / f"{relion}.star")
        assert table["rlnTomoName"].tolist() == names


@pytest.mark.parametrize("name", ['a"b', "it's", "a\nb", "a\tb", "a\x00"])
def test_names_that_star_cannot_hold_are_refused(name: str) -> None:
    of = tomogram(name)
    with pytest.raises(ExportError, match=r"STAR cannot hold such a name; rename it or export to another format"):
        files_of("star", [of], [motor(of, (1, 2, 3))])


def test_odd_names_survive_a_table() -> None:
    names = ['a"b', "a,b", "a\nb", " a ", "ü"]
    tomograms = [tomogram(name) for name in names]
    motors = [motor(of, (1, 2, 3)) for of in tomograms]
    for to in ("csv", "kaggle"):
        assert sorted(read_csv(files_of(to, tomograms, motors)[""])["tomo_id"]) == sorted(names)


@pytest.mark.parametrize(("root", "overlay"), [("/data/out", "local:///data/out"), ("s3://b/out", "s3://b/out")])
def test_copick_finds_the_project_where_it_was_written(root: str, overlay: str) -> None:
    config = json.loads(copick_config(root))
    assert (config["config_type"], config["overlay_root"]) == ("filesystem", overlay)
    (found,) = config["pickable_objects"]
    assert (found["name"], found["identifier"], found["is_particle"]) == (
        "bacterial-type-flagellum-motor",
        "GO:0120100",
        True,
    )


def test_the_copick_project_of_a_relative_path_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = tomogram("a")
    run = make_run(str(tmp_path / "run"), [a], [motor(a, (1, 2, 3))])
    monkeypatch.chdir(tmp_path)
    export(run, "copick", "project")
    config = read_json(str(tmp_path / "project" / "copick_config.json"))
    assert config["overlay_root"] == f"local://{tmp_path}/project"


def test_a_run_that_is_not_there_or_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run\.json; give the --out of a motor-ray detect"):
        export(str(tmp_path / "none"), "csv", str(tmp_path / "out"))
    run = make_run(str(tmp_path / "run"), [tomogram("a")], [])
    write_json(join(run, "run.json"), {"status": "running", "settings": {}})
    with pytest.raises(RunError, match="has not finished"):
        export(run, "csv", str(tmp_path / "out"))
    assert not exists(str(tmp_path / "out"))
