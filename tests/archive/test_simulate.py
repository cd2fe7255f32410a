import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import mrcfile
import numpy as np
import pytest
import scipy.fft
import zarr

from motor_ray.archive.clutter import place_everything
from motor_ray.archive.density import Canvas, draw_body, draw_specimen, motor_rings
from motor_ray.archive.imaging import SimulationSettings, contrast_transfer, image_specimen, to_grey
from motor_ray.archive.labels import read_labels
from motor_ray.archive.simulate import (
    MOTOR_COUNTS,
    SPACINGS_ANGSTROM,
    motor_counts_like_public,
    simulate_archive,
    simulate_tomogram,
    tomogram_names,
)
from motor_ray.archive.specimen import CLOSEST_MOTORS_ANGSTROM, Cell, Layout, Site, place_cells_and_motors
from motor_ray.archive.volumes import Format
from motor_ray.errors import StorageError, TomogramError

SMALL = (24, 96, 96)
COARSE_ANGSTROM = 19.7


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def layout(seed: int, n_motors: int, extent: tuple[float, float, float] = (1000.0, 3000.0, 3000.0)) -> Layout:
    return place_everything(np.array(extent), n_motors, random(seed), random(seed + 1), 1.0)


# One tomogram


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_tomogram() -> None:
    first, again, other = (simulate_tomogram(seed, SMALL) for seed in (3, 3, 4))
    assert first.volume.tobytes() == again.volume.tobytes()
    assert first.motors.tolist() == again.motors.tolist()
    assert first.volume.tobytes() != other.volume.tobytes()


@pytest.mark.parametrize("n_motors", [0, 1, 2])
def test_a_tomogram_is_uint8_of_the_shape_with_as_many_motors_inside_as_asked(n_motors: int) -> None:
    shape = (20, 110, 130)
    tomogram = simulate_tomogram(1, shape, voxel_spacing_angstrom=COARSE_ANGSTROM, n_motors=n_motors)
    assert tomogram.volume.dtype == np.uint8
    assert tomogram.volume.shape == shape
    assert tomogram.motors.shape == (n_motors, 3)
    assert tomogram.voxel_spacing_angstrom == COARSE_ANGSTROM
    assert np.all((tomogram.motors > 0) & (tomogram.motors < np.array(shape) - 1))


def test_the_voxel_spacing_is_one_of_the_public_ones_and_shows_enough_of_a_cell() -> None:
    spacings = {simulate_tomogram(seed, (64, 32, 320), n_motors=0).voxel_spacing_angstrom for seed in range(3)}
    assert spacings == {max(SPACINGS_ANGSTROM)}  # 32 voxels are too few at any spacing, so the coarsest


def test_motors_that_find_no_room_are_refused_with_the_remedy() -> None:
    with pytest.raises(TomogramError, match=r"60 motors.*ask for fewer motors, a larger shape"):
        simulate_tomogram(0, SMALL, voxel_spacing_angstrom=COARSE_ANGSTROM, n_motors=60)


def test_a_tomogram_that_cannot_be_is_refused() -> None:
    with pytest.raises(TomogramError, match="8 or more each"):
        simulate_tomogram(0, (1, 320, 320))
    with pytest.raises(TomogramError, match="spacing of 0 angstrom"):
        simulate_tomogram(0, SMALL, voxel_spacing_angstrom=0.0)
    with pytest.raises(TomogramError, match="-1 motors"):
        simulate_tomogram(0, SMALL, n_motors=-1)


# The specimen


@pytest.mark.parametrize("seed", range(5))
def test_motors_keep_their_distance_and_stand_on_an_inner_membrane_within_the_margins(seed: int) -> None:
    extent = np.array([1000.0, 5100.0, 5100.0])
    cells, motors, _ = place_cells_and_motors(extent, 4, random(seed))
    points = np.array([site.motor() for site in motors])
    apart = np.linalg.norm(points[:, None] - points, axis=-1)[np.triu_indices(4, 1)]
    assert apart.min() >= CLOSEST_MOTORS_ANGSTROM
    assert np.all((points > [249, 449, 449]) & (points < extent - [249, 449, 449]))
    heights = [min(abs(c.height(*s.point[:, None])[0] + c.periplasm_angstrom) for c in cells) for s in motors]
    assert max(heights) < 5.0


def test_motors_lie_along_z_as_in_the_public_labels() -> None:
    extent = np.array([4000.0, 9000.0, 9000.0])
    depths = [place_cells_and_motors(extent, 1, random(seed))[1][0].motor()[0] / extent[0] for seed in range(60)]
    assert np.mean(depths) == pytest.approx(0.467, abs=0.08)
    assert np.std(depths) == pytest.approx(0.165, abs=0.06)


