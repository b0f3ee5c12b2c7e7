"""Heads that are drawn by code, with one lesion or none: several slices a patient, exact captions and masks.

The test split holds combinations of attributes that the training split never shows, and patients of its own.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.data.sources.base import Decoded, ImageTextSource, Split, a_or_an, check_split
from ldm.data.sources.phantom_art import (
    LESION_SIGNALS,
    LEVELS,
    LOBES,
    MAX_VALUE,
    RADII,
    SIGNALS,
    Lesion,
    draw_slice,
    generator,
    make_anatomy,
)
from ldm.data.transforms import Sides, View, crop_resize_values

VENTRICLES = ("normal", "enlarged")
SIDES = ("left", "right")
HELD_OUT_SCENES = 240  # of those with a lesion
NUM_PATIENTS = 1500  # of the training split; the test split has one for each of its scenes
LESION_SHARE = 0.9  # of the patients of the training split have one


class Scene(NamedTuple):
    """What a slice shows. Without a lesion, what would describe one is "no"."""

    contrast: str
    level: str
    ventricles: str
    side: str = "no"
    lobe: str = "no"
    size: str = "no"
    brightness: str = "no"

    @property
    def lesion(self) -> Lesion | None:
        return None if self.side == "no" else Lesion(self.side, self.lobe, self.size, self.brightness)


def captions(scene: Scene) -> tuple[str, ...]:
    """The captions of a scene, each with all its attributes."""
    contrast, level, ventricles = scene[:3]
    what, where = "no lesion", ""
    if scene.lesion:
        what, where = f"{a_or_an(scene.size)} {scene.brightness} lesion", f" in the {scene.side} {scene.lobe} lobe"
    return (
        f"{contrast} of the head, {level} level, {ventricles} ventricles, {what}{where}",
        f"axial {contrast} slice at {a_or_an(level)} level with {ventricles} ventricles and {what}{where}",
        f"{what}{where}, on {contrast}, {ventricles} ventricles, {level} level",
    )


@lru_cache(maxsize=2)
def scenes(split: Split) -> tuple[Scene, ...]:
    """Every scene of a split; the two share none with a lesion, and all without one."""
    check_split(split)
    common = list(itertools.product(SIGNALS, LEVELS, VENTRICLES))
    lesions = list(itertools.product(SIDES, LOBES, RADII, LESION_SIGNALS))
    combos = [Scene(*slice_, *lesion) for slice_ in common for lesion in lesions]
    order = generator("phantom split").permutation(len(combos))
    chosen = order[:HELD_OUT_SCENES] if split == "test" else order[HELD_OUT_SCENES:]
    return (*(combos[i] for i in chosen), *(Scene(*slice_) for slice_ in common))


def draw(scene: Scene, patient: int, size: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Values of 12 bits and the mask of the lesion, (size, size) each."""
    anatomy = make_anatomy(patient, enlarged=scene.ventricles == "enlarged")
    return draw_slice(anatomy, scene.level, scene.contrast, scene.lesion, size, patient)


def render(scene: Scene, size: int, *, seed: int) -> Image.Image:
    """A scene as an image of 8 bits, with the anatomy of a patient of its own."""
    return Image.fromarray((draw(scene, seed, size)[0] / MAX_VALUE * 255).round().astype(np.uint8))


@lru_cache(maxsize=2)
def slices(split: Split) -> tuple[tuple[int, Scene], ...]:
    """The slices of a split: patients, and what is seen at each level in each contrast."""
    ill = [scene for scene in scenes(split) if scene.lesion]
    if split == "test":
        chosen = ill
    else:
        random = generator("phantom patients")
        chosen = [ill[i] for i in random.integers(len(ill), size=NUM_PATIENTS)]
        healthy = random.random(NUM_PATIENTS) >= LESION_SHARE
        chosen = [Scene(*one[:3]) if well else one for one, well in zip(chosen, healthy, strict=True)]
    first = NUM_PATIENTS if split == "test" else 0
    return tuple((first + i, scene) for i, main in enumerate(chosen) for scene in _series(main, set(ill)))


def _series(main: Scene, split: set[Scene]) -> Iterator[Scene]:
    """The slices of a patient, whose lesion one scene has; without one that would be of the other split."""
    for contrast, level in itertools.product(SIGNALS, LEVELS):
        healthy = Scene(contrast, level, main.ventricles)
        if level != main.level or not main.lesion:
            yield healthy
        elif contrast == main.contrast:
            yield main
        else:
            others = [main._replace(contrast=contrast, brightness=brightness) for brightness in LESION_SIGNALS]
            yield from [one for one in others if one in split][:1]


@dataclass(frozen=True, kw_only=True)
class PhantomSource(ImageTextSource):
    """Slices that are drawn when they are read first."""

    items: Sequence[tuple[int, Scene]]
    side: int
    _values: Tensor  # (n, side, side) of 16 bits, in memory that loading processes share
    _is_drawn: Tensor  # (n,)

    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        if not self._is_drawn[index]:
            patient, scene = self.items[index]
            self._values[index] = torch.from_numpy(draw(scene, patient, self.side)[0].astype(np.int16))
            self._is_drawn[index] = True
        values = self._values[index].numpy().astype(np.float32)[None] / np.float32(MAX_VALUE)
        pixels, corner = crop_resize_values(values, view)
        return Decoded(pixels.expand(channels, -1, -1), corner, self.size(index))

    def size(self, index: int) -> Sides:
        return self.side, self.side


def open_phantom(split: Split, *, size: int) -> PhantomSource:
    """One split of the set, at `size` pixels."""
    items = slices(split)
    patients = [f"patient {patient}" for patient, _ in items]
    shared: dict[str, Any] = {
        "_values": torch.zeros(len(items), size, size, dtype=torch.int16).share_memory_(),
        "_is_drawn": torch.zeros(len(items), dtype=torch.bool).share_memory_(),
    }
    return PhantomSource(
        names=[
            f"{patient}, {scene.contrast}, {scene.level}" for patient, (_, scene) in zip(patients, items, strict=True)
        ],
        captions=[captions(scene) for _, scene in items],
        patients=patients,
        items=items,
        side=size,
        description=f"phantom: {len(set(patients)):,} patients, {len(items):,} slices, {size} x {size} of 12 bits",
        **shared,
    )
