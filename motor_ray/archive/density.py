"""A simulated specimen as densities on a grid: how strongly each voxel scatters, relative to ice.

A membrane has density 1, ice 0. Everything but the cells is drawn in a box of its own. Knows nothing of microscopes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from motor_ray.archive.specimen import STEP_ANGSTROM, Ball, Carbon, Cell, Floats, Layout, Site, Thread, undulation

Density = NDArray[np.float32]

RIBOSOMES_PER_CUBIC_ANGSTROM = 7e-8
"""Some 70,000 in a cubic micrometre of cytoplasm."""

RIBOSOME_RADIUS_ANGSTROM = 95.0
NUCLEOID = 0.45
"""The part of a cell's radius that the nucleoid fills; few ribosomes go there."""

CROWDING_SPACING_ANGSTROM = 16.0
"""Where the densities of proteins are given as a deviation per voxel; it falls with a voxel's volume."""


@dataclass(frozen=True)
class Ring:
    """A part of a body of revolution: between two radii and two heights above the inner membrane, in angstrom."""

    inner: float
    outer: float
    low: float
    high: float
    density: float


@dataclass(frozen=True, eq=False)
class Canvas:
    """Densities on a grid that reaches beyond the tomogram on all sides."""

    values: Density
    """`(z, y, x)`, drawn upon."""

    spacing_angstrom: float
    pad: tuple[int, int, int]
    """Voxels before the tomogram's first."""

    def axes(self) -> tuple[Density, Density, Density]:
        """Coordinates of the voxels' centres in angstrom, `(z, 1, 1)`, `(1, y, 1)` and `(1, 1, x)`."""
        _, z, y, x = self.window(np.full(3, -np.inf), np.full(3, np.inf))
        return z, y, x

    def window(self, low: Floats, high: Floats) -> tuple[Density, Density, Density, Density]:
        """The voxels between two corners in angstrom (maybe none), and their coordinates, shaped like `axes`."""
        begins = np.clip(np.ceil(low / self.spacing_angstrom) + self.pad, 0, self.values.shape).astype(int)
        ends = np.clip(np.floor(high / self.spacing_angstrom) + self.pad + 1, begins, self.values.shape).astype(int)
        z, y, x = (
            ((np.arange(begin, end) - pad) * self.spacing_angstrom).astype(np.float32)
            for begin, end, pad in zip(begins, ends, self.pad, strict=True)
        )
        part = self.values[begins[0] : ends[0], begins[1] : ends[1], begins[2] : ends[2]]
        return part, z[:, None, None], y[None, :, None], x[None, None, :]

    def box(self, centre: Floats, reach_angstrom: float) -> tuple[Density, Density, Density, Density]:
        """The voxels within `reach_angstrom` of `centre` along each axis (maybe none), and their offsets from it."""
        part, z, y, x = self.window(centre - reach_angstrom, centre + reach_angstrom)
        return part, z - np.float32(centre[0]), y - np.float32(centre[1]), x - np.float32(centre[2])


def motor_rings(periplasm_angstrom: float) -> tuple[Ring, ...]:
    """The parts of a flagellar motor whose rod crosses a periplasm of this width.

    After the electron cryotomography of Chen et al. 2011 (EMBO J. 30, 2972): C-ring 450 angstrom across.
    """
    outer = periplasm_angstrom
    return (
        Ring(150, 225, -185, -35, 1.7),  # C-ring
        Ring(30, 150, -35, 45, 1.6),  # MS-ring
        Ring(165, 260, 10, 110, 0.9),  # stators
        Ring(35, 85, -185, -120, 1.1),  # export apparatus, its cytoplasmic ring
        Ring(0, 65, -290, -230, 1.1),  # ATPase
        Ring(0, 60, 20, outer + 40, 1.5),  # rod
        Ring(50, 135, 0.5 * outer - 10, 0.5 * outer + 50, 1.3),  # P-ring, in the wall
        Ring(50, 135, outer - 40, outer + 30, 1.5),  # L-ring, in the outer membrane
    )


