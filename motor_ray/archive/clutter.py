"""Everything in a simulated specimen besides cells and motors; much of it looks like a motor at first sight.

Geometry only, in angstrom, z, y, x, like `motor_ray.archive.specimen`.
"""

import math

import numpy as np

from motor_ray.archive.specimen import Ball, Carbon, Cell, Floats, Layout, Site, Thread, curve, place_cells_and_motors

FILAMENT_RADIUS_ANGSTROM = 100.0
PILUS_RADIUS_ANGSTROM = 35.0
HOOK_ANGSTROM = 550.0
BEAD_RADII_ANGSTROM = (30.0, 50.0, 75.0)
"""Colloidal gold of 6, 10 and 15 nm."""


def place_everything(
    extent: Floats, n_motors: int, rng: np.random.Generator, clutter_rng: np.random.Generator, clutter: float
) -> Layout:
    """A specimen of `extent` angstrom, `(3,)`, with `n_motors` motors and `clutter` times the usual distractors."""
    cells, motors, free = place_cells_and_motors(extent, n_motors, rng)
    rng = clutter_rng
    # Per area: a field of half a micrometre has a handful of each.
    area = clutter * float(extent[1] * extent[2]) / 5000.0**2
    take = iter(free)
    pili = tuple(site for site, _ in zip(take, range(rng.poisson(0.8 * area)), strict=False))
    arrays = tuple(site for site, _ in zip(take, range(rng.poisson(0.4 * area)), strict=False))
    hidden = [site for site, _ in zip(take, range(rng.poisson(1.2 * area)), strict=False)]
    flanked = [site for site, _ in zip(take, range(rng.poisson(0.5 * area)), strict=False)]
    threads = [_flagellum(site, rng) for site in motors] + [_pilus(site, rng) for site in pili]
    return Layout(
        cells=cells,
        motors=motors,
        pili=pili,
        receptor_arrays=arrays,
        vesicles=tuple(_vesicle_at(site, rng) for site in hidden) + _free_vesicles(cells, extent, area, rng),
        granules=_granules(cells, motors, extent, rng),
        crystals=_crystals(cells, extent, area, rng),
        beads=_beads(cells, extent, area, rng) + tuple(bead for site in flanked for bead in _bead_pair(site, rng)),
        threads=(*threads, *_loose_filaments(cells, extent, area, rng)),
        carbon=_carbon(extent, rng) if rng.random() < 0.35 * min(clutter, 1.0) else None,
    )


def _flagellum(site: Site, rng: np.random.Generator) -> Thread:
    base = site.point + site.periplasm_angstrom * site.axis
    hook = curve(base, site.axis, HOOK_ANGSTROM, rng.uniform(600.0, 1500.0), rng)
    direction = hook[-1] - hook[-2]
    # Beyond the hook most filaments leave the volume; some have broken off.
    length = rng.uniform(2000.0, 9000.0) if rng.random() < 0.85 else 0.0
    filament = curve(hook[-1], direction / np.linalg.norm(direction), length, rng.uniform(4000.0, 12000.0), rng)
    return Thread(np.concatenate([hook, filament[1:]]), FILAMENT_RADIUS_ANGSTROM)


def _pilus(site: Site, rng: np.random.Generator) -> Thread:
    base = site.point + site.periplasm_angstrom * site.axis
    path = curve(base, site.axis, rng.uniform(600.0, 3500.0), rng.uniform(3000.0, 9000.0), rng)
    return Thread(path, PILUS_RADIUS_ANGSTROM)


def _vesicle_at(site: Site, rng: np.random.Generator) -> Ball:
    """A vesicle pressed against the inner membrane from inside, as wide as a C-ring."""
    radius = rng.uniform(130.0, 260.0)
    return Ball(site.point - (radius + 40.0) * site.axis, radius)


def _bead_pair(site: Site, rng: np.random.Generator) -> tuple[Ball, Ball]:
    side = np.cross(site.axis, rng.standard_normal(3))
    side *= rng.uniform(180.0, 300.0) / np.linalg.norm(side)
    centre = site.point + (site.periplasm_angstrom + rng.uniform(80.0, 500.0)) * site.axis
    radius = BEAD_RADII_ANGSTROM[0]
    return Ball(centre + side, radius), Ball(centre - side, radius)


