"""Axial slices of heads that are drawn by code: anatomy that varies by patient, two contrasts, one lesion or none.

Lengths are in mm. A slice is viewed as radiology does: x leads to the patient's left, y to the back, z to the top.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.rng import fold_seed

Array = NDArray[Any]
FIELD = 192.0  # width and height of a slice
LEVELS = {"low": -14.0, "middle": 6.0, "high": 26.0}  # z; further apart than a lesion is large
SUPERSAMPLING = 2
MAX_VALUE = 4095  # 12 bits
# Signal of each tissue in each contrast, as a share of the range.
TISSUES = ("air", "scalp", "skull", "fluid", "grey matter", "white matter", "nuclei")
SIGNALS = {
    "T1": (0.0, 0.78, 0.10, 0.13, 0.42, 0.62, 0.50),
    "FLAIR": (0.0, 0.55, 0.08, 0.10, 0.52, 0.40, 0.47),
}
LESION_SIGNALS = {"bright": 0.95, "dark": 0.26}
RADII = {"small": (6.5, 8.0), "medium": (10.5, 12.0), "large": (15.0, 17.0)}
LOBES = {
    "frontal": (28, 48),
    "temporal": (72, 92),
    "parietal": (108, 126),
    "occipital": (142, 154),
}  # degrees, 0: front
DEPTHS = 0.54, 0.62  # of a lesion's centre, as a share of the brain's radius


class Lesion(NamedTuple):
    """What a caption says of a lesion."""

    side: str  # of the patient
    lobe: str
    size: str
    brightness: str


class Anatomy(NamedTuple):
    """The head of one patient."""

    radii: Array  # (3,) of the outside of the head
    center: Array  # (2,)
    tilt: float  # radians in the plane
    scalp: float  # thickness
    skull: float
    cortex: float
    folds: Array  # (n, 4): waves around the brain, along z, phase and depth
    ventricles: float  # scale
    asymmetry: float  # by how much the left ventricle is the larger one
    bias: Array  # (6,) of the field over the image


def generator(*key: str | int) -> np.random.Generator:
    """Random numbers of a stream."""
    return np.random.Generator(np.random.PCG64(fold_seed(*key)))


def make_anatomy(patient: int, *, enlarged: bool) -> Anatomy:
    """The head of a patient; within limits, no two are alike. Its ventricles may be enlarged."""
    draw = generator("phantom anatomy", patient)
    waves = draw.integers(9, 26, 10)
    folds = np.stack(
        [waves, draw.uniform(0.03, 0.15, 10), draw.uniform(0, 2 * np.pi, 10), draw.uniform(0.4, 1.1, 10)], 1
    )
    return Anatomy(
        radii=np.array([72.0, 88.0, 84.0]) * draw.uniform(0.94, 1.05, 3),
        center=draw.uniform(-2.5, 2.5, 2),
        tilt=draw.uniform(-0.06, 0.06),
        scalp=draw.uniform(4, 6.5),
        skull=draw.uniform(4.5, 7),
        cortex=draw.uniform(4.5, 6),
        folds=folds,
        ventricles=draw.uniform(1.55, 1.8) if enlarged else draw.uniform(0.8, 1.0),
        asymmetry=draw.uniform(-0.12, 0.12),
        bias=draw.uniform(-0.07, 0.07, 6),
    )


def draw_slice(
    anatomy: Anatomy, level: str, contrast: str, lesion: Lesion | None, size: int, patient: int
) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Values of 12 bits and the mask of the lesion, (size, size) each, with noise (Rician, as in MR).

    The lesion of a patient is the same in both contrasts, the noise is of one slice.
    """
    draw = generator("phantom noise", patient, level, contrast)
    fine = size * SUPERSAMPLING
    axis = ((np.arange(fine) + 0.5) / fine * FIELD - FIELD / 2).astype(np.float32)
    y, x = np.meshgrid(axis - anatomy.center[1], axis - anatomy.center[0], indexing="ij")
    cos, sin = np.cos(anatomy.tilt), np.sin(anatomy.tilt)
    x, y, z = cos * x + sin * y, cos * y - sin * x, LEVELS[level]
    signal, edge = _tissues(anatomy, x, y, z, np.array(SIGNALS[contrast]))
    mask = np.zeros_like(signal)
    if lesion:
        mask = _lesion(anatomy, lesion, edge, x, y, generator("phantom lesion", patient))
        signal = signal + mask * (LESION_SIGNALS[lesion.brightness] - signal)
    u, v = x / FIELD * 2, y / FIELD * 2
    field = np.exp(sum(a * b for a, b in zip(anatomy.bias, (u, v, u * v, u * u, v * v, u * u * v), strict=True)))
    coarse = _shrink(signal * field)
    real, imaginary = (draw.normal(0, 0.012, coarse.shape) for _ in range(2))
    values = np.hypot(coarse + real, imaginary) * draw.uniform(0.85, 0.98)
    return (values.clip(0, 1) * MAX_VALUE).round().astype(np.uint16), _shrink(mask) >= 0.5