def pilus_rings(periplasm_angstrom: float) -> tuple[Ring, ...]:
    """The base of a type IV pilus: a narrow stack of rings through the envelope, and nothing like a C-ring."""
    outer = periplasm_angstrom
    return (
        Ring(0, 70, -110, -30, 1.0),
        Ring(20, 75, 40, 90, 1.1),
        Ring(20, 75, 0.5 * outer, 0.5 * outer + 50, 1.1),
        Ring(25, 85, outer - 70, outer + 30, 1.3),
    )


def draw_specimen(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> None:
    """Draw everything in `layout` on the empty `canvas`."""
    spacing = canvas.spacing_angstrom
    grain = replace(canvas, values=rng.standard_normal(canvas.values.shape, dtype=np.float32))
    grain.values[...] *= (CROWDING_SPACING_ANGSTROM / spacing) ** 1.5
    for cell in layout.cells:
        _draw_cell(canvas, cell, grain)
    if layout.carbon is not None:
        _draw_carbon(canvas, layout.carbon, layout.cells, grain.values)
    for cell in layout.cells:
        _draw_ribosomes(canvas, cell, rng)
    for site in layout.receptor_arrays:
        _draw_receptor_array(canvas, layout.cells, site)
    for ball in layout.granules:
        _draw_ball(canvas, ball, lambda height: 0.9 * _inside(height, 20.0))
    for ball in layout.vesicles:
        _draw_ball(canvas, ball, lambda height: 0.08 * _inside(height, 20.0) + _membrane(height, spacing))
    for ball in layout.crystals:
        _draw_crystal(canvas, ball, rng)
    for site in layout.motors:
        draw_body(canvas, site, motor_rings(site.periplasm_angstrom), clearing_angstrom=300.0)
    for site in layout.pili:
        draw_body(canvas, site, pilus_rings(site.periplasm_angstrom), clearing_angstrom=100.0)
    for thread in layout.threads:
        _draw_thread(canvas, thread)
    for ball in layout.beads:
        _draw_ball(canvas, ball, lambda height: 14.0 * _inside(height, spacing / 2))


def draw_body(canvas: Canvas, site: Site, rings: tuple[Ring, ...], clearing_angstrom: float) -> None:
    """Draw a body of revolution that stands on `site`, and thin out the cytoplasm below it.

    `clearing_angstrom` is the radius from which the body keeps ribosomes and the like away.
    """
    low, high = min(ring.low for ring in rings), max(ring.high for ring in rings)
    middle = site.point + 0.5 * (low + high) * site.axis
    wide = max(clearing_angstrom, *(ring.outer for ring in rings))
    reach = float(np.hypot(0.5 * (high - low), wide)) + 2 * canvas.spacing_angstrom
    part, z, y, x = canvas.box(middle, reach)
    u, v, w = (float(component) for component in site.axis)
    along = z * u + y * v + x * w
    height = along + 0.5 * (low + high)
    radius = np.sqrt(np.maximum(z * z + y * y + x * x - along * along, 0.0))
    soft = max(0.75 * canvas.spacing_angstrom, 10.0)
    below = Ring(-1e3, clearing_angstrom, low - 40.0, -35.0, 0.85)
    part *= 1.0 - ring_density(below, radius, height, 40.0)
    body = np.zeros_like(part)
    for ring in rings:
        np.maximum(body, ring_density(ring, radius, height, soft), out=body)
    np.maximum(part, body, out=part)


def ring_density(ring: Ring, radius: Floats, height: Floats, soft_angstrom: float) -> Floats:
    """The density of `ring` at a distance from the axis and a height, its edges `soft_angstrom` wide either way."""
    across = np.minimum(radius - ring.inner, ring.outer - radius) if ring.inner > 0 else ring.outer - radius
    along = np.minimum(height - ring.low, ring.high - height)
    return ring.density * _inside(-across, soft_angstrom) * _inside(-along, soft_angstrom)


def _inside(height: Floats, soft_angstrom: float) -> Floats:
    inside: Floats = np.clip(0.5 - height / (2.0 * soft_angstrom), 0.0, 1.0)
    return inside


def _membrane(height: Floats, spacing_angstrom: float) -> Floats:
    sigma = max(17.0, 0.6 * spacing_angstrom)
    membrane: Floats = np.exp(-0.5 * (height / sigma) ** 2) * (17.0 / sigma)
    return membrane


def _draw_cell(canvas: Canvas, cell: Cell, grain: Canvas) -> None:
    levels, smooth, rough, outer = _envelope(cell, canvas.spacing_angstrom)
    reach = float(levels[-1]) + cell.radius_angstrom + sum(wave[0] for wave in cell.waves)
    low, high = np.minimum(cell.start, cell.end) - reach, np.maximum(cell.start, cell.end) + reach
    part, z, y, x = canvas.window(low, high)
    texture, *_ = grain.window(low, high)
    swell, bulge = cell.swell(y, x), undulation(cell.bulges, y, x)
    # Slice by slice: a slice and its temporaries stay in the processor's cache.
    for at in range(len(part)):
        height = cell.distance(z[at], y[0], x[0]) - swell[0]
        index = _nearest(levels, height)
        part[at] += smooth[index]
        part[at] += rough[index] * texture[at]
        part[at] += outer[_nearest(levels, height - bulge[0])]


def _envelope(cell: Cell, spacing_angstrom: float) -> tuple[Density, Density, Density, Density]:
    """Heights above the outer membrane, and there: smooth density, its roughness, the outer membrane's density."""
    levels = np.arange(-cell.radius_angstrom, 150.0, 4.0)
    inner = levels + cell.periplasm_angstrom
    cytoplasm, inside = _inside(inner, 20.0), _inside(levels, 20.0)
    nucleoid = _inside(levels + (1 - NUCLEOID) * cell.radius_angstrom, 150.0)
    wall = np.exp(-0.5 * ((levels + 0.45 * cell.periplasm_angstrom) / 30.0) ** 2)
    smooth = _membrane(inner, spacing_angstrom) + 0.25 * wall + 0.25 * cytoplasm + 0.08 * inside
    rough = (0.5 - 0.15 * nucleoid) * cytoplasm + 0.12 * inside
    outer = 1.25 * _membrane(levels, spacing_angstrom)
    return levels.astype(np.float32), smooth.astype(np.float32), rough.astype(np.float32), outer.astype(np.float32)


def _nearest(levels: Density, height: Floats) -> NDArray[np.int32]:
    low, step = float(levels[0]), float(levels[1] - levels[0])
    index: NDArray[np.int32] = np.clip((height - low) / step + 0.5, 0, len(levels) - 1).astype(np.int32)
    return index


def _draw_ribosomes(canvas: Canvas, cell: Cell, rng: np.random.Generator) -> None:
    shape = np.array(canvas.values.shape)
    number = rng.poisson(RIBOSOMES_PER_CUBIC_ANGSTROM * float(np.prod(shape * canvas.spacing_angstrom)))
    points = (rng.uniform(0.0, 1.0, (number, 3)) * shape - canvas.pad) * canvas.spacing_angstrom
    height = cell.height(*points.T)
    in_nucleoid = height < -(1 - NUCLEOID) * cell.radius_angstrom
    chance = np.where(in_nucleoid, 0.3, 1.0)
    keep = (height < -cell.periplasm_angstrom - 150.0) & (rng.uniform(size=number) < chance)
    radius = RIBOSOME_RADIUS_ANGSTROM
    _stamp(canvas, points[keep], radius + 40.0, lambda distance: 0.9 * _inside(distance - radius, 35.0))


def _stamp(canvas: Canvas, points: Floats, reach_angstrom: float, profile: Callable[[Floats], Floats]) -> None:
    """Add one round template at the voxel nearest to each of the `(n, 3)` `points`."""
    reach = int(np.ceil(reach_angstrom / canvas.spacing_angstrom))
    offsets = (np.arange(-reach, reach + 1) * canvas.spacing_angstrom).astype(np.float32)
    square = offsets**2
    template = profile(np.sqrt(square[:, None, None] + square[None, :, None] + square[None, None, :]))
    template = template.astype(np.float32)
    voxels = np.rint(points / canvas.spacing_angstrom).astype(int) + canvas.pad
    shape = np.array(canvas.values.shape)
    voxels = voxels[np.all((voxels > -reach) & (voxels < shape + reach), axis=1)]
    lows, highs = np.maximum(voxels - reach, 0), np.minimum(voxels + reach + 1, shape)
    for (z, y, x), (a, b, c), (d, e, f) in zip((reach - voxels).tolist(), lows.tolist(), highs.tolist(), strict=True):
        canvas.values[a:d, b:e, c:f] += template[a + z : d + z, b + y : e + y, c + x : f + x]


def _draw_thread(canvas: Canvas, thread: Thread) -> None:
    true_sigma = 0.45 * thread.radius_angstrom
    sigma = max(true_sigma, 0.7 * canvas.spacing_angstrom)
    # Points a step apart overlap; their sum along the thread is this density, less where a voxel is too coarse.
    peak = 1.3 * STEP_ANGSTROM / (np.sqrt(2 * np.pi) * sigma) * (true_sigma / sigma) ** 2
    _stamp(canvas, thread.path, 2.6 * sigma, lambda distance: peak * np.exp(-0.5 * (distance / sigma) ** 2))


def _draw_ball(canvas: Canvas, ball: Ball, profile: Callable[[Floats], Floats]) -> None:
    part, z, y, x = canvas.box(ball.centre, ball.radius_angstrom + 100.0)
    height = np.sqrt(z * z + y * y + x * x) - ball.radius_angstrom
    part *= 1.0 - _inside(height, 20.0)
    part += profile(height)


def _draw_crystal(canvas: Canvas, ball: Ball, rng: np.random.Generator) -> None:
    part, z, y, x = canvas.box(ball.centre, 1.4 * ball.radius_angstrom)
    lumps = sum(
        np.sin((z * a + y * b + x * c) / ball.radius_angstrom + phase)
        for a, b, c, phase in rng.uniform(-6.0, 6.0, (4, 4)).tolist()
    )
    height = np.sqrt(z * z + y * y + x * x) - ball.radius_angstrom * (0.85 + 0.1 * lumps)
    part += 2.5 * _inside(height, 25.0)


def _draw_carbon(canvas: Canvas, carbon: Carbon, cells: tuple[Cell, ...], grain: Density) -> None:
    z, y, x = canvas.axes()
    ragged = undulation(((20.0, 0.011, 0.017, 0.0), (15.0, 0.031, -0.023, 1.0)), y, x)
    film = _inside(carbon.hole_angstrom - np.hypot(y - carbon.y, x - carbon.x) + ragged, 25.0)
    for at in np.flatnonzero(np.abs(z.ravel() - carbon.z) < 130.0):
        layer = film[0] * _inside(abs(z[at, 0, 0] - carbon.z) - 100.0, 20.0)
        for cell in cells:
            layer = layer * (1.0 - _inside(cell.height(z[at], y[0], x[0]) - 60.0, 20.0))
        canvas.values[at] += layer * (0.9 + 0.7 * grain[at])


def _draw_receptor_array(canvas: Canvas, cells: tuple[Cell, ...], site: Site) -> None:
    """A plate of chemoreceptors: a second line some 250 angstrom below the inner membrane."""
    part, z, y, x = canvas.window(site.point - 900.0, site.point + 900.0)
    own = min(cells, key=lambda cell: abs(cell.height(*site.point[:, None])[0] + site.periplasm_angstrom))
    height = own.height(z, y, x) + site.periplasm_angstrom
    square = [(axis - float(at)) ** 2 for axis, at in zip((z, y, x), site.point, strict=True)]
    distance = np.sqrt(square[0] + square[1] + square[2])
    part += 0.9 * _membrane(height + 250.0, canvas.spacing_angstrom) * _inside(distance - 800.0, 60.0)