def _outside(cells: tuple[Cell, ...], points: Floats, distance: Floats | float) -> np.ndarray:
    heights = np.array([cell.height(*points.T) for cell in cells])
    outside: np.ndarray = np.all(heights > distance, axis=0)
    return outside


def _scatter(extent: Floats, number: int, rng: np.random.Generator) -> Floats:
    return rng.uniform(0.0, 1.0, (number, 3)) * extent


def _free_vesicles(cells: tuple[Cell, ...], extent: Floats, area: float, rng: np.random.Generator) -> tuple[Ball, ...]:
    centres = _scatter(extent, rng.poisson(3.0 * area), rng)
    radii = rng.lognormal(math.log(240.0), 0.4, len(centres))
    free = _outside(cells, centres, radii + 60.0)
    return tuple(Ball(centre, float(radius)) for centre, radius in zip(centres[free], radii[free], strict=True))


def _granules(
    cells: tuple[Cell, ...], motors: tuple[Site, ...], extent: Floats, rng: np.random.Generator
) -> tuple[Ball, ...]:
    granules = []
    for cell in cells:
        for centre in _scatter(extent, rng.poisson(8), rng):
            radius = float(rng.uniform(120.0, 500.0))
            deep = cell.height(*centre[:, None])[0] < -(cell.periplasm_angstrom + radius + 150.0)
            clear = all(np.linalg.norm(site.motor() - centre) > radius + 450.0 for site in motors)
            if deep and clear:
                granules.append(Ball(centre, radius))
    return tuple(granules)


def _crystals(cells: tuple[Cell, ...], extent: Floats, area: float, rng: np.random.Generator) -> tuple[Ball, ...]:
    """Ice contamination, which lies on the surfaces of the ice."""
    centres = _scatter(extent, rng.poisson(0.5 * area), rng)
    centres[:, 0] = np.where(centres[:, 0] < extent[0] / 2, 0.0, extent[0])
    radii = rng.uniform(150.0, 380.0, len(centres))
    free = _outside(cells, centres, radii + 60.0)
    return tuple(Ball(centre, float(radius)) for centre, radius in zip(centres[free], radii[free], strict=True))


def _beads(cells: tuple[Cell, ...], extent: Floats, area: float, rng: np.random.Generator) -> tuple[Ball, ...]:
    radius = float(rng.choice(BEAD_RADII_ANGSTROM))
    centres = _scatter(extent, rng.poisson(1.5 * area), rng)
    return tuple(Ball(centre, radius) for centre in centres[_outside(cells, centres, radius)])


def _loose_filaments(
    cells: tuple[Cell, ...], extent: Floats, area: float, rng: np.random.Generator
) -> tuple[Thread, ...]:
    threads = []
    for start in _scatter(extent, rng.poisson(0.8 * area), rng):
        direction = rng.standard_normal(3) * (0.15, 1.0, 1.0)
        direction /= np.linalg.norm(direction)
        path = curve(start, direction, rng.uniform(1500.0, 8000.0), rng.uniform(4000.0, 12000.0), rng)
        outside = _outside(cells, path, FILAMENT_RADIUS_ANGSTROM)
        threads.append(Thread(path[outside], FILAMENT_RADIUS_ANGSTROM))
    return tuple(threads)


def _carbon(extent: Floats, rng: np.random.Generator) -> Carbon:
    hole = float(rng.uniform(6000.0, 15000.0))
    angle = rng.uniform(0, 2 * math.pi)
    reach = hole - rng.uniform(0.30, 0.48) * float(min(extent[1:]))
    return Carbon(
        z=float(rng.uniform(0.1, 0.9) * extent[0]),
        y=float(extent[1] / 2 + reach * math.sin(angle)),
        x=float(extent[2] / 2 + reach * math.cos(angle)),
        hole_angstrom=hole,
    )
