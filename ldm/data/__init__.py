"""Where images and captions come from: one data set class over drawn scenes, emoji, folders, tables and the hub."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
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
from ldm.data.buckets import bucket_sides, choose_buckets
from ldm.data.images import (
    WHOLE,
    Encoded,
    Source,
    check_split,
    cut_of,
    decode,
    open_images,
    shape_of,
    to_tensor,
    wordings_of,
)
from ldm.data.order import Key, Order, StreamOrder, order_over
from ldm.data.shapes import Split
from ldm.data.streams import Shards, UnreadableShard, in_shards, open_shards

if TYPE_CHECKING:
    import datasets

__all__ = ["CaptionedImages", "DataConfig", "collate", "open_dataset"]

TRIES = 32  # images that are tried before a data set counts as unreadable
KEPT = 2**28  # bytes of decoded pictures of a drawn set that are kept in memory


class DataConfig(Config):
    """Which images, and how they are cut."""

    source: str = "shapes"
    """shapes, pairs, emoji, a folder, a parquet file, the id `org/name` of a hub data set, or tar and parquet shards: a
    folder of them, a pattern such as `photos/{000..099}.tar`, an address such as `s3://bucket/photos`"""
    size: int = Field(32, ge=8)
    """side of the square images, in pixels"""
    bucket_step: int = Field(0, ge=0)
    """0: squares; else training images keep about their shape, with sides that are multiples of this and an area of
    about size x size, and each step takes images of one shape"""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey"""
    flip: bool = False
    """mirror every second training image at random; off because it also mirrors writing, left and right"""
    streams: int = Field(16, ge=1)
    """shards that a step takes images of; three times as many are kept on each machine"""
    font: Annotated[Path | None, arg(aliases=["--font"])] = None
    """colour-emoji font file for source emoji; found by itself when left out"""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """share of images that may be unreadable, each replaced by another one, before training stops"""

    def check_buckets(self, factor: int) -> None:
        """ValueError unless networks that divide each side by `factor` can take all buckets."""
        if self.bucket_step % factor:
            raise ValueError(
                f"data.bucket_step {self.bucket_step} is not a multiple of {factor}, by which the networks divide sides"
            )

    def check_channels(self, wanted: int) -> None:
        """ValueError unless images have the channels that a VAE wants."""
        if self.channels != wanted:
            raise ValueError(
                f"data.channels is {self.channels}, the VAE wants {wanted}: --data.channels {wanted}, "
                f"or a VAE that was trained with --vae.image-channels {self.channels}"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the samples, which a resumed run must not change."""
        return self.model_dump(mode="json", exclude={"max_unreadable"})


class CaptionedImages(Dataset[dict[str, Any]]):
    """Images as float32 tensors (c, size, size) in [-1, 1], with a caption each and the sizes that tell how it was cut.

    With buckets a training image has the sides of its bucket, `sides[groups[index]]`; `groups` is None for squares.
    Crop, flip and wording of a training sample depend on (seed, epoch, index) alone; a test sample has the centre crop
    and the first wording. An image that can not be read is replaced by another one of the set, the same at every call.
    """

    def __init__(self, source: Source, config: DataConfig, split: Split, *, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        self._split, self.training = split, split == "train"
        # In shared memory, so that the main process sees what its loading processes met.
        self._bad = torch.zeros(len(source.images), dtype=torch.bool).share_memory_()
        self._shared: set[int] = set()  # those that all processes know
        self._check_readable()
        self.sides, self.groups = [(config.size, config.size)], None
        if config.bucket_step and isinstance(source, Shards):
            raise ValueError("data.bucket_step: the shapes of images in shards are not known ahead; leave it at 0")
        if config.bucket_step and self.training:
            with ThreadPoolExecutor() as pool:
                shapes_of_all = list(pool.map(self._shape, range(len(self))))
            self.sides, self.groups = choose_buckets(shapes_of_all, bucket_sides(config.size, config.bucket_step))

    def __len__(self) -> int:
        return len(self.source.images)

    @property
    def in_shards(self) -> bool:
        """Whether the set may be larger than the disk."""
        return isinstance(self.source, Shards)

    @property
    def order(self) -> Callable[..., Order]:
        """Makes the order of its samples."""
        if isinstance(self.source, Shards):
            rows = [span.rows for span in self.source.spans]
            return partial(StreamOrder, rows, streams=self.config.streams)
        return order_over(len(self), self.groups)

    def identity(self) -> dict[str, Any]:
        """What decides the samples, which a resumed run must not change."""
        return {**self.config.identity(), "items": self.source.digest()}

    def expect(self, keys: Sequence[Key]) -> None:
        """Make ready for these samples, which are read next."""
        self.source.expect(keys, self.seed)

    def spread(self, count: int) -> list[int]:
        """`count` samples that are spread over the set, as far as they can be had soon."""
        return self.source.spread(count)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        for index in self._candidates(key.index):
            try:
                image = self._decode(index)
            except UnreadableShard:
                raise
            except ValueError:
                self._note_bad(index)
                continue
            return {**self._cut(image, key, self._sides(key.index)), "caption": self._wording(index, key)}
        raise ValueError(f"{self.config.source}: {TRIES} images in a row can not be read, {self._remedy()}")

    def caption(self, key: Key) -> str:
        """The caption that belongs to the image that `self[key]` gives, without decoding it again."""
        return self._wording(next(self._candidates(key.index), key.index), key)

    def wordings(self, key: Key) -> list[str]:
        """All captions that `self[key]` can have; "" where there is none."""
        return wordings_of(self.source.captions[next(self._candidates(key.index), key.index)]) or [""]

    @property
    def captions(self) -> Iterator[str]:
        """All wordings of all images, without decoding any; none of a set in shards, which had to be fetched for it."""
        for entry in () if self.in_shards else self.source.captions:
            yield from wordings_of(entry)

    @property
    def unreadable(self) -> list[str]:
        """`name: error` of every image that could not be read so far, in this process or its loading processes."""
        return self._told(self._bad.nonzero().flatten().tolist())

    def _told(self, bad: Sequence[int]) -> list[str]:
        """`name: error` of images; of one that had to be fetched again the name alone."""
        errors = [self._error(index) or "readable by now" if self.source.at_hand(index) else None for index in bad]
        names = [self.source.names[index] for index in bad]
        return [f"{name}: {error}" if error else name for name, error in zip(names, errors, strict=True)]

    def report(self) -> str:
        """How many images could not be read, and which: for the end of a run."""
        bad = self.unreadable
        found = (
            f"{len(bad)} images could not be read and were replaced by others:" if bad else "every image could be read"
        )
        return "\n".join([f"{self._split} split: {found}", *bad])

    def describe(self) -> str:
        """One line on what was found."""
        found = f"{self.source.description}; {len(self):,} in the {self._split} split"
        if self.groups is None:
            return found
        counts = self.groups.bincount(minlength=len(self.sides)).tolist()
        listed = ", ".join(f"{w} x {h}: {n:,}" for (h, w), n in zip(self.sides, counts, strict=True))
        return f"{found}; width x height: images, {listed}"

    def squares(self) -> "CaptionedImages":
        """The same images, cut to squares: where a batch holds images of any shape."""
        other = copy(self)
        other.sides, other.groups = [(self.config.size, self.config.size)], None
        return other

    def _shape(self, index: int) -> tuple[int, int]:
        try:
            return shape_of(self.source.images[index])
        except ValueError:
            return 1, 1

    def _decode(self, index: int) -> Image.Image:
        image = self.source.images[index]
        if isinstance(image, Image.Image):
            return image
        return decode(image, channels=self.config.channels, side=self.config.size)

    def _draw(self, stream: str, key: Key) -> int:
        return keyed.key(self.seed, stream, key.epoch, key.index)

    def _sides(self, index: int) -> tuple[int, int]:
        return self.sides[0 if self.groups is None else int(self.groups[index])]

    def _cut(self, image: Image.Image, key: Key, sides: tuple[int, int]) -> dict[str, Tensor]:
        """The image and its sizes (6,): height and width before, top and left of the cut, height and width after."""
        same = image.width * sides[0] == image.height * sides[1]  # shape: nothing is cut off
        offset = self._draw("crop", key) if self.training and not same else None
        cut = cut_of(image, sides, offset)
        pixels, left = to_tensor(image, sides, cut), float(cut.left)
        if self.config.flip and self.training and self._draw("flip", key) % 2:
            pixels, left = pixels.flip(-1), image.width - cut.width - left
        corner = [round(place * sides[0] / cut.height) for place in (cut.top, left)]
        width, height = image.info.get(WHOLE, image.size)
        return {"image": pixels, "sizes": torch.tensor([height, width, *corner, *sides])}

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
        near, every = self.source.near(index), range(len(self))
        for attempt in range(TRIES):
            others = near if attempt < TRIES // 2 else every
            candidate = others[keyed.key("stand-in", index, attempt) % len(others)] if attempt else index
            if not self._bad[candidate]:
                yield candidate

    def share_unreadable(self, gather: Callable[[list[int]], list[int]]) -> None:
        """Learn what the other processes could not read; `gather` joins the lists of all of them.

        ValueError, in every process, when that is more than the configuration allows.
        """
        more = int(self._bad.sum()) > len(self._shared)
        own = set(self._bad.nonzero().flatten().tolist()) - self._shared if more else set()
        new = gather(sorted(own))
        self._shared |= set(new)
        self._bad[new] = True
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
        first = self._bad.nonzero().flatten()[:5].tolist()
        return f"{'; '.join(self._told(first))}; repair or remove them, or raise --data.max-unreadable"

    def _error(self, index: int) -> str | None:
        try:
            self._decode(index)
        except UnreadableShard:
            raise
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
    files = partial(open_files, config.source, split, streams=config.streams)
    source = drawn.get(config.source, files)()
    if not source.names:
        raise ValueError(f"{config.source}: one image alone leaves none for the test split; add at least one more")
    return CaptionedImages(source, config, split, seed=seed)


def open_files(source: str, split: Split, *, streams: int) -> Source:
    """One split of what a person has: images, a table of them, or shards. ValueError as in `open_dataset`."""
    return open_shards(source, split, streams=streams) if in_shards(source) else open_images(source, split)


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
