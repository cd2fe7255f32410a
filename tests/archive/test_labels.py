from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motor_ray.archive.labels import (
    COLUMNS,
    MOTOR_COLUMNS,
    TOMOGRAM_COLUMNS,
    Labels,
    read_labels,
    split_labelled,
    split_tomograms,
    with_guesses,
    write_labels,
)
from motor_ray.errors import LabelsError, StorageError

HEADER = ",".join(COLUMNS)
EMPTY_ROW = "0,tomo_003acc,-1.0,-1.0,-1.0,500,1912,1847,6.5,0"
MOTOR_ROW = "1,tomo_00e047,169.0,546.0,603.0,300,959,928,15.6,1"
FIRST_OF_TWO = "2,tomo_00e463,235.0,403.0,137.0,500,924,956,19.7,2"
SECOND_OF_TWO = "3,tomo_00e463,243.0,363.0,153.0,500,924,956,19.7,2"
GOOD = [EMPTY_ROW, MOTOR_ROW, FIRST_OF_TWO, SECOND_OF_TWO]


def write(folder: Path, rows: list[str], header: str = HEADER) -> str:
    path = folder / "train_labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_each_tomogram_has_one_row_and_each_motor_one(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, GOOD))
    assert labels.tomograms.to_dict("list") == {
        "tomo_id": ["tomo_003acc", "tomo_00e047", "tomo_00e463"],
        "size_z": [500, 300, 500],
        "size_y": [1912, 959, 924],
        "size_x": [1847, 928, 956],
        "voxel_spacing_angstrom": [6.5, 15.6, 19.7],
        "n_motors": [0, 1, 2],
    }
    assert labels.motors_of("tomo_00e463").tolist() == [[235, 403, 137], [243, 363, 153]]
    assert labels.motors_of("tomo_003acc").shape == (0, 3)


def test_a_tomogram_that_the_labels_do_not_mention_is_not_one_without_motors(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, GOOD))
    with pytest.raises(LabelsError, match="tomo_ffffff: is not among the 3 tomograms"):
        labels.motors_of("tomo_ffffff")


def test_reading_and_writing_again_gives_the_same_file(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD)
    copy = str(tmp_path / "folder" / "copy.csv")
    write_labels(read_labels(source), copy)
    assert Path(copy).read_text() == Path(source).read_text()


@settings(max_examples=25)
@given(st.lists(st.lists(st.tuples(*[st.floats(0, 63.99)] * 3), max_size=4, unique=True), min_size=1, max_size=6))
def test_whatever_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, places: list[list[tuple[float, float, float]]]
) -> None:
    ids = [f"tomo_{number:06x}" for number in range(len(places))]
    sizes = {"size_z": 64, "size_y": 64, "size_x": 64, "voxel_spacing_angstrom": 13.3}
    tomograms = pd.DataFrame([{"tomo_id": t, **sizes, "n_motors": len(p)} for t, p in zip(ids, places, strict=True)])
    rows = [(tomo_id, *place) for tomo_id, motors in zip(ids, places, strict=True) for place in motors]
    motors = pd.DataFrame(rows, columns=["tomo_id", "z", "y", "x"])
    path = str(tmp_path_factory.mktemp("labels") / "labels.csv")
    write_labels(Labels(tomograms, motors), path)
    again = read_labels(path)
    pd.testing.assert_frame_equal(again.tomograms, tomograms)
    for tomo_id, expected in zip(ids, places, strict=True):
        np.testing.assert_array_equal(again.motors_of(tomo_id), np.reshape(expected, (-1, 3)))


def test_fewer_motors_than_declared_are_accepted_as_in_the_public_labels(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, [FIRST_OF_TWO]))
    assert labels.tomograms["n_motors"].tolist() == [2]
    assert len(labels.motors) == 1


