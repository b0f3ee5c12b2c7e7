"""Procedural captioned scenes: no download, any size, and the exact truth of every caption.

A scene is one shape on a plain background. `load` gives whole splits; the test split holds combinations of attributes
that the training split never shows, so a model that generates them has learned the words and not the images.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.sources.base import Split, a_or_an, check_split
from ldm.data.sources.encoded import EncodedSource, image_rows, image_storage, png_cell
from ldm.rng import fold_seed

if TYPE_CHECKING:
    from datasets import Dataset

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 30, 35),
    "green": (30, 150, 60),
    "blue": (35, 75, 220),
    "yellow": (250, 210, 30),
    "purple": (130, 40, 160),
    "orange": (250, 125, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
POSITIONS = {
    "center": (0.5, 0.5),
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
SIZES = {"small": 0.145, "large": 0.235}  # outer radius as a fraction of the image's side
JITTER = 0.02  # of the position, as a fraction of the side
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TEST_FRACTION = 0.1


class Scene(NamedTuple):
    """What one image of the `shapes` set shows."""

    shape: str
    color: str
    background: str
    position: str
    size: str


class PairScene(NamedTuple):
    """What one image of the `pairs` set shows: the first object stands in `relation` to the second."""

    shape: str
    color: str
    other_shape: str
    other_color: str
    background: str
    relation: str


def captions(scene: Scene | PairScene) -> tuple[str, ...]:
    """The captions of a scene, each with all its attributes."""
    if isinstance(scene, PairScene):
        shape, color, other_shape, other_color, background, relation = scene
        first, second = f"{a_or_an(color)} {shape}", f"{a_or_an(other_color)} {other_shape}"
        return (
            f"{first} {relation} {second} on {a_or_an(background)} background",
            f"on {background}: {first} is {relation} {second}",
        )
    shape, color, background, position, size = scene
    where = "in the center" if position == "center" else f"in the {position} corner"
    short = "at the center" if position == "center" else f"at the {position}"
    return (
        f"a {size} {color} {shape} {where} on {a_or_an(background)} background",
        f"a {size} {color} {shape} on {a_or_an(background)} background, {position}",
        f"{short}, {a_or_an(color)} {shape}, {size}, with {background} behind it",
        f"{a_or_an(background)} picture with a {size} {color} {shape} {short}",
    )


@lru_cache(maxsize=2)
def scenes(split: Split) -> tuple[Scene, ...]:
    """Every combination of attributes of a split; the two splits share none."""
    combos = itertools.product(SHAPES, COLORS, COLORS, POSITIONS, SIZES)
    return _split("shapes", [Scene(*c) for c in combos if c[1] != c[2]], split)


@lru_cache(maxsize=2)
def pair_scenes(split: Split) -> tuple[PairScene, ...]:
    """Every pair of a split: two different shapes in two colours that differ from the background."""
    combos = itertools.product(SHAPES, COLORS, SHAPES, COLORS, COLORS, RELATIONS)
    valid = [PairScene(*c) for c in combos if c[0] != c[2] and len({c[1], c[3], c[4]}) == 3]
    return _split("pairs", valid, split)


def _split(name: str, combos: list, split: Split) -> tuple:
    check_split(split)
    order = np.random.Generator(np.random.PCG64(fold_seed(name, "split"))).permutation(len(combos))
    held_out = round(len(combos) * TEST_FRACTION)
    return tuple(combos[i] for i in (order[:held_out] if split == "test" else order[held_out:]))


def open_shapes(split: Split, *, size: int, channels: int, pairs: bool = False) -> EncodedSource:
    """One split of the `shapes` or the `pairs` set, of images of `size` pixels."""
    count = num_rows(split, pairs=pairs)
    storage = image_storage(count, size=size, channels=channels)
    rows = _rows(split, size, count, pairs=pairs)
    images, texts = zip(*((storage(image), [caption]) for _, image, caption in rows), strict=True)
    return EncodedSource(
        names=[f"row {index}" for index in range(count)],
        images=images,
        captions=texts,
        description="pairs: scenes of two objects" if pairs else "shapes: procedural scenes",
    )


def load(split: Split = "train", size: int = 64, *, count: int | None = None, seed: int = 0) -> "Dataset":
    """The `shapes` set as a `datasets.Dataset`: image (size x size, RGB), caption and the five attributes.

    Row i depends on (split, size, seed, i) alone. Without `count` there are three rows for each combination.
    """
    return _dataset(_rows(split, size, count, seed))


def load_pairs(split: Split = "train", size: int = 64, *, count: int | None = None, seed: int = 0) -> "Dataset":
    """The `pairs` set: two objects and a spatial relation. Columns image, caption and the fields of `PairScene`."""
    return _dataset(_rows(split, size, count, seed, pairs=True))


def num_rows(split: Split, *, pairs: bool = False) -> int:
    """How many a whole split has."""
    if pairs:
        return 20_000 if split == "train" else 1000
    return 3 * len(scenes(split))


def _dataset(rows: Iterable[tuple[Scene | PairScene, Image.Image, str]]) -> "Dataset":
    cells = [{"image": png_cell(image), "caption": caption, **scene._asdict()} for scene, image, caption in rows]
    return image_rows(cells)


def _rows(
    split: Split, size: int, count: int | None, seed: int = 0, *, pairs: bool = False
) -> Iterator[tuple[Scene | PairScene, Image.Image, str]]:
    """Each row's scene, image and caption."""
    combos: Sequence[Scene | PairScene] = pair_scenes(split) if pairs else scenes(split)
    for index in range(num_rows(split, pairs=pairs) if count is None else count):
        rng = np.random.Generator(np.random.PCG64(fold_seed(seed, type(combos[0]).__name__, split, index)))
        scene = combos[index] if index < len(combos) else combos[int(rng.integers(len(combos)))]
        caption = captions(scene)[rng.integers(len(captions(scene)))]
        yield scene, _draw(scene, size, rng), caption


