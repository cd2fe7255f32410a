"""How an electron microscope and a reconstruction see a specimen: contrast transfer, missing wedge, noise, grey levels.

Pure functions of arrays; knows nothing of what the specimen is.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from motor_ray.errors import TomogramError

WAVELENGTH_ANGSTROM = 0.0197
"""Of electrons at 300 kV."""

AMPLITUDE_CONTRAST = 0.08

GREY_LOW, GREY_HIGH = 41.0, 204.0
"""The 5th and 95th percentile of the grey levels of a typical public tomogram (medians over all 648)."""

GREY_LOW_SPREAD, GREY_HIGH_SPREAD = 14.0, 13.0
"""How far these two percentiles vary from one tomogram to the next (half of the distance from 10 % to 90 %)."""


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """The microscope and the difficulty of a simulated tomogram."""

    signal_to_noise: float = 3.0
    """Density of a membrane over the deviation of the dose noise in a voxel of 16 angstrom, before any filter."""

    tilt_degrees: float = 60.0
    """The specimen is tilted about y by up to this either way; what lies beyond is the missing wedge."""

    defocus_angstrom: tuple[float, float] = (70_000.0, 120_000.0)
    """Range of the underfocus."""

    ice_gradient: float = 0.5
    """Largest slope of the background across the tomogram, in deviations of its grey levels."""

    clutter: float = 1.0
    """How many distractors there are, relative to the usual; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 < self.signal_to_noise < np.inf:
            raise TomogramError(f"signal_to_noise {self.signal_to_noise:g}: expected a number above 0")
        if not 0 < self.tilt_degrees < 90:
            raise TomogramError(f"tilt_degrees {self.tilt_degrees:g}: expected an angle between 0 and 90")
        if not 0 < self.defocus_angstrom[0] <= self.defocus_angstrom[1]:
            raise TomogramError(
                f"defocus_angstrom {self.defocus_angstrom}: expected two numbers ascending from above 0"
            )
        if not 0 <= self.clutter < np.inf:
            raise TomogramError(f"clutter {self.clutter:g}: expected 0 or more")


def image_specimen(
    density: NDArray[np.float32],
    spacing_angstrom: float,
    settings: SimulationSettings,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """The reconstruction of a specimen: `(z, y, x)` densities in, `(z, y, x)` values out, dense things dark.

    Periodic at the faces, so `density` should reach beyond what is kept.
    """
    noise = rng.standard_normal(density.shape, dtype=np.float32)
    # The dose is spread over the volume, so the noise of a voxel falls with the root of its volume.
    noise *= (16.0 / spacing_angstrom) ** 1.5 / settings.signal_to_noise
    spectrum, noise_spectrum = scipy.fft.rfftn(density), scipy.fft.rfftn(noise)
    del noise
    z, y, x = frequencies(density.shape)
    levels = np.linspace(0.0, 0.75 * spacing_angstrom**-2, 4096)  # Nyquist along all three axes
    transfer = -contrast_transfer(levels, float(rng.uniform(*settings.defocus_angstrom))).astype(np.float32)
    response = detector_response(levels, spacing_angstrom).astype(np.float32)
    reached = measured(density.shape, settings.tilt_degrees)
    for at in range(len(spectrum)):
        index = ((z[at] ** 2 + y[0] ** 2 + x[0] ** 2) * np.float32(4095 / 0.75)).astype(np.int32)
        spectrum[at] *= transfer[index]
        spectrum[at] += noise_spectrum[at]
        spectrum[at] *= response[index] * reached[at]
    return np.asarray(scipy.fft.irfftn(spectrum, density.shape, overwrite_x=True), np.float32)


def contrast_transfer(square: NDArray[np.floating], defocus_angstrom: float) -> NDArray[np.floating]:
    """How much contrast passes at squared spatial frequencies, in 1 / angstrom squared; positive before its first zero.

    The spherical aberration is left out: at the 26 angstrom and coarser that tomograms resolve it shifts the phase by
    less than a thousandth.
    """
    phase = np.pi * WAVELENGTH_ANGSTROM * defocus_angstrom * square
    scattered, absorbed = np.sqrt(1 - AMPLITUDE_CONTRAST**2), AMPLITUDE_CONTRAST
    transfer: NDArray[np.floating] = scattered * np.sin(phase) + absorbed * np.cos(phase)
    return transfer


def detector_response(square: NDArray[np.floating], spacing_angstrom: float) -> NDArray[np.floating]:
    """The fall-off of detector and interpolation towards the Nyquist frequency, as a real tomogram shows it."""
    response: NDArray[np.floating] = np.exp(-0.9 * square * (2 * spacing_angstrom) ** 2)
    return response


def measured(shape: tuple[int, ...], tilt_degrees: float) -> NDArray[np.bool_]:
    """The coefficients of rfftn that a tilt series about y reaches, `(z, 1, x // 2 + 1)`; not the missing wedge."""
    z, _, x = frequencies(shape)
    reached: NDArray[np.bool_] = np.abs(z) <= np.tan(np.radians(tilt_degrees)) * x
    return reached


def frequencies(shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Cycles per voxel of the coefficients of rfftn along z, y and x, shaped to broadcast over them."""
    z = np.fft.fftfreq(shape[0]).astype(np.float32)[:, None, None]
    y = np.fft.fftfreq(shape[1]).astype(np.float32)[None, :, None]
    x = np.fft.rfftfreq(shape[2]).astype(np.float32)[None, None, :]
    return z, y, x


def to_grey(values: NDArray[np.float32], ice_gradient: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Spread `(z, y, x)` values over 0 to 255 as the public tomograms are, with a slope from uneven ice."""
    low = GREY_LOW + GREY_LOW_SPREAD * rng.uniform(-1, 1)
    high = GREY_HIGH + GREY_HIGH_SPREAD * rng.uniform(-1, 1)
    angle, steepness = rng.uniform(0, 2 * np.pi), ice_gradient * rng.uniform(0, 1)
    dark, bright = np.percentile(values[::3, ::3, ::3], [5, 95])
    scale = (high - low) / max(float(bright - dark), 1e-12)
    y = np.linspace(-0.5, 0.5, values.shape[1])[:, None]
    x = np.linspace(-0.5, 0.5, values.shape[2])[None, :]
    # From the 5th to the 95th percentile a normal distribution spans 3.3 deviations.
    slope = steepness * (high - low) / 3.3 * (np.sin(angle) * y + np.cos(angle) * x)
    background = (slope + low - dark * scale).astype(np.float32)
    grey = np.empty(values.shape, np.uint8)
    for at in range(len(values)):
        grey[at] = np.clip(np.rint(values[at] * np.float32(scale) + background), 0, 255)
    return grey