def test_other_columns_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = Path(write(tmp_path, [f"{row},x" for row in GOOD], f"{HEADER},remark"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_labels(str(path)).motors) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([EMPTY_ROW, MOTOR_ROW.replace("169.0", "middle")], r"row 2 has 'middle' in 'Motor axis 0', expected a number"),
        ([MOTOR_ROW.replace("169.0", "")], r"row 1 has '' in 'Motor axis 0'"),
        ([MOTOR_ROW.replace("169.0", "nan")], r"row 1 has 'nan'"),
        ([MOTOR_ROW.replace(",959,", ",959.5,")], r"row 1 has '959.5' in 'Array shape \(axis 1\)', expected a whole"),
        ([MOTOR_ROW.replace("tomo_00e047", " ")], r"row 1 without a tomo_id"),
        ([EMPTY_ROW, MOTOR_ROW.replace("1,tomo", "0,tomo")], r"row_id 0 stands in rows 1, 2; every row_id must be"),
        ([FIRST_OF_TWO, FIRST_OF_TWO.replace("2,tomo", "9,tomo")], r"tomo_00e463 has \(235, 403, 137\) more than once"),
        (
            [EMPTY_ROW, EMPTY_ROW.replace("0,tomo", "9,tomo")],
            r"tomo_003acc has \(-1, -1, -1\) more than once, in rows 1, 2",
        ),
        ([FIRST_OF_TWO, SECOND_OF_TWO.replace("19.7", "19.3")], r"different values in 'Voxel spacing': 19.7, 19.3"),
        ([FIRST_OF_TWO, SECOND_OF_TWO.replace(",500,", ",600,")], r"'Array shape \(axis 0\)': 500, 600; its rows must"),
        ([FIRST_OF_TWO, SECOND_OF_TWO[:-1] + "3"], r"different values in 'Number of motors': 2, 3"),
        ([MOTOR_ROW.replace("15.6", "0")], r"0 in 'Voxel spacing' \(row 1\), expected more than zero"),
        ([MOTOR_ROW.replace(",300,", ",-300,")], r"-300 in 'Array shape \(axis 0\)'"),
        (
            [MOTOR_ROW.replace("169.0", "300")],
            r"300 in 'Motor axis 0' \(row 1\), outside its shape of 300; expected 0 to 299",
        ),
        ([MOTOR_ROW.replace("603.0", "-1")], r"-1 in 'Motor axis 2'.*or -1 in all three axes"),
        ([MOTOR_ROW, "9,tomo_00e047,-1,-1,-1,300,959,928,15.6,1"], r"a row of -1, 'no motor', beside rows of motors"),
        ([MOTOR_ROW[:-1] + "0"], r"declares 0 in 'Number of motors' but has 1 rows"),
        ([EMPTY_ROW[:-1] + "2"], r"declares 2 in 'Number of motors' but has 0 rows"),
        ([], r"holds no rows; expected one per motor"),
    ],
)
def test_labels_that_contradict_themselves_are_refused_with_the_place(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    path = write(tmp_path, rows)
    with pytest.raises(LabelsError, match=message) as raised:
        read_labels(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    header = HEADER.replace("Voxel spacing", "spacing").replace("Number of motors", "motors")
    with pytest.raises(LabelsError, match="lacks the columns 'Voxel spacing', 'Number of motors'; expected 'row_id', "):
        read_labels(write(tmp_path, GOOD, header))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.csv").write_bytes(content)
    with pytest.raises(LabelsError, match="holds no rows"):
        read_labels(str(tmp_path / "empty.csv"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'row_id,tomo_id\n1,2,3\n1,2\n"'])
def test_a_file_that_is_not_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(LabelsError, match="is not a CSV file"):
        read_labels(str(tmp_path / "labels.csv"))


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.csv: cannot be read"):
        read_labels(str(tmp_path / "nowhere.csv"))


def test_labels_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, GOOD))
    outside = labels.motors.assign(z=9999.0)
    strays = pd.concat([labels.motors, labels.motors.iloc[:1].assign(tomo_id="tomo_stray")])
    for motors, message in ((outside, "outside its shape"), (strays, "tomo_stray, which is not among the tomograms")):
        with pytest.raises(LabelsError, match=message):
            write_labels(Labels(labels.tomograms, motors), str(tmp_path / "new.csv"))
    with pytest.raises(LabelsError, match="no tomograms"):
        write_labels(Labels(labels.tomograms.iloc[:0], labels.motors.iloc[:0]), str(tmp_path / "new.csv"))
    assert not (tmp_path / "new.csv").exists()