def render(scene: Scene | PairScene, size: int, *, seed: int) -> Image.Image:
    """One scene as an image; `seed` moves its objects a little."""
    return _draw(scene, size, np.random.Generator(np.random.PCG64(seed)))


def _draw(scene: Scene | PairScene, size: int, rng: np.random.Generator) -> Image.Image:
    if isinstance(scene, Scene):
        objects = [(scene.shape, scene.color, np.array(POSITIONS[scene.position]), SIZES[scene.size])]
    else:
        offset = 0.24 * np.array(RELATIONS[scene.relation])
        objects = [(scene.shape, scene.color, 0.5 + offset, 0.19)]
        objects += [(scene.other_shape, scene.other_color, 0.5 - offset, 0.19)]
    canvas = np.full((size, size, 3), COLORS[scene.background], np.float64)
    for shape, color, center, radius in objects:
        _blend(canvas, shape, COLORS[color], center + rng.uniform(-JITTER, JITTER, 2), radius)
    return Image.fromarray(canvas.round().astype(np.uint8))


def _blend(canvas: np.ndarray, shape: str, color: tuple[int, int, int], center: np.ndarray, radius: float) -> None:
    """Blend a shape in: its coverage of a pixel follows from the signed distance to its outline."""
    size = canvas.shape[0]
    low = np.maximum(np.floor((center - 1.2 * radius) * size).astype(int), 0)
    high = np.ceil((center + 1.2 * radius) * size).astype(int)
    window = canvas[low[1] : high[1], low[0] : high[0]]
    grid = (np.arange(size) + 0.5) / size
    x, y = (grid[None, low[0] : high[0]] - center[0]) / radius, (grid[low[1] : high[1], None] - center[1]) / radius
    distance = _DISTANCE[shape](x, y) * radius * size  # in pixels, negative inside
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    window += coverage * (np.array(color) - window)


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon, negative inside; corners are (n, 2)."""
    (ax, ay), (bx, by) = corners.T[..., None, None], np.roll(corners, -1, 0).T[..., None, None]
    ex, ey = bx - ax, by - ay
    along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
    distance = np.hypot(x - ax - along * ex, y - ay - along * ey).min(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        crosses = ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(crosses.sum(0) % 2 == 1, -distance, distance)


def _corners(turns: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    angle = 2 * np.pi * np.array(turns)
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.array(radii)[:, None]


_TRIANGLE = _corners([0, 1 / 3, 2 / 3], [1.08] * 3) + np.array([0, 0.16])
_STAR = _corners([i / 10 for i in range(10)], [1.08, 0.45] * 5)
_CROSS = np.array(
    [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ]
)
_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.82,
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "cross": lambda x, y: _polygon(x, y, _CROSS),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,
}
