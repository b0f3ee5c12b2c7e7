"""Emoji: what the font lacks is left out, sequences are one image, names are captions."""

from functools import partial
from pathlib import Path
from typing import get_args

import emoji as emoji_names
import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import ImageFont

from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.data.sources import emoji, emoji_font
from ldm.data.sources.base import Split
from ldm.data.sources.emoji_font import EmojiFont

FONT = emoji_font.find_font()
SPLITS = get_args(Split)
UNJOINED = "🚀\u200d🚀"  # no emoji, so two images in any font


@pytest.fixture(scope="module")
def rows():
    return emoji.load("test", 24)


def known(monkeypatch, *texts: str) -> dict[str, dict]:
    """Let these be all the emoji that there are."""
    entry = {"en": ":unknown_thing:", "status": emoji_names.STATUS["fully_qualified"]}
    table = {text: emoji_names.EMOJI_DATA.get(text, entry) for text in texts}
    monkeypatch.setattr(emoji.emoji, "EMOJI_DATA", table)
    return table


def drawn_in_both() -> set[str]:
    return {text for split in SPLITS for text, _ in EmojiFont(FONT).drawable(emoji.emoji_of(split))}


def test_rows_are_colour_drawings_on_white(rows):
    assert set(rows.column_names) == {"image", "caption", "captions", "emoji"}
    assert len(rows) > 20
    colourful = 0
    for row in rows:
        image = row["image"]
        assert image.size == (24, 24) and image.mode == "RGB"
        assert np.asarray(image).std() > 3, row["caption"]
        colourful += image.convert("HSV").getextrema()[1][1] > 100
    assert colourful > 0.8 * len(rows)
    assert sum(min(row["image"].getpixel((0, 0))) > 240 for row in rows) > 0.7 * len(rows)


def test_the_caption_is_the_name_and_comes_first(rows):
    for row in rows:
        assert row["caption"] == row["captions"][0]
        assert row["captions"] == emoji.captions(row["emoji"])
        assert not set("_:") & set(row["caption"])


def test_names_and_captions():
    assert emoji.captions("👨‍🚀")[0] == "man astronaut"
    assert emoji.captions("😀")[:3] == ["grinning face", "grinning", "a drawing of grinning face"]
    assert "de" not in emoji.captions("🇩🇪") and "flag for Germany" in emoji.captions("🇩🇪")
    assert all(len(set(w)) == len(w) >= 4 for w in map(emoji.captions, list(emoji_names.EMOJI_DATA)[:300]))


def test_the_splits_share_no_emoji(monkeypatch):
    table = known(monkeypatch, *list(emoji_names.EMOJI_DATA)[:60])
    parts = [{text for text, _ in EmojiFont(FONT).drawable(emoji.emoji_of(split))} for split in SPLITS]
    assert all(parts) and not parts[0] & parts[1]
    assert parts[0] | parts[1] <= set(table)


def test_what_the_font_lacks_is_left_out(monkeypatch):
    known(monkeypatch, "😀", "🚀", emoji_font.MISSING_GLYPH, "\U000ffffd", UNJOINED)
    assert drawn_in_both() == {"😀", "🚀"}


def test_a_sequence_is_one_image(monkeypatch):
    known(monkeypatch, "👨‍🚀", "👨", "🚀")
    assert drawn_in_both() == {"👨‍🚀", "👨", "🚀"}
    font = EmojiFont(FONT)
    assert font.draw("👨‍🚀") != font.draw("👨")


def test_half_written_forms_do_not_double_the_images(monkeypatch):
    half = [t for t, data in emoji_names.EMOJI_DATA.items() if data["status"] > emoji_names.STATUS["fully_qualified"]]
    known(monkeypatch, "😀", "🚀", *half[:5])
    assert drawn_in_both() == {"😀", "🚀"}


def test_drawings_are_centred_and_keep_their_aspect():
    font = EmojiFont(FONT)
    image = np.asarray(font.draw("🔴"))
    assert image.shape[0] == image.shape[1]
    ys, xs = np.nonzero(image.min(-1) < 200)
    assert abs(ys.mean() / len(image) - 0.5) < 0.06 and abs(xs.mean() / len(image) - 0.5) < 0.06
    assert 0.9 < (np.ptp(xs) / np.ptp(ys)) < 1.1


def test_captions_change_with_the_epoch_in_training_alone(monkeypatch):
    known(monkeypatch, *list(emoji_names.EMOJI_DATA)[:60])
    config = DataConfig(source="emoji", resolution=16)
    train, test = (open_dataset(config, split, seed=3) for split in ("train", "test"))
    captions = [train[SampleKey(4, epoch, 0)]["caption"] for epoch in range(12)]
    assert len(set(captions)) > 1 and set(captions) <= set(train.source.captions[4])
    assert captions == [train.caption(SampleKey(4, epoch, 7)) for epoch in range(12)]
    assert {test[SampleKey(0, epoch, 0)]["caption"] for epoch in range(8)} == {emoji.captions(test.source.names[0])[0]}
    assert set(captions) < set(train.captions)
    assert train.describe() == f"emoji: drawn with {FONT}; {len(train):,} in the train split"


@pytest.mark.parametrize("path", sorted({FONT, emoji_font.openmoji()}), ids=lambda path: path.name)
def test_sequences_are_joined_without_libraqm(monkeypatch, path):
    texts = ("👩‍🚀", "👮🏻", "🧑‍⚕️", "🕵️", "🇫🇷")
    with_raqm = dict(EmojiFont(path).drawable(texts))
    basic = partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC)
    monkeypatch.setattr(ImageFont, "truetype", basic)
    without = dict(EmojiFont(path).drawable(texts))
    assert list(without) == list(texts) and without == with_raqm


def test_openmoji_is_drawn_where_the_system_has_no_emoji_font(monkeypatch, tmp_path):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "NotoSans.ttf")])
    known(monkeypatch, *list(emoji_names.EMOJI_DATA)[:60])
    assert emoji_font.find_font() == emoji_font.openmoji()
    assert len(emoji.load("train", 16)) > 40


@pytest.mark.parametrize("name", ["NotoColorEmoji.ttf", "NotoColorEmoji-Regular.ttf", "Apple Color Emoji.ttc"])
def test_the_font_is_found_by_its_name(monkeypatch, tmp_path, name):
    fonts = [tmp_path / "a.ttf", tmp_path / "deep" / name]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(font) for font in fonts])
    assert emoji_font.find_font() == tmp_path / "deep" / name


def test_a_font_may_be_named_without_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(emoji_font.openmoji())])
    named = Path(emoji_font.openmoji().name)
    assert emoji_font.locate_font(named) == emoji_font.openmoji()
    with pytest.raises(ValueError, match="no font Noto.ttf: install it, or pass a file with --data.emoji-font"):
        emoji.load("train", 16, font=Path("Noto.ttf"))


def test_a_font_without_colour_and_a_file_that_is_none(tmp_path):
    plain = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    assert plain.is_file()
    (tmp_path / "a.ttf").write_text("no font")
    for path in (plain, tmp_path / "a.ttf", tmp_path / "missing.ttf"):
        with pytest.raises(ValueError, match=f"{path.name}: not a font with colour emoji; .*--data.emoji-font"):
            emoji.load("train", 16, font=path)


def test_messages():
    with pytest.raises(ValueError, match="split 'val' .*train or test"):
        emoji.load("val", 16)  # type: ignore[arg-type]
