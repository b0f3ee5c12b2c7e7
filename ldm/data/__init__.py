"""Where images and captions come from: one data set class over drawn scenes, emoji, folders, tables and the hub."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from PIL import Image, features
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import default_collate as collate
from tyro.conf import arg

from ldm import keyed
from ldm.config import Config
from ldm.data import emoji, shapes
from ldm.data.images import WHOLE, Encoded, Source, check_split, cut_at, decode, open_images, to_tensor, wordings_of
from ldm.data.order import Key
from ldm.data.shapes import Split

if TYPE_CHECKING:
    import datasets

__all__ = ["CaptionedImages", "DataConfig", "collate", "open_dataset"]

TRIES = 32  # images that are tried before a data set counts as unreadable
KEPT = 2**28  # bytes of decoded pictures of a drawn set that are kept in memory


class DataConfig(Config):
    """Which images, and how they are cut."""

    source: str = "shapes"
    """shapes, pairs, emoji, a folder, a parquet file, or the id `org/name` of a hub data set"""
    size: int = Field(32, ge=8)
    """side of the square images, in pixels"""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey"""
    flip: bool = False
    """mirror every second training image at random; off because it also mirrors writing, left and right"""
    font: Annotated[Path | None, arg(aliases=["--font"])] = None
    """colour-emoji font file for source emoji; found by itself when left out"""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """share of images that may be unreadable, each replaced by another one, before training stops"""

    def identity(self) -> dict[str, Any]:
        """What decides the samples, which a resumed run must not change."""
        return self.model_dump(mode="json", exclude={"max_unreadable"})


