"""The emoji that a colour font can draw, with their names in words as captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import emoji
from PIL import Image

from ldm.data.sources.base import Split, hash_split
from ldm.data.sources.emoji_font import EmojiFont, find_font
from ldm.data.sources.encoded import EncodedSource, image_rows, image_storage, png_cell

if TYPE_CHECKING:
    from datasets import Dataset


def open_emoji(split: Split, *, size: int, channels: int, font: Path | None) -> EncodedSource:
    """One split of the emoji of a font, or of this machine's, as a source of images of `size` pixels."""
    font = font or find_font()
    storage = image_storage(len(emoji_of(split)), size=size, channels=channels)
    images = {text: storage(image) for text, image in _rows(split, size, font)}
    return EncodedSource(
        names=[*images],
        images=[*images.values()],
        captions=[captions(text) for text in images],
        description=f"emoji: drawn with {font}",
    )


def captions(text: str) -> list[str]:
    """The name of an emoji in words, such as `man astronaut`, its aliases and some phrasings; the name comes first."""
    data = emoji.EMOJI_DATA[text]
    name = _words(data["en"])
    aliases = [words for words in map(_words, data.get("alias", [])) if len(words) > 2]  # two letters say too little
    phrases = [f"a drawing of {name}", f"an emoji of {name}", f"a picture of {name} on white"]
    return list(dict.fromkeys([name, *aliases, *phrases]))


def _words(code: str) -> str:
    return code.strip(":").replace("_", " ")


def emoji_of(split: Split) -> list[str]:
    """The emoji of a split, whatever a font has of them."""
    known = [text for text, data in emoji.EMOJI_DATA.items() if data["status"] <= emoji.STATUS["fully_qualified"]]
    return [known[index] for index in hash_split(known, split)]


def load(split: Split = "train", size: int = 64, *, font: Path | None = None) -> "Dataset":
    """All emoji that the font has of a split, as a `datasets.Dataset`. ValueError: not such a font, no such split.

    `image` is on white, `caption` the name, `captions` are the name and others, `emoji` is the characters.
    """
    rows = [
        {"image": png_cell(image), "caption": captions(text)[0], "captions": captions(text), "emoji": text}
        for text, image in _rows(split, size, font or find_font())
    ]
    return image_rows(rows)


def _rows(split: Split, size: int, font: Path) -> Iterator[tuple[str, Image.Image]]:
    """Each emoji that the font has, and its image."""
    for text, image in EmojiFont(font).drawable(emoji_of(split)):
        yield text, image.resize((size, size), Image.Resampling.LANCZOS)
