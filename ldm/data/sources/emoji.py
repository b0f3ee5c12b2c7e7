"""The emoji that this machine's colour font can draw, with their names in words as captions."""

import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import emoji
from PIL import Image, ImageDraw, ImageFont, features

from ldm.data.sources.base import Split, hash_split
from ldm.data.sources.encoded import EncodedSource, drawn_images, png_cell

FONT_NAMES = re.compile(r"NotoColorEmoji.*\.ttf|Apple Color Emoji\.ttc|seguiemj\.ttf")
FONT_PIXEL_SIZES = (160, 109)  # of the largest bitmaps of Apple's font and of Noto's
MISSING_GLYPH = "\U0010fffd"  # a private character, in no font: shows how the font draws what it lacks
MAX_RELATIVE_WIDTH = 1.25  # to one emoji; a sequence that the font cannot join is drawn as several, side by side


def open_emoji(split: Split, *, size: int, channels: int, font: Path | None) -> EncodedSource:
    """One split of the emoji of a font, or of this machine's, as a source of images of `size` pixels."""
    font = font or find_font()
    rows = load(split, size, font=font)
    limits = "" if features.check("raqm") else ", without flags and other joined ones, as Pillow has no libraqm"
    return EncodedSource(
        names=rows["emoji"][:],
        images=drawn_images(rows, size=size, channels=channels),
        captions=rows["captions"][:],
        description=f"emoji: drawn with {font}{limits}",
    )


def find_font() -> Path:
    """The colour-emoji font of this machine; ValueError says how to get one."""
    from matplotlib import font_manager  # slow, and other sets do not need it

    for path in map(Path, sorted(font_manager.findSystemFonts())):
        if FONT_NAMES.fullmatch(path.name):
            return path
    raise ValueError(
        "no colour-emoji font found: on Linux `apt install fonts-noto-color-emoji`; macOS and Windows ship one; "
        "else pass a font file with --data.emoji-font"
    )


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the size of its bitmaps; ValueError when it is not a font or draws no colour."""
    for size in FONT_PIXEL_SIZES:
        try:
            font = ImageFont.truetype(str(path), size)
        except OSError:
            continue
        if draw(font, "😀").convert("HSV").getextrema()[1] != (0, 0):  # some saturation
            return font
    raise ValueError(f"{path}: not a font with colour emoji; pass another with --data.emoji-font, or leave it out")


def draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """An emoji in the middle of a white square, in the font's own resolution."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    side = max(right - left, bottom - top, 1)
    image = Image.new("RGB", (side, side), "white")
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(image).text(corner, text, font=font, embedded_color=True)
    return image


def captions(text: str) -> list[str]:
    """The name of an emoji in words, such as `man astronaut`, its aliases and some phrasings; the name comes first."""
    data = emoji.EMOJI_DATA[text]
    name = _words(data["en"])
    aliases = [words for words in map(_words, data.get("alias", [])) if len(words) > 2]  # two letters say too little
    phrases = [f"a drawing of {name}", f"an emoji of {name}", f"a picture of {name} on white"]
    return list(dict.fromkeys([name, *aliases, *phrases]))


def _words(code: str) -> str:
    return code.strip(":").replace("_", " ")


def drawable(path: Path, split: Split) -> Iterator[tuple[str, Image.Image]]:
    """The emoji of a split that the font has as one image each, with that image."""
    known = [text for text, data in emoji.EMOJI_DATA.items() if data["status"] <= emoji.STATUS["fully_qualified"]]
    font = open_font(path)
    limit, absent = MAX_RELATIVE_WIDTH * font.getlength("😀"), draw(font, MISSING_GLYPH)
    for index in hash_split(known, split):
        text = known[index]
        if font.getlength(text) <= limit:
            image = draw(font, text)
            if image != absent and image.getextrema() != ((255, 255),) * 3:
                yield text, image


def load(split: Split = "train", size: int = 64, *, font: Path | None = None) -> datasets.Dataset:
    """All emoji that the font has of a split, as a `datasets.Dataset`. ValueError: no colour-emoji font, no such split.

    `image` is on white, `caption` the name, `captions` are the name and others, `emoji` is the characters.
    """
    rows = [
        {
            "image": png_cell(image.resize((size, size), Image.Resampling.LANCZOS)),
            "caption": captions(text)[0],
            "captions": captions(text),
            "emoji": text,
        }
        for text, image in drawable(font or find_font(), split)
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