def test_the_height_above_a_straight_cell_is_the_distance_to_its_surface() -> None:
    cell = Cell(
        start=np.array([0.0, 0, 0]), end=np.array([0.0, 0, 1000.0]), radius_angstrom=500.0, periplasm_angstrom=300.0
    )
    z, y, x = np.array([[600.0, 0, 0], [0, 0, 500.0], [0, 0, 1700.0]]).T
    assert cell.height(z, y, x).tolist() == [100.0, -500.0, 200.0]


def drawn_motor(axis: tuple[float, float, float], size: int = 61) -> np.ndarray:
    canvas = Canvas(np.zeros((size, size, size), np.float32), 16.0, (0, 0, 0))
    site = Site(np.full(3, (size - 1) / 2 * 16.0), np.array(axis), 300.0)
    draw_body(canvas, site, motor_rings(300.0), clearing_angstrom=300.0)
    return canvas.values


def test_a_motor_turned_about_its_axis_is_the_same() -> None:
    motor = drawn_motor((1, 0, 0))
    np.testing.assert_allclose(np.rot90(motor, axes=(1, 2)), motor, atol=1e-4)
    np.testing.assert_allclose(motor.transpose(0, 2, 1), motor, atol=1e-4)


def test_a_motor_on_another_axis_is_the_same_motor_turned() -> None:
    np.testing.assert_allclose(drawn_motor((0, 0, 1)), drawn_motor((1, 0, 0)).transpose(1, 2, 0), atol=1e-4)


def test_the_c_ring_is_450_angstrom_across() -> None:
    row = drawn_motor((1, 0, 0))[30 - 7, 30]  # 112 angstrom below the inner membrane
    dense = np.flatnonzero(row > 0.8)
    assert (dense[-1] - dense[0] + 1) * 16.0 == pytest.approx(450, abs=17)
    assert row[30 - 8 : 30 - 5].max() < 0.8  # hollow between the C-ring and the export apparatus


def test_a_specimen_with_and_without_its_motor_differs_only_there() -> None:
    whole = layout(5, 1)
    without = replace(whole, motors=(), threads=whole.threads[1:])
    canvases = []
    for one in (whole, without):
        canvas = Canvas(np.zeros((50, 150, 150), np.float32), 20.0, (0, 0, 0))
        draw_specimen(canvas, one, random())
        canvases.append(canvas.values)
    changed = np.argwhere(canvases[0] != canvases[1]) * 20.0
    places = np.concatenate([whole.motors[0].point[None], whole.threads[0].path])
    nearest = np.linalg.norm(changed[:, None] - places, axis=2).min(axis=1)
    assert len(changed) > 200
    assert nearest.max() < 800.0


# The microscope


def test_nothing_is_measured_in_the_missing_wedge() -> None:
    settings = SimulationSettings(tilt_degrees=60.0)
    density = random().standard_normal((32, 40, 48)).astype(np.float32)
    power = np.abs(scipy.fft.fftn(image_specimen(density, 16.0, settings, random(1)).astype(np.float64))) ** 2
    z, x = np.fft.fftfreq(32)[:, None], np.fft.fftfreq(48)
    beyond = np.degrees(np.arctan2(np.abs(z), np.abs(x))) > 60.5
    power = power.sum(axis=1)
    assert power[beyond].sum() < 1e-9 * power.sum()
    assert np.all(power[~beyond] > 0)


def test_dense_things_are_dark() -> None:
    density = np.zeros((32, 32, 32), np.float32)
    density[15:18, 15:18, 15:18] = 5.0
    image = image_specimen(density, 16.0, SimulationSettings(signal_to_noise=1e3), random())
    assert image[16, 16, 16] == image.min()


def test_noise_falls_with_the_square_root_of_the_dose() -> None:
    empty = np.zeros((16, 32, 32), np.float32)
    weak, strong = (
        image_specimen(empty, 16.0, SimulationSettings(signal_to_noise=ratio), random()) for ratio in (1, 4)
    )
    np.testing.assert_allclose(weak, 4 * strong, rtol=1e-3, atol=1e-5)


def test_contrast_first_vanishes_at_the_frequency_that_the_defocus_says() -> None:
    defocus = 80_000.0
    zero = (np.pi - np.arctan(0.08 / np.sqrt(1 - 0.08**2))) / (np.pi * 0.0197 * defocus)
    assert contrast_transfer(np.array([zero]), defocus) == pytest.approx(0, abs=1e-9)
    assert np.all(contrast_transfer(np.linspace(0, 0.999 * zero, 50), defocus) > 0)