def _tissues(anatomy: Anatomy, x: Array, y: Array, z: float, signals: Array) -> tuple[Array, Array]:
    """The signal of the tissue at each point, and the brain's radius in its direction."""
    a, b, c = anatomy.radii
    thin = np.sqrt(max(1 - (z / c) ** 2, 0.1))
    angle = np.arctan2(x / a, -y / b)  # 0 leads to the front
    radius = np.hypot(x, y)
    outside = thin * radius / np.hypot(x / a, y / b).clip(1e-9)
    depth = outside - radius  # below the skin
    around = np.linspace(-np.pi, np.pi, 721)
    count, rate, phase, size = anatomy.folds.T[:, :, None]
    waves = np.interp(angle, around, (size * np.sin(count * around + rate * z + phase)).sum(0)).astype(x.dtype)
    brain = outside - anatomy.scalp - anatomy.skull - 2.5  # its radius
    inner = brain - radius  # below the brain's surface
    signal = np.full_like(x, signals[0])
    _, scalp, skull, fluid, grey, white, nuclei = signals
    signal = _over(signal, scalp, depth)
    signal = _over(signal, skull, depth - anatomy.scalp)
    signal = _over(signal, fluid, depth - anatomy.scalp - anatomy.skull)
    signal = _over(signal, grey, inner - np.maximum(waves, 0) ** 1.5)
    signal = _over(signal, white, inner - anatomy.cortex - 2.0 * waves)
    # The fissure between the hemispheres, wider at front and back.
    gap = 1.2 + 1.6 * (np.abs(y) / b) ** 2 - np.abs(x)
    signal = np.where(inner > 0, _over(signal, grey, gap + 3.2), signal)
    signal = np.where(inner > 0, _over(signal, fluid, gap), signal)
    signal = _over(signal, white, 24 - np.hypot(x * 1.7, (y + 2) * (0.72 if z < 20 else 2)))  # where both meet
    for side in (-1, 1):
        scale = anatomy.ventricles * (1 + side * anatomy.asymmetry)
        if z < 20:
            signal = _over(signal, nuclei, _ellipse(x, y, side * 19, 6 + 0.1 * z, 10, 16, 0.25 * side))
        front, width = 15 - 0.2 * z, 5.2 * scale * (1.25 - 0.012 * abs(z - 6))
        signal = _over(
            signal, fluid, _ellipse(x, y, side * (6 + width), -front + 6, width, 15 * scale**0.5, 0.3 * side)
        )
        if z > 0:
            signal = _over(signal, fluid, _ellipse(x, y, side * (10 + width), 22, width, 17 * scale**0.5, -0.25 * side))
    if z < 20:
        signal = _over(signal, fluid, _ellipse(x, y, 0, 4, 2.2 * anatomy.ventricles, 11, 0.0))  # the third ventricle
    return signal, brain


def _lesion(anatomy: Anatomy, lesion: Lesion, edge: Array, x: Array, y: Array, draw: np.random.Generator) -> Array:
    """How much of each point is lesion: a round form with an uneven border, inside one lobe."""
    angle = np.radians(draw.uniform(*LOBES[lesion.lobe])) * (1 if lesion.side == "left" else -1)
    here = np.arctan2(x / anatomy.radii[0], -y / anatomy.radii[1])
    brain = edge.flat[np.abs(here - angle).argmin()]
    way = np.array([np.sin(angle) * anatomy.radii[0], -np.cos(angle) * anatomy.radii[1]])
    center = way / np.linalg.norm(way) * brain * draw.uniform(*DEPTHS)
    radius, stretch = draw.uniform(*RADII[lesion.size]), draw.uniform(0.9, 1.1)
    dx, dy = (x - center[0]) * stretch, (y - center[1]) / stretch
    around = np.arctan2(dy, dx)
    uneven = sum(draw.uniform(0, 0.035) * np.sin(k * around + draw.uniform(0, 6.28)) for k in (2, 3, 4, 5))
    return _cover(radius * (1 + uneven) - np.hypot(dx, dy))


def _over(below: Array, signal: float, depth: Array) -> Array:
    """A tissue over what is below it, where its depth is above 0."""
    return below + _cover(depth) * (signal - below)


def _cover(depth: Array) -> Array:
    """1 inside, 0 outside, and a border of 1.5 mm."""
    return (depth / 1.5 + 0.5).clip(0, 1)


def _ellipse(x: Array, y: Array, left: float, back: float, width: float, height: float, turn: float) -> Array:
    """About how deep each point is in an ellipse."""
    dx, dy = x - left, y - back
    dx, dy = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    return (1 - np.hypot(dx / width, dy / height)) * min(width, height)


def _shrink(fine: Array) -> Array:
    """Means of the points of each pixel."""
    side = len(fine) // SUPERSAMPLING
    return fine.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean((1, 3))
