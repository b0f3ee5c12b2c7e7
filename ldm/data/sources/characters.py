"""Characters: the face of a creature on the body of a role, drawn with a colour-emoji font, with exact captions.

A tenth of the pairs of creature and role, `cat` and `astronaut` among them, is held out: the training split shows each
word, but these pairs on no background. What a caption leaves open varies: the background, the side that is mirrored,
small shifts, the size and tilt of the face, and the hue of the background.
"""

import colorsys
import itertools
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ldm.data.sources.base import Split, a_or_an, check_split
from ldm.data.sources.character_art import CharacterArt
from ldm.data.sources.emoji_font import openmoji
from ldm.data.sources.encoded import EncodedSource, image_rows, image_storage, png_cell
from ldm.rng import fold_seed

if TYPE_CHECKING:
    from datasets import Dataset

CREATURES = {
    "cat": "🐱", "dog": "🐶", "mouse": "🐭", "hamster": "🐹", "rabbit": "🐰", "fox": "🦊", "bear": "🐻",
    "panda": "🐼", "tiger": "🐯", "lion": "🦁", "cow": "🐮", "pig": "🐷", "frog": "🐸", "monkey": "🐵",
    "robot": "🤖", "alien": "👽", "pumpkin": "🎃", "skull": "💀", "wolf": "🐺", "chick": "🐤", "clown": "🤡",
    "ogre": "👹", "sun": "🌞", "dragon": "🐲",
}  # fmt: skip
ROLES = {
    "astronaut": "🧑‍🚀", "firefighter": "🧑‍🚒", "cook": "🧑‍🍳", "farmer": "🧑‍🌾", "police officer": "👮",
    "detective": "🕵️", "guard": "💂", "builder": "👷", "king": "🫅", "mage": "🧙", "doctor": "🧑‍⚕️",
    "student": "🧑‍🎓", "pilot": "🧑‍✈️", "santa": "🎅", "artist": "🧑‍🎨", "mechanic": "🧑‍🔧",
    "scientist": "🧑‍🔬", "singer": "🧑‍🎤", "judge": "🧑‍⚖️", "bride": "👰", "groom": "🤵", "ninja": "🥷",
    "superhero": "🦸", "vampire": "🧛",
}  # fmt: skip
BACKGROUNDS = {
    "white": (252, 252, 252),
    "red": (238, 98, 98),
    "orange": (255, 178, 92),
    "yellow": (252, 232, 112),
    "green": (170, 218, 130),
    "blue": (140, 205, 242),
    "purple": (190, 155, 222),
    "pink": (255, 190, 215),
}
FACINGS = ("right", "left")  # as the font draws it, and mirrored
ALONE = "none"  # the creature of a role without one, and the role of a creature without one
HELD_OUT_FRACTION = 0.1
SUPERSAMPLING = 2  # images are drawn larger by it, and reduced
# What varies, at most: of the side, in radians, of the face, of the hue's circle, of the brightness.
MAX_SHIFT, MAX_TILT, MAX_ZOOM, MAX_HUE, MAX_VALUE = 0.01, 0.04, 0.025, 0.012, 0.02


class Character(NamedTuple):
    """What one image shows."""

    creature: str
    role: str
    background: str
    facing: str


def captions(scene: Character) -> tuple[str, ...]:
    """The captions of a character: the first half of them leave the background open."""
    creature, role, background, _ = scene
    if scene.role == ALONE:
        named: tuple[str, ...] = (a_or_an(creature), f"the face of {a_or_an(creature)}")
    elif scene.creature == ALONE:
        named = (a_or_an(role), f"a person who is {a_or_an(role)}")
    else:
        named = (f"{a_or_an(creature)} {role}", f"{a_or_an(role)} {creature}")
        named = (*named, f"{a_or_an(creature)} dressed as {a_or_an(role)}")
    return (*named, *(f"{name} on {a_or_an(background)} background" for name in named))


@lru_cache(maxsize=2)
def scenes(split: Split) -> tuple[Character, ...]:
    """Every character of a split, each on every background and facing both ways; the two splits share no pair."""
    check_split(split)
    names = held_out = held_out_pairs()
    if split == "train":
        alone = [*((name, ALONE) for name in CREATURES), *((ALONE, name) for name in ROLES)]
        names = [pair for pair in itertools.product(CREATURES, ROLES) if pair not in held_out] + alone
    every = [Character(*name, *look) for name in names for look in itertools.product(BACKGROUNDS, FACINGS)]
    order = np.random.Generator(np.random.PCG64(fold_seed("characters", split))).permutation(len(every))
    return tuple(every[i] for i in order)


def pairs(split: Split) -> tuple[Character, ...]:
    """Those of a split that are a creature and a role."""
    return tuple(scene for scene in scenes(split) if ALONE not in scene)


