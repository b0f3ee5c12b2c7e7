"""Text drawn below images and beside them, in any script that this machine has a font for."""

import math
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ATTACHED = {"Mn", "Mc", "Me", "Cf", "Sk"}  # categories of characters that change the one before them
INVISIBLE = {"\ufe0e", "\ufe0f", "\u200c", "\u200d"}  # which fonts need not have
JOINER = "\u200d"
PLACEHOLDER_FONT = "lastresort.otf"  # of macOS: has a box for every character
BITMAP_SIZES = (160, 109)  # pixels: the only ones of the emoji fonts of Apple and of Noto


class LabelFont:
    """DejaVu Sans, at a size in pixels, for some texts; what it lacks is drawn in other fonts of this machine.

    A character that no font has is written as an escape, such as `\\u732b`; `missing` lists them.
    """

    def __init__(self, texts: Iterable[str], *, size: int = 11) -> None:
        clusters = frozenset(cluster for text in texts for word in text.split() for cluster in split_clusters(word))
        self.size, self._files = size, find_fonts(clusters)
        self.missing = sorted(clusters - self._files.keys())

    def label(self, text: str, width: int, *, lines: int = 4) -> Image.Image:
        """The text in black on white, `width` pixels wide, wrapped; an ellipsis ends one that takes more lines."""
        rows, leading = self._wrap(text, width, lines), round(1.25 * self.size)
        image = Image.new("RGB", (width, leading * len(rows)), "white")
        for number, row in enumerate(rows):
            x, baseline = 0.0, number * leading + self.size
            for run, font in self._runs(row):
                _draw(image, (x, baseline), run, font, self.size / font.size)
                x += font.getlength(run) * self.size / font.size
        return image

    def _wrap(self, text: str, width: int, lines: int) -> list[str]:
        rows = [""]
        for word in map(self._escape, text.split()):
            longer = f"{rows[-1]} {word}".strip()
            if self._length(longer) <= width:
                rows[-1] = longer
            elif self._length(word) <= width:
                rows.append(word)
            else:  # break it: it is an address, or of a script without spaces
                rows.append("")
                for cluster in split_clusters(word):
                    if self._length(rows[-1] + cluster) > width:
                        rows.append("")
                    rows[-1] += cluster
        rows = list(filter(None, rows))
        if len(rows) > lines:
            rows = rows[:lines]
            while rows[-1] and self._length(rows[-1] + "…") > width:
                rows[-1] = rows[-1][:-1]
            rows[-1] += "…"
        return rows

    def _escape(self, word: str) -> str:
        clusters = split_clusters(word)
        return "".join(c if c in self._files else c.encode("unicode_escape").decode() for c in clusters)

    def _length(self, row: str) -> float:
        return sum(font.getlength(run) * self.size / font.size for run, font in self._runs(row))

    def _runs(self, row: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
        """The parts of a row that one font draws, each with it."""
        for file, clusters in groupby(split_clusters(row), lambda cluster: self._files.get(cluster, dejavu())):
            font = open_font(file, self.size)
            assert font is not None  # as `find_fonts` opened it
            yield "".join(clusters), font


def _draw(image: Image.Image, start: tuple[float, float], run: str, font: ImageFont.FreeTypeFont, scale: float) -> None:
    """Draw text from the start of its baseline on; `scale` is below 1 for a font of bitmaps that are too large."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(run, anchor="ls"))
    width, height = max(1, right - left), max(1, bottom - top)
    glyphs = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(glyphs).text((-left, -top), run, "black", font, "ls", embedded_color=True)
    glyphs = glyphs.resize((math.ceil(width * scale), math.ceil(height * scale)))
    image.paste(glyphs, (round(start[0] + left * scale), round(start[1] + top * scale)))


def split_clusters(text: str) -> list[str]:
    """The characters of a text, each with those that change it or are joined to it, such as accents."""
    clusters: list[str] = []
    for char in text:
        before = clusters[-1] if clusters else " "
        if not before.isspace() and (unicodedata.category(char) in ATTACHED or before.endswith(JOINER)):
            clusters[-1] += char
        else:
            clusters.append(char)
    return clusters


@lru_cache(8)
def find_fonts(clusters: frozenset[str]) -> dict[str, str]:
    """The file of the first font that has a cluster, for each that some font has."""
    from matplotlib.ft2font import FT2Font

    found: dict[str, str] = {}
    for file in _font_files():
        if len(found) == len(clusters):
            break
        try:
            face = FT2Font(file)
        except (OSError, RuntimeError):  # damaged, or of a kind that it cannot read
            continue
        new = [c for c in clusters - found.keys() if all(map(face.get_char_index, map(ord, set(c) - INVISIBLE)))]
        font = open_font(file, 16) if new else None
        # Pillow draws nothing for some formats of colour.
        found |= {c: file for c in new if font and (file == dejavu() or font.getmask(c).getbbox())}
    return found


def _font_files() -> Iterator[str]:
    """DejaVu Sans, then the fonts of the system, regular ones first."""
    yield dejavu()
    from matplotlib import font_manager  # slow, and seldom needed

    files = [file for file in font_manager.findSystemFonts() if not file.lower().endswith(PLACEHOLDER_FONT)]
    yield from sorted(files, key=lambda file: ("regular" not in file.lower(), file))


@lru_cache
def dejavu() -> str:
    """The file of DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))


@lru_cache(64)
def open_font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font at a size in pixels, or where it has bitmaps alone at theirs; None: it cannot be opened."""
    for pixels in (size, *BITMAP_SIZES):
        with suppress(OSError):
            return ImageFont.truetype(file, pixels)
    return None
