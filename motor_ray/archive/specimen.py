"""What lies where in a simulated specimen: cells, motors, and what is easily mistaken for a motor.

Geometry only, in angstrom and in the order z, y, x, measured from the centre of the tomogram's first voxel. Knows
nothing of voxels, densities or images.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motor_ray.errors import TomogramError

Floats = NDArray[np.floating[Any]]

CLOSEST_MOTORS_ANGSTROM = 432.0
"""The closest two motors of one tomogram in the public labels."""

MOTOR_DEPTH_ANGSTROM = 60.0
"""A motor's labelled point lies on its axis, this far below the inner membrane, between MS-ring and C-ring."""

MOTOR_Z_MEAN, MOTOR_Z_DEVIATION = 0.467, 0.165
"""Where motors lie along z in the public labels, as a fraction of the tomogram's thickness."""

MARGIN_ANGSTROM = (250.0, 450.0, 450.0)
"""Motors keep this distance from the volume's faces along z, y, x, or 30 % of the volume if it is small."""

LAYOUT_ATTEMPTS = 40

STEP_ANGSTROM = 40.0
"""Between the points of a thread."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """A bacterium: a capsule whose surface undulates, with an envelope of two membranes and a wall."""

    start: Floats
    """`(3,)` one end of the capsule's axis."""

    end: Floats
    """`(3,)` the other end."""

    radius_angstrom: float
    """From the axis to the outer membrane."""

    periplasm_angstrom: float
    """From the outer to the inner membrane."""

    waves: tuple[tuple[float, float, float, float], ...] = ()
    """Undulation of the whole envelope over y and x: amplitude, wave numbers along y and x, phase."""

    bulges: tuple[tuple[float, float, float, float], ...] = ()
    """The same for the outer membrane alone."""

    def height(self, z: Floats, y: Floats, x: Floats) -> Floats:
        """Angstrom above the outer membrane (below zero inside) at coordinates that broadcast together."""
        return self.distance(z, y, x) - self.swell(y, x)

    def distance(self, z: Floats, y: Floats, x: Floats) -> Floats:
        """Angstrom from the capsule's axis."""
        span = self.end - self.start
        length = float(np.linalg.norm(span))
        u, v, w = (float(part) for part in span / length)
        z, y, x = (axis - float(begin) for axis, begin in zip((z, y, x), self.start, strict=True))
        along = z * u + y * v + x * w
        nearest = np.clip(along, 0.0, length)
        square = (z * z + (y * y + x * x)) - nearest * (2.0 * along - nearest)
        distance: Floats = np.sqrt(np.maximum(square, 0.0))
        return distance

    def swell(self, y: Floats, x: Floats) -> Floats:
        """Angstrom from the axis to the outer membrane, which undulates with y and x."""
        return self.radius_angstrom + undulation(self.waves, y, x)

    def sites(self, number: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """`(number, 3)` points spread over the inner membrane, and the outward unit normal at each."""
        span = self.end - self.start
        length = float(np.linalg.norm(span))
        axis = span / length
        inner = self.radius_angstrom - self.periplasm_angstrom
        along = rng.uniform(-inner, length + inner, number)
        normals = rng.standard_normal((number, 3))
        slope = normals @ axis
        cap = np.where(along < 0, -1.0, 1.0) * np.abs(slope)
        normals += ((np.where((along < 0) | (along > length), cap, 0.0) - slope)[:, None]) * axis
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        points = self.start + np.clip(along, 0, length)[:, None] * axis + inner * normals
        for _ in range(3):
            points -= (self.height(*points.T) + self.periplasm_angstrom)[:, None] * normals
        return points, normals


@dataclass(frozen=True, eq=False)
class Site:
    """A place on a cell's inner membrane where something stands."""

    point: Floats
    """`(3,)` on the inner membrane."""

    axis: Floats
    """`(3,)` unit vector out of the cell."""

    periplasm_angstrom: float
    """From the inner to the outer membrane."""

    def motor(self) -> Floats:
        """`(3,)` the labelled point of a motor that stands here."""
        return self.point - MOTOR_DEPTH_ANGSTROM * self.axis


@dataclass(frozen=True, eq=False)
class Ball:
    """Anything round: a vesicle, a granule, a gold bead."""

    centre: Floats
    radius_angstrom: float


@dataclass(frozen=True, eq=False)
class Thread:
    """A flagellar filament or a pilus."""

    path: Floats
    """`(n, 3)` points along it."""

    radius_angstrom: float


@dataclass(frozen=True)
class Carbon:
    """The film around a round hole."""

    z: float
    y: float
    x: float
    hole_angstrom: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Everything in a specimen."""

    cells: tuple[Cell, ...]
    motors: tuple[Site, ...] = ()
    pili: tuple[Site, ...] = ()
    receptor_arrays: tuple[Site, ...] = ()
    vesicles: tuple[Ball, ...] = ()
    granules: tuple[Ball, ...] = ()
    crystals: tuple[Ball, ...] = ()
    beads: tuple[Ball, ...] = ()
    threads: tuple[Thread, ...] = ()
    carbon: Carbon | None = None


def undulation(waves: tuple[tuple[float, float, float, float], ...], y: Floats, x: Floats) -> Floats:
    """The sum of plane waves over coordinates that broadcast together."""
    total: Floats = np.zeros((), y.dtype)
    for amplitude, along_y, along_x, phase in waves:
        total = total + amplitude * np.sin(along_y * y + along_x * x + phase)
    return total


def place_cells_and_motors(
    extent: Floats, n_motors: int, rng: np.random.Generator
) -> tuple[tuple[Cell, ...], tuple[Site, ...], list[Site]]:
    """Cells, `n_motors` motors on them, and free sites for other things.

    `extent` is the `(3,)` size of the volume in angstrom. Raises TomogramError if that many motors find no room.
    """
    for _ in range(LAYOUT_ATTEMPTS):
        cells = _place_cells(extent, rng)
        sites = _ranked_sites(cells, extent, rng)
        motors = spread(sites, n_motors, CLOSEST_MOTORS_ANGSTROM)
        if len(motors) == n_motors:
            return cells, tuple(motors), spread(sites, len(motors) + 24, 700.0, motors)
    size = " x ".join(f"{edge:.0f}" for edge in extent)
    raise TomogramError(
        f"{n_motors} motors, {CLOSEST_MOTORS_ANGSTROM:.0f} angstrom or more apart, find no room in a volume of {size} "
        "angstrom; ask for fewer motors, a larger shape or a coarser voxel spacing"
    )


def spread(
    sites: list[Site], number: int, distance_angstrom: float, taken: tuple[Site, ...] | list[Site] = ()
) -> list[Site]:
    """The first of `sites`, in their order, whose labelled points keep their distance; `taken` are left out."""
    chosen = list(taken)
    points = [site.motor() for site in chosen]
    for site in sites:
        if len(chosen) >= number:
            break
        point = site.motor()
        if all(np.linalg.norm(point - other) >= distance_angstrom for other in points):
            chosen.append(site)
            points.append(point)
    return chosen[len(taken) :]


def curve(
    start: Floats, direction: Floats, length_angstrom: float, bend_angstrom: float, rng: np.random.Generator
) -> Floats:
    """`(n, 3)` points, a step apart, along a line that bends with a radius of `bend_angstrom` and winds slowly."""
    points = [np.asarray(start, np.float64)]
    side = np.cross(direction, rng.standard_normal(3))
    side /= np.linalg.norm(side)
    for _ in range(int(length_angstrom / STEP_ANGSTROM)):
        points.append(points[-1] + STEP_ANGSTROM * direction)
        side = side + 0.02 * np.cross(direction, side)
        direction = direction + STEP_ANGSTROM / bend_angstrom * side
        direction = direction / np.linalg.norm(direction)
        side = side - (side @ direction) * direction
        side /= np.linalg.norm(side)
    return np.array(points)


def _place_cells(extent: Floats, rng: np.random.Generator) -> tuple[Cell, ...]:
    frame = float(min(extent[1:]))
    # One cell in a field of half a micrometre, a few in the largest tomograms.
    wanted = 1 + rng.poisson(0.5 * float(extent[1] * extent[2]) / 5000.0**2)
    cells: list[Cell] = []
    for attempt in range(12 * wanted):
        if len(cells) == wanted:
            break
        cell = _random_cell(extent, min(rng.uniform(1100.0, 2300.0), 0.4 * frame), central=attempt == 0, rng=rng)
        if all(_apart(cell, other) for other in cells):
            cells.append(cell)
    return tuple(cells)


def _random_cell(extent: Floats, radius: float, *, central: bool, rng: np.random.Generator) -> Cell:
    low, high = (0.3, 0.7) if central else (0.0, 1.0)
    centre = extent * np.array([0.5, *rng.uniform(low, high, 2)])
    # A slab thinner than the cell may cut it anywhere but at its very top, a thicker one holds it whole.
    centre[0] += rng.uniform(-1, 1) * min(0.7 * radius, abs(extent[0] / 2 - radius) + 100.0)
    angle, rise = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(-6, 6))
    axis = np.array([math.sin(rise), math.cos(rise) * math.sin(angle), math.cos(rise) * math.cos(angle)])
    half = rng.uniform(0.5, 2.2) * radius
    return Cell(
        start=centre - half * axis,
        end=centre + half * axis,
        radius_angstrom=radius,
        periplasm_angstrom=float(rng.uniform(260.0, 340.0)),
        waves=_waves(((0.05 * radius, 2.2 * radius), (14.0, 900.0)), rng),
        bulges=_waves(((18.0, 900.0), (5.0, 400.0)), rng),
    )


def _waves(
    scales: tuple[tuple[float, float], ...], rng: np.random.Generator
) -> tuple[tuple[float, float, float, float], ...]:
    waves = []
    for amplitude, wavelength in scales:
        for _ in range(3):
            angle, length = rng.uniform(0, 2 * math.pi), wavelength * rng.uniform(0.7, 1.4)
            wave_number = 2 * math.pi / length
            waves.append(
                (
                    float(amplitude * rng.uniform(0.4, 1.0)),
                    wave_number * math.sin(angle),
                    wave_number * math.cos(angle),
                    float(rng.uniform(0, 2 * math.pi)),
                )
            )
    return tuple(waves)


def _apart(cell: Cell, other: Cell) -> bool:
    points = cell.start + np.linspace(-0.5, 1.5, 60)[:, None] * (cell.end - cell.start)
    return bool(np.all(other.height(*points.T) > cell.radius_angstrom + 200.0))


def _ranked_sites(cells: tuple[Cell, ...], extent: Floats, rng: np.random.Generator) -> list[Site]:
    """Sites within the margins and outside other cells, in an order drawn from the labels' distribution along z."""
    margin = np.minimum(MARGIN_ANGSTROM, 0.3 * extent)
    sites, keys = [], []
    for cell in cells:
        points, normals = cell.sites(1500, rng)
        motors = points - MOTOR_DEPTH_ANGSTROM * normals
        keep = np.all((motors > margin) & (motors < extent - margin), axis=1)
        for other in cells:
            keep &= other is cell or other.height(*points.T) > 600.0
        off_centre = (motors[:, 0] / extent[0] - MOTOR_Z_MEAN) / MOTOR_Z_DEVIATION
        # Sorting by log weight plus Gumbel noise draws without replacement, in proportion to the weights.
        key = -0.5 * off_centre**2 + rng.gumbel(size=len(points))
        for at in np.flatnonzero(keep):
            sites.append(Site(points[at], normals[at], cell.periplasm_angstrom))
            keys.append(key[at])
    return [sites[at] for at in np.argsort(keys)[::-1]]
