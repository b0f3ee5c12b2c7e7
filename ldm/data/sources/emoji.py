"""The emoji that this machine's colour font can draw, with their names in words as captions."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import emoji
from PIL import Image, ImageDraw, ImageFont

from ldm.data.sources.base import hash_split
from ldm.data.sources.shapes import Split

if TYPE_CHECKING:
    import datasets

FONT_NAMES = ("NotoColorEmoji*.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
FONT_FOLDERS = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path.home() / ".local/share/fonts",
    Path.home() / ".fonts",
    Path("/System/Library/Fonts"),
    Path("C:/Windows/Fonts"),
)
FONT_PIXEL_SIZES = (160, 109)  # pixels: the largest bitmaps of Apple's font and of Noto's
MISSING_GLYPH = "\U0010fffd"  # a private character, in no font: shows how the font draws what it lacks
MAX_GLYPH_WIDTHS = (
    1.25  # of one emoji; a sequence that the font can not join is drawn as two or more pictures side by side
)


def find_font() -> Path:
    """The colour-emoji font of this machine; ValueError says how to get one."""
    for folder in FONT_FOLDERS:
        for name in FONT_NAMES:
            found = sorted(folder.rglob(name)) if folder.is_dir() else []
            if found:
                return found[0]
    raise ValueError(
        "no colour-emoji font found: on Linux `apt install fonts-noto-color-emoji`; macOS and Windows ship one; "
        "else name a font file with --font"
    )


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the size of its bitmaps; ValueError when it is no font or draws no colour."""
    for size in FONT_PIXEL_SIZES:
        try:
            font = ImageFont.truetype(str(path), size)
        except OSError:
            continue
        if draw(font, "😀").convert("HSV").getextrema()[1] != (0, 0):  # some saturation
            return font
    raise ValueError(f"{path}: not a font with colour emoji; name another with --font, or leave it out")


def draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """An emoji in the middle of a white square, in the font's own resolution."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    side = max(right - left, bottom - top, 1)
    picture = Image.new("RGB", (side, side), "white")
    place = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(picture).text(place, text, font=font, embedded_color=True)
    return picture


def emoji_name(text: str) -> str:
    """The name of an emoji in words: `man astronaut`."""
    return _words(emoji.EMOJI_DATA[text]["en"])


def captions(text: str) -> list[str]:
    """The name, the aliases and some phrasings of an emoji; the name comes first."""
    name, data = emoji_name(text), emoji.EMOJI_DATA[text]
    aliases = [words for words in map(_words, data.get("alias", [])) if len(words) > 2]  # two letters say too little
    phrases = [f"a drawing of {name}", f"an emoji of {name}", f"a picture of {name} on white"]
    return list(dict.fromkeys([name, *aliases, *phrases]))


def _words(code: str) -> str:
    return code.strip(":").replace("_", " ")


def drawable(path: Path, split: Split) -> Iterator[tuple[str, Image.Image]]:
    """The emoji of a split that the font has as one picture each, with that picture."""
    known = [text for text, data in emoji.EMOJI_DATA.items() if data["status"] <= emoji.STATUS["fully_qualified"]]
    font = open_font(path)
    limit, absent = MAX_GLYPH_WIDTHS * font.getlength("😀"), draw(font, MISSING_GLYPH)
    for position in hash_split(known, split):
        text = known[position]
        if font.getlength(text) <= limit:
            picture = draw(font, text)
            if picture != absent and picture.getextrema() != ((255, 255),) * 3:
                yield text, picture


def load(split: Split = "train", size: int = 64, *, font: Path | None = None) -> "datasets.Dataset":
    """All emoji of a split as a `datasets.Dataset`: image (size x size, on white), caption, captions and emoji.

    `caption` is the name, `captions` are all wordings, `emoji` the characters. How many there are depends on the font.
    ValueError: no colour-emoji font, an unknown split, a size below 8.
    """
    import datasets  # a slow import that painting from a prompt does not need

    if size < 8:
        raise ValueError(f"size {size} is too small to draw an emoji in: choose at least 8 pixels")
    rows: dict[str, list] = {"image": [], "caption": [], "captions": [], "emoji": []}
    for text, picture in drawable(font or find_font(), split):
        rows["image"].append({"bytes": _png(picture.resize((size, size), Image.Resampling.LANCZOS)), "path": None})
        rows["caption"].append(emoji_name(text))
        rows["captions"].append(captions(text))
        rows["emoji"].append(text)
    string = datasets.Value("string")
    features = {"image": datasets.Image(), "caption": string, "captions": datasets.List(string), "emoji": string}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
