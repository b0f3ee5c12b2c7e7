"""Figures made of two emoji: the face of one on the body of the other, in any colour font."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.data.sources.base import first_names
from ldm.data.sources.emoji_font import EmojiFont

PERSON, LIGHT, DARK = "👮", "👮🏻", "👮🏿"  # with shoulders, and a hat that hides the hair
SKIN_DIFFERENCE = 60  # between two skin tones, of three 8-bit channels together
SKIN_TOLERANCE = 90  # of the skin's colour, of three 8-bit channels together
FACE_EXTENT, FACE_HEIGHT = 1.26, 1.34  # of a creature's face at most: the root of its area, in widths of a person's
LONG_EARED = {"🐰": 1.3}  # a face that may be higher by this factor
CHIN = 0.8  # of a creature, below the middle of a person's face, in its widths
ALONE_EXTENT = 0.72  # of a face without a body: the root of its area, relative to the image's side
HEADROOM = 0.015  # above the highest hat, relative to its height


class _Head(NamedTuple):
    """Where a person's face is."""

    x: float  # of its middle
    y: float
    width: float


class CharacterArt:
    """Draws creatures on the bodies of roles, by their names, as RGBA images of `side` x `side` pixels.

    A font draws all persons with their heads in one place, and two skin tones of one person show where. The face of the
    creature covers that of the person; skin that is still seen takes the creature's colour. ValueError: emoji missing.
    """

    def __init__(self, path: Path, side: int, creatures: Mapping[str, str], roles: Mapping[str, str]) -> None:
        font = EmojiFont(path)
        _check_glyphs(font, path, {**creatures, **roles, "two skin tones": LIGHT, "two tones": DARK})
        person, light, dark = (font.layer(text, side) for text in (PERSON, LIGHT, DARK))
        skin = np.abs(np.asarray(light, float) - np.asarray(dark, float)).sum(-1) > SKIN_DIFFERENCE
        head, bottom = _find_head(skin), _box(person)[3]
        bodies = {name: font.layer(text, side) for name, text in roles.items()}
        height = (1 + HEADROOM) * (bottom - min(_box(body)[1] for body in bodies.values()))
        frame = (head.x - height / 2, bottom - height, head.x + height / 2, bottom)
        scale = side / height
        self.side, self.head = side, _Head(side / 2, (head.y - frame[1]) * scale, head.width * scale)
        color = np.median(np.asarray(person, float)[skin][:, :3], axis=0)
        self.bodies = {
            name: body.resize((side, side), Image.Resampling.LANCZOS, frame) for name, body in bodies.items()
        }
        self.skins = {name: self._skin(body, color) for name, body in self.bodies.items()}
        faces = {name: _cropped(font.layer(text, side)) for name, text in creatures.items()}
        self.colors = {name: _main_color(face) for name, face in faces.items()}
        self.alone = {name: _scaled(face, ALONE_EXTENT * side) for name, face in faces.items()}
        self.faces = {name: self._face(faces[name], LONG_EARED.get(text, 1)) for name, text in creatures.items()}

    def draw(self, creature: str | None, role: str | None, *, tilt: float = 0.0, zoom: float = 1.0) -> Image.Image:
        """A creature, a role, or one as the other; `tilt` (radians) and `zoom` change the face."""
        if role is None:
            assert creature is not None
            figure = Image.new("RGBA", (self.side, self.side))
            _paste(figure, self.alone[creature], self.side / 2, self.side / 2, tilt, zoom)
            return figure
        body = self.bodies[role]
        if creature is None:
            return body
        face, skin = self.faces[creature], Image.new("RGBA", body.size, self.colors[creature])
        figure = Image.composite(skin, body, self.skins[role])
        chin = self.head.y + CHIN * self.head.width
        _paste(figure, face, self.head.x, chin - zoom * face.height / 2, tilt, zoom)
        return figure

    def _face(self, image: Image.Image, ears: float) -> Image.Image:
        """A creature's face on a body, so large that hats are seen above it."""
        highest = ears * FACE_HEIGHT * math.sqrt(image.width / image.height)
        return _scaled(image, self.head.width * min(FACE_EXTENT, highest))

    def _skin(self, body: Image.Image, color: np.ndarray) -> Image.Image:
        """Where skin of a person's face is seen, as a mask."""
        near = np.abs(np.asarray(body, float)[..., :3] - color).sum(-1) < SKIN_TOLERANCE
        y, x = np.mgrid[: self.side, : self.side] + 0.5
        right, down = (x - self.head.x) / self.head.width, (y - self.head.y) / self.head.width
        face = (np.hypot(right / 0.62, down / 0.85) < 1) & (down > -0.3)  # hats can have the colour of skin
        opaque = np.asarray(body)[..., 3] > 127
        return Image.fromarray((255 * (near & face & opaque)).astype(np.uint8))


def _check_glyphs(font: EmojiFont, path: Path, wanted: Mapping[str, str]) -> None:
    present = {text for text, _ in font.drawable(wanted.values())}
    if missing := [f"{name} {text}" for name, text in wanted.items() if text not in present]:
        raise ValueError(
            f"{path}: lacks {len(missing)} of the {len(wanted)} emoji that characters are made of: "
            f"{first_names(missing)}; pass another font with --data.emoji-font, or leave it out"
        )


def _cropped(image: Image.Image) -> Image.Image:
    return image.crop(_box(image))


def _box(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is drawn."""
    box = image.getbbox()
    assert box, "a glyph that is drawable has pixels"
    return box


def _scaled(image: Image.Image, extent: float) -> Image.Image:
    """An image with an area of about extent x extent."""
    scale = extent / math.sqrt(image.width * image.height)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _paste(figure: Image.Image, face: Image.Image, x: float, y: float, tilt: float, zoom: float) -> None:
    """Draw a face around (x, y), turned by `tilt` radians and enlarged by `zoom`."""
    side = math.ceil(1.2 * max(face.size))  # of a square in which it fits
    left, top = max(round(x - side / 2), 0), max(round(y - side / 2), 0)
    x, y = x - left, y - top
    cos, sin = math.cos(tilt) / zoom, math.sin(tilt) / zoom
    back = (cos, sin, face.width / 2 - cos * x - sin * y, -sin, cos, face.height / 2 + sin * x - cos * y)
    turned = face.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    figure.alpha_composite(turned, (left, top))


def _find_head(skin: np.ndarray) -> _Head:
    """The face in a mask of a person's skin (height, width): it is as wide as the widest row."""
    left, right = skin.argmax(1), skin.shape[1] - skin[:, ::-1].argmax(1)
    widths = np.where(skin.any(1), right - left, 0)
    rows = np.flatnonzero(widths >= 0.95 * widths.max())
    return _Head(float(np.mean((left + right)[rows]) / 2), float(rows.mean()) + 0.5, float(widths.max()))


def _main_color(image: Image.Image) -> tuple[int, int, int]:
    """The most frequent colour of the opaque pixels that are not nearly black, to 16 levels of each channel."""
    pixels = np.asarray(image)
    pixels = pixels[(pixels[..., 3] > 200) & (pixels[..., :3].max(-1) > 48)][:, :3]
    bins, counts = np.unique(pixels // 16, axis=0, return_counts=True)
    red, green, blue = pixels[(pixels // 16 == bins[counts.argmax()]).all(1)].mean(0).round().astype(int).tolist()
    return red, green, blue