@settings(deadline=None)
@given(st.sets(st.text(min_size=1), max_size=60), st.integers(0, 2**32))
def test_parts_are_disjoint_and_complete_and_none_is_empty_from_three_tomograms_on(ids: set[str], seed: int) -> None:
    parts = split_tomograms(ids, seed)
    assert list(parts) == ["train", "validation", "test"]
    everything = [tomo_id for part in parts.values() for tomo_id in part]
    assert sorted(everything) == sorted(ids)
    assert len(ids) < 3 or all(parts.values())
    assert not ids or parts["train"]


def test_the_split_depends_on_the_ids_and_the_seed_alone() -> None:
    ids = [f"tomo_{number:06x}" for number in range(648)]
    parts = split_tomograms(ids)
    assert {part: len(members) for part, members in parts.items()} == {"train": 518, "validation": 65, "test": 65}
    assert split_tomograms([*reversed(ids), *ids]) == parts
    assert split_tomograms(ids, seed=421) != parts


def guessed(*tomo_ids: str) -> Labels:
    tomograms = pd.DataFrame([(name, 20, 30, 40, 10.0, 1) for name in tomo_ids], columns=TOMOGRAM_COLUMNS)
    motors = pd.DataFrame([(name, 1.0, 2.0, 3.0) for name in tomo_ids], columns=MOTOR_COLUMNS)
    return Labels(tomograms, motors, frozenset(tomo_ids), motors.assign(z=9.0))


@given(st.sets(st.text("ab", min_size=1), min_size=3), st.sets(st.text("cd", min_size=1)), st.integers(0, 99))
def test_guesses_are_all_learned_from_and_change_nothing_else_of_the_split(known, guesses, seed):
    tomograms = pd.DataFrame({"tomo_id": sorted(known | guesses)})
    split = split_labelled(known | guesses, Labels(tomograms, tomograms, frozenset(guesses)), seed)
    alone = split_tomograms(known, seed)
    assert split["train"] == alone["train"] + sorted(guesses)
    assert (split["validation"], split["test"]) == (alone["validation"], alone["test"])


def test_guesses_stand_beside_labels_and_are_known_as_such(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, GOOD))
    both = with_guesses(labels, guessed("g"))
    assert both.guessed == {"g"}
    assert both.motors_of("g").tolist() == [[1, 2, 3]]
    assert both.doubtful_of("g").tolist() == [[9, 2, 3]]
    assert both.motors_of("tomo_00e463").tolist() == labels.motors_of("tomo_00e463").tolist()
    assert len(both.doubtful_of("tomo_00e463")) == len(labels.doubtful) == 0
    write_labels(both, str(tmp_path / "both.csv"))
    again = read_labels(str(tmp_path / "both.csv"))
    assert len(again.tomograms) == 4
    assert again.guessed == {"g"}
    text = (tmp_path / "both.csv").read_text()
    (tmp_path / "sheet.csv").write_text(text.replace("True", "TRUE").replace("False", "FALSE"))
    assert read_labels(str(tmp_path / "sheet.csv")).guessed == {"g"}
    (tmp_path / "odd.csv").write_text(text.replace("True", "yes"))
    with pytest.raises(LabelsError, match="has 'yes' in 'guessed by a model', expected True or False"):
        read_labels(str(tmp_path / "odd.csv"))


def test_a_guess_does_not_take_the_place_of_a_label(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path, GOOD))
    with pytest.raises(LabelsError, match="tomo_00e047: is labelled already"):
        with_guesses(labels, guessed("tomo_00e047"))
