"""Captions below images, in any script; and images of any shape in grids."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers import plain
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image

from ldm.imaging import captioned_grid, image_grid
from ldm.labels import LabelFont, find_fonts, split_clusters

FONTS = Path(matplotlib.get_data_path(), "fonts/ttf")
GREY = (128, 128, 128)


@pytest.fixture
def system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fonts of the system, at first none."""
    files: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    find_fonts.cache_clear()
    yield files
    find_fonts.cache_clear()


def drawn(caption: str) -> bytes:
    """The pixels of a caption below an image."""
    return captioned_grid([plain()], [caption], columns=1).tobytes()


def test_letters_of_other_languages_are_drawn() -> None:
    """A font that lacks them would draw the same box for all."""
    letters = [*"éäßøñčžж", "Ω", "א", "ع", "e\u0301a"]
    assert len({drawn(letter) for letter in letters}) == len(letters)
    assert LabelFont(letters).missing == []


def test_characters_without_a_font_are_escaped(system_fonts: list[str]) -> None:
    assert drawn("a 猫\ufe0f") == drawn("a \\u732b\\ufe0f") and drawn("🚀") == drawn("\\U0001f680")
    assert drawn("\x07") == drawn("\\x07") and drawn("\udce9") == drawn("\\udce9")
    assert LabelFont(["a 猫 🚀\u3000é"]).missing == ["猫", "🚀"]


def test_fonts_of_the_system_draw_what_dejavu_lacks(system_fonts: list[str], tmp_path: Path) -> None:
    """Regular ones first; a damaged file, or a font that is a placeholder, is passed over."""
    other, known = FT2Font(str(FONTS / "STIXNonUni.ttf")), FT2Font(str(FONTS / "DejaVuSans.ttf"))
    char = chr(min(other.get_charmap().keys() - known.get_charmap().keys()))
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    last_resort = tmp_path / "LastResort.otf"
    last_resort.write_bytes((FONTS / "STIXNonUni.ttf").read_bytes())
    escaped = drawn(f"a{char}")
    system_fonts += [str(tmp_path / "damaged.ttf"), str(last_resort), str(FONTS / "STIXNonUniBol.ttf")]
    find_fonts.cache_clear()
    bold = drawn(f"a{char}")
    regular = tmp_path / "Other-Regular.ttf"
    regular.write_bytes((FONTS / "STIXNonUni.ttf").read_bytes())
    system_fonts.append(str(regular))
    find_fonts.cache_clear()
    assert len({escaped, bold, drawn(f"a{char}")}) == 3 and LabelFont([char]).missing == []


def test_emoji_are_drawn_in_color() -> None:
    """Joined ones as one image each, as wide as a letter and not in the font's own 109 pixels."""
    emoji = ["🚀", "👩‍🚀", "🇫🇷", "👍🏽", "1️⃣"]
    font = LabelFont(emoji)
    if font.missing:
        pytest.skip("this machine has no font of emoji")
    labels = [font.label(text, 100) for text in emoji]
    assert len({label.tobytes() for label in labels}) == len(emoji)
    for label in labels:
        rows, columns = np.asarray(label).min(-1).__lt__(200).nonzero()
        assert 4 < columns.max() - columns.min() < 20 and rows.max() - rows.min() < 15
        assert np.ptp(np.asarray(label, int), axis=-1).max() > 50


def test_what_is_joined_stays_together() -> None:
    assert split_clusters("e\u0301a👩‍🚀👍🏽1️⃣b") == ["e\u0301", "a", "👩‍🚀", "👍🏽", "1️⃣", "b"]
    assert split_clusters("a \u200d👩‍🚀") == ["a", " ", "\u200d👩‍🚀"]  # the font is found for the word


def test_long_captions_are_wrapped_and_end_in_an_ellipsis() -> None:
    """Also one without spaces, whose rows are as full."""
    font = LabelFont(["x"])
    for text in ("word " * 100, "x" * 500, "https://example.com/" + "path/" * 50):
        label = font.label(text, 126)
        assert label.size == (126, 4 * 14)
        assert all(label.crop((95, top, 126, top + 14)).getextrema()[0][0] < 128 for top in range(0, 56, 14))
    cut, whole = font.label("word " * 100, 126), font.label("word " * 16, 126)
    assert cut.size == whole.size and cut.crop((0, 0, 90, 56)) == whole.crop((0, 0, 90, 56)) and cut != whole
    assert font.label("two words", 126).height == 14 and font.label("", 126).height == 0


@pytest.mark.parametrize("size", [(300, 100), (60, 20), (3, 1)])
@pytest.mark.parametrize("tall", [False, True])
def test_images_that_are_not_square_keep_their_shape(size: tuple[int, int], tall: bool) -> None:
    """In contact sheets and sample grids, on grey."""
    grid = captioned_grid([plain(size=size[::-1] if tall else size)], ["x"], columns=1)
    pixels = np.asarray(grid.crop((0, 0, 128, 128)).transpose(Image.Transpose.TRANSPOSE) if tall else grid)[:128]
    red = (pixels == (255, 0, 0)).all(-1)
    assert red.sum() == 43 * 128 and red[43:85].all() and (pixels[~red] == GREY).all()


def test_a_grid_of_several_shapes() -> None:
    grid = image_grid([plain(size=(64, 64)), plain((0, 0, 255), (128, 32))], columns=2, gap=0, scale=2)
    assert grid.size == (512, 128)
    colors = [grid.getpixel(at) for at in ((10, 60), (128, 60), (384, 10), (384, 60))]
    assert colors == [GREY, (255, 0, 0), GREY, (0, 0, 255)]