def test_grey_levels_span_what_the_public_tomograms_span() -> None:
    values = random().standard_normal((20, 60, 60)).astype(np.float32) * 7 - 100
    low, high = np.transpose([np.percentile(to_grey(values, 0.0, random(seed)), [5, 95]) for seed in range(40)])
    assert low.mean() == pytest.approx(41, abs=5)
    assert high.mean() == pytest.approx(204, abs=5)


@pytest.mark.parametrize(
    "wrong", [{"signal_to_noise": 0.0}, {"tilt_degrees": 90.0}, {"defocus_angstrom": (2.0, 1.0)}], ids=str
)
def test_a_microscope_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimulationSettings(**wrong)  # type: ignore[arg-type]


# The archive


def test_an_archive_is_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    for processes in (1, 2):
        simulate_archive(str(tmp_path / str(processes)), 3, 7, SMALL, processes=processes)
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_the_labels_on_disk_are_the_ones_returned_and_every_slice_is_there(tmp_path: Path) -> None:
    done: list[int] = []
    labels = simulate_archive(str(tmp_path), 3, 1, SMALL, processes=1, progress=done.append)
    stored = read_labels(str(tmp_path / "train_labels.csv"))
    assert done == [1, 2, 3]
    assert stored.tomograms.to_dict("list") == labels.tomograms.to_dict("list")
    for tomo_id in labels.tomograms["tomo_id"]:
        np.testing.assert_allclose(stored.motors_of(tomo_id), labels.motors_of(tomo_id), rtol=1e-12)
        slices = sorted(path.name for path in (tmp_path / "train" / tomo_id).iterdir())
        assert slices == [f"slice_{z:04d}.jpg" for z in range(SMALL[0])]


def test_every_format_holds_the_same_voxels_and_their_spacing(tmp_path: Path) -> None:
    formats: tuple[Format, ...] = ("jpeg", "mrc", "zarr")
    for format in formats:
        simulate_archive(str(tmp_path / format), 1, 2, SMALL, format, motor_counts=[1], processes=1)
    name = tomogram_names(1, 2)[0]
    expected = simulate_tomogram(int(name[5:], 16), SMALL, n_motors=1)
    with mrcfile.open(tmp_path / "mrc" / "train" / f"{name}.mrc") as file:
        np.testing.assert_array_equal(file.data, expected.volume)
        assert file.voxel_size.x == pytest.approx(expected.voxel_spacing_angstrom)
    group = zarr.open_group(tmp_path / "zarr" / "train" / f"{name}.zarr", mode="r")
    np.testing.assert_array_equal(np.asarray(group["0"]), expected.volume)
    attributes = json.loads((tmp_path / "zarr" / "train" / f"{name}.zarr" / ".zattrs").read_text())
    levels = attributes["multiscales"][0]["datasets"]
    assert levels[0]["coordinateTransformations"][0]["scale"] == [expected.voxel_spacing_angstrom] * 3
    jpeg = cv2.imread(str(tmp_path / "jpeg" / "train" / name / "slice_0011.jpg"), cv2.IMREAD_UNCHANGED)
    assert jpeg is not None
    assert np.abs(jpeg.astype(int) - expected.volume[11]).mean() < 6.0


def test_as_many_tomograms_as_the_public_archive_have_exactly_its_mix_of_motors() -> None:
    assert Counter(motor_counts_like_public(648, 0)) == MOTOR_COUNTS


@pytest.mark.parametrize("tomograms", [3, 8, 20])
def test_a_small_archive_has_a_tomogram_without_motors_and_one_with_several(tomograms: int) -> None:
    for seed in range(20):
        counts = motor_counts_like_public(tomograms, seed)
        assert len(counts) == tomograms
        assert min(counts) == 0
        assert max(counts) >= 2


def test_names_are_unique_and_do_not_depend_on_how_many_there_are() -> None:
    names = tomogram_names(3000, 420)
    assert len(set(names)) == 3000
    assert tomogram_names(10, 420) == names[:10]


def test_an_archive_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train" / "tomo_ffffff").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"already holds an archive; give another folder, or delete"):
        simulate_archive(str(tmp_path), 1, 0, SMALL)


def test_a_bucket_is_refused() -> None:
    with pytest.raises(StorageError, match="local folders only"):
        simulate_archive("memory://bucket/archive", 1, 0, SMALL)


@pytest.mark.parametrize(
    ("tomograms", "counts", "message"), [(0, None, "ask for 1 or more"), (2, [1], "give one number for each")]
)
def test_numbers_that_do_not_fit_are_refused(
    tmp_path: Path, tomograms: int, counts: list[int] | None, message: str
) -> None:
    with pytest.raises((StorageError, TomogramError), match=message):
        simulate_archive(str(tmp_path), tomograms, 0, SMALL, motor_counts=counts)