@lru_cache(maxsize=1)
def held_out_pairs() -> list[tuple[str, str]]:
    """The pairs of creature and role of the test split, `cat` and `astronaut` first, the others by a hash of both."""
    pairs = sorted(itertools.product(CREATURES, ROLES), key=lambda pair: fold_seed("characters", "held out", *pair))
    pairs.remove(("cat", "astronaut"))
    return [("cat", "astronaut"), *pairs[: round(HELD_OUT_FRACTION * len(pairs)) - 1]]


def load(
    split: Split = "train",
    size: int = 64,
    *,
    count: int | None = None,
    seed: int = 0,
    font: Path | None = None,
    only: Collection[tuple[str, str]] | None = None,
) -> "Dataset":
    """The `characters` set as a `datasets.Dataset`: image (size x size, RGB), caption and the four attributes.

    Row i depends on (split, size, seed, i, font, only) alone. Without `count` there is a row for each character. `only`
    these pairs of creature and role are shown. ValueError: no such split, a pair of the other split, or the font lacks
    emoji.
    """
    rows = [
        {"image": png_cell(image), "caption": texts[0], **scene._asdict()}
        for scene, image, texts in _rows(split, size, count, seed, font, only)
    ]
    return image_rows(rows)


def open_characters(split: Split, *, size: int, channels: int, font: Path | None) -> EncodedSource:
    """One split of the characters as a source of images of `size` pixels, each with all its captions."""
    storage = image_storage(len(scenes(split)), size=size, channels=channels)
    images, texts = zip(*((storage(image), own) for _, image, own in _rows(split, size, None, 0, font)), strict=True)
    return EncodedSource(
        names=[f"row {index}" for index in range(len(images))],
        images=images,
        captions=texts,
        description=f"characters: drawn with {(font or openmoji()).name}",
    )


def _rows(
    split: Split,
    size: int,
    count: int | None,
    seed: int,
    font: Path | None,
    only: Collection[tuple[str, str]] | None = None,
) -> Iterator[tuple[Character, Image.Image, list[str]]]:
    """Each row's character, image and captions, which begin with any of them."""
    chosen = scenes(split) if only is None else _only(split, only)
    for index in range(len(chosen) if count is None else count):
        scene = chosen[index % len(chosen)]
        rng = np.random.Generator(np.random.PCG64(fold_seed(seed, "characters", split, index)))
        texts = list(captions(scene))
        texts.insert(0, texts.pop(int(rng.integers(len(texts)))))
        yield scene, _draw(scene, size, rng, font or openmoji()), texts


def _only(split: Split, pairs: Collection[tuple[str, str]]) -> list[Character]:
    """The characters of some pairs. ValueError: one is in the other split."""
    chosen = [scene for scene in scenes(split) if scene[:2] in pairs]
    if absent := sorted(set(pairs) - {scene[:2] for scene in chosen}):
        creature, role = absent[0]
        known = creature in CREATURES and role in ROLES
        other = "held out: it is in split 'test' alone" if split == "train" else "in split 'train' alone"
        raise ValueError(f"only: {creature} {role} is {other if known else 'no pair of CREATURES and ROLES'}")
    return chosen


def render(scene: Character, size: int, *, seed: int, font: Path | None = None) -> Image.Image:
    """One character as an image; `seed` decides what no attribute says."""
    return _draw(scene, size, np.random.Generator(np.random.PCG64(seed)), font or openmoji())


# Drawing.


def _draw(scene: Character, size: int, rng: np.random.Generator, font: Path) -> Image.Image:
    side = SUPERSAMPLING * size
    x, y, tilt, zoom, hue, value = rng.uniform(-1, 1, 6).tolist()
    image = Image.new("RGBA", (side, side), _vary(BACKGROUNDS[scene.background], hue, value))
    art = _artwork(font, side)
    creature, role = (None if name == ALONE else name for name in (scene.creature, scene.role))
    figure = art.draw(creature, role, tilt=MAX_TILT * tilt, zoom=1 + MAX_ZOOM * zoom)
    left, up = -round(MAX_SHIFT * side * x), -round(MAX_SHIFT * side * (1 + y) / 2)  # never up: a body ends below
    image.alpha_composite(figure.crop((left, up, left + side, up + side)))
    drawn = image.convert("RGB").reduce(SUPERSAMPLING)
    return ImageOps.mirror(drawn) if scene.facing == "left" else drawn


def _vary(color: tuple[int, int, int], hue: float, value: float) -> tuple[int, int, int]:
    """A colour of a slightly other hue and brightness, for two numbers in [-1, 1]."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    red, green, blue = colorsys.hsv_to_rgb((h + MAX_HUE * hue) % 1, s, min(v + MAX_VALUE * value, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


@lru_cache(maxsize=4)
def _artwork(font: Path, side: int) -> CharacterArt:
    return CharacterArt(font, side, CREATURES, ROLES)