class CaptionedImages(Dataset[dict[str, Any]]):
    """Images as float32 tensors (c, size, size) in [-1, 1], with a caption each and the sizes that tell how it was cut.

    Crop, flip and wording of a training sample depend on (seed, epoch, index) alone; a test sample has the centre crop
    and the first wording. An image that can not be read is replaced by another one of the set, the same at every call.
    """

    def __init__(self, source: Source, config: DataConfig, split: Split, *, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        self._split, self.training = split, split == "train"
        # In shared memory, so that the main process sees what its loading processes met.
        self._bad = torch.zeros(len(source.images), dtype=torch.bool).share_memory_()
        self._shared = 0  # how many of them all processes know
        self._check_readable()

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        for index in self._candidates(key.index):
            try:
                image = self._decode(index)
            except ValueError:
                self._note_bad(index)
                continue
            return {**self._cut(image, key), "caption": self._wording(index, key)}
        raise ValueError(f"{self.config.source}: {TRIES} images in a row can not be read, {self._remedy()}")

    def caption(self, key: Key) -> str:
        """The caption that belongs to the image that `self[key]` gives, without decoding it again."""
        return self._wording(next(self._candidates(key.index), key.index), key)

    def wordings(self, key: Key) -> list[str]:
        """All captions that `self[key]` can have; "" where there is none."""
        return wordings_of(self.source.captions[next(self._candidates(key.index), key.index)]) or [""]

    @property
    def captions(self) -> Iterator[str]:
        """All wordings of all images, without decoding any."""
        for entry in self.source.captions:
            yield from wordings_of(entry)

    @property
    def unreadable(self) -> list[str]:
        """`name: error` of every image that could not be read so far, in this process or its loading processes."""
        bad = self._bad.nonzero().flatten().tolist()
        return [f"{self.source.names[index]}: {self._error(index) or 'readable by now'}" for index in bad]

    def report(self) -> str:
        """How many images could not be read, and which: for the end of a run."""
        bad = self.unreadable
        found = (
            f"{len(bad)} images could not be read and were replaced by others:" if bad else "every image could be read"
        )
        return "\n".join([f"{self._split} split: {found}", *bad])

    def describe(self) -> str:
        """One line on what was found."""
        return f"{self.source.description}; {len(self):,} in the {self._split} split"

    def _decode(self, index: int) -> Image.Image:
        image = self.source.images[index]
        if isinstance(image, Image.Image):
            return image
        return decode(image, channels=self.config.channels, side=self.config.size)

    def _draw(self, stream: str, key: Key) -> int:
        return keyed.key(self.seed, stream, key.epoch, key.index)

    def _cut(self, image: Image.Image, key: Key) -> dict[str, Tensor]:
        """The image and its sizes (6,): height and width before, top and left of the cut, height and width after."""
        size = self.config.size
        square = image.width == image.height
        offset = self._draw("crop", key) if self.training and not square else None
        pixels, corner = to_tensor(image, size, offset=offset), cut_at(image, offset)
        if self.config.flip and self.training and self._draw("flip", key) % 2:
            pixels, corner = pixels.flip(-1), (image.width - min(image.size) - corner[0], corner[1])
        left, top = (round(place * size / min(image.size)) for place in corner)
        width, height = image.info.get(WHOLE, image.size)
        return {"image": pixels, "sizes": torch.tensor([height, width, top, left, size, size])}

    def _wording(self, index: int, key: Key) -> str:
        entry = self.source.captions[index]
        if isinstance(entry, str):
            return entry
        if not entry:
            return ""
        return entry[self._draw("caption", key) % len(entry) if self.training else 0]

    # Images that can not be read.

    def _candidates(self, index: int) -> Iterator[int]:
        """`index`, then those that stand in for it, without the ones known to be unreadable."""
        for attempt in range(TRIES):
            candidate = keyed.key("stand-in", index, attempt) % len(self) if attempt else index
            if not self._bad[candidate]:
                yield candidate

    def share_unreadable(self, total: Callable[[Tensor], Tensor]) -> None:
        """Learn what the other processes could not read; `total` sums a tensor over all of them.

        ValueError, in every process, when that is more than the configuration allows.
        """
        new = self._bad.sum().float() - self._shared
        if total(new) > 0:
            self._bad |= total(self._bad.float()) > 0
            self._shared = int(self._bad.sum())
        self._check_cap()

    def _note_bad(self, index: int) -> None:
        self._bad[index] = True
        self._check_cap()

    def _check_cap(self) -> None:
        bad, cap = int(self._bad.sum()), self.config.max_unreadable
        if bad and bad > cap * len(self):
            raise ValueError(
                f"{self.config.source}: {bad} of {len(self):,} images ({bad / len(self):.1%}) can not be read, "
                f"above the {cap:.1%} that data.max_unreadable allows: {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"{'; '.join(self.unreadable[:5])}; repair or remove them, or raise --data.max-unreadable"

    def _error(self, index: int) -> str | None:
        try:
            self._decode(index)
        except ValueError as error:
            return str(error)
        return None

    def _check_readable(self) -> None:
        """ValueError when none of the first images can be read; cheap where the first one can."""
        first = range(min(TRIES, len(self)))
        if all(self._error(index) for index in first):
            listed = "; ".join(f"{self.source.names[index]}: {self._error(index)}" for index in first[:5])
            raise ValueError(
                f"{self.config.source}: none of the first {len(first)} images can be read ({listed}); "
                "repair them or choose another --data.source"
            )


def open_dataset(config: DataConfig, split: Split, *, seed: int) -> CaptionedImages:
    """One split of the data set that `config` names; `seed` decides crops, flips and wordings.

    ValueError: the source is missing, empty, unreadable or has nothing for this split.
    """
    check_split(split)
    drawn: dict[str, Callable[[], Source]] = {
        "shapes": lambda: _scenes(shapes.load(split, config.size), config, "shapes: procedural scenes"),
        "pairs": lambda: _scenes(shapes.load_pairs(split, config.size), config, "pairs: scenes of two objects"),
        "emoji": lambda: _emoji(config, split),
    }
    source = drawn[config.source]() if config.source in drawn else open_images(config.source, split)
    if not source.names:
        raise ValueError(f"{config.source}: one image alone leaves none for the test split; add at least one more")
    return CaptionedImages(source, config, split, seed=seed)


def _scenes(rows: "datasets.Dataset", config: DataConfig, description: str) -> Source:
    names = [f"row {index}" for index in range(len(rows))]
    return Source(names, _pictures(rows, config), rows["caption"][:], description)


def _emoji(config: DataConfig, split: Split) -> Source:
    font = config.font or emoji.find_font()
    rows = emoji.load(split, config.size, font=font)
    lacking = "" if features.check("raqm") else ", without flags and other joined ones, as Pillow found no libraqm"
    return Source(rows["emoji"][:], _pictures(rows, config), rows["captions"][:], f"emoji: drawn with {font}{lacking}")


def _pictures(rows: "datasets.Dataset", config: DataConfig) -> list[Encoded] | list[Image.Image]:
    """All pictures of a drawn set, in memory; decoded once for all where there is room."""
    encoded: list[Encoded] = [image["bytes"] for image in rows.data.column("image").to_pylist()]
    if len(encoded) * config.channels * config.size**2 > KEPT:
        return encoded
    return [decode(data, channels=config.channels) for data in encoded]
