"""The data set of images and captions that every training reads: `ImageTextDataset`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm import rng
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey, ShardedBatchSampler, make_batch_sampler
from ldm.data.buckets import assign_buckets, bucket_resolutions
from ldm.data.config import DataConfig
from ldm.data.failures import FallbackReader
from ldm.data.loader import sample_batches
from ldm.data.sources.base import ImageTextSource, Split, check_split
from ldm.data.transforms import View
from ldm.medical.formats import is_medical

if TYPE_CHECKING:
    from ldm.data.sources.encoded import EncodedSource


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Images as float32 tensors (c, height, width) in [-1, 1], with a caption and `sizes` each: see `Batch`.

    Images are squares; with buckets a training image has the sides of its bucket, `sides[groups[index]]`.
    Crop, flip and caption of a training sample depend on (seed, epoch, index) alone; a test sample has the centre crop
    and the first caption. An image that cannot be read is replaced by another one of the set, the same at every call.
    """

    def __init__(self, source: ImageTextSource, config: DataConfig, split: Split, *, seed: int) -> None:
        self.source, self.config, self.split, self.seed = source, config, split, seed
        self.training = split == "train"
        self.reader = FallbackReader(source, config)
        self.sync = self.reader.sync
        self.sides, self.groups = [(config.resolution, config.resolution)], None
        if config.bucket_step and self.is_sharded:
            raise ValueError("data.bucket_step: the sizes of images in shards are not known ahead; leave it at 0")
        if config.bucket_step and self.training:
            with ThreadPoolExecutor() as pool:
                sizes = list(pool.map(source.size, range(len(self))))
            self.sides, self.groups = assign_buckets(sizes, bucket_resolutions(config.resolution, config.bucket_step))

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        view = self._view(key)
        index, image = self.reader.read(key.index, view)
        sizes = torch.tensor([*image.original_size, *image.corner, *view.sides])
        return {"image": image.pixels, "sizes": sizes, "caption": self._choose_caption(index, key)}

    def _view(self, key: SampleKey) -> View:
        sides = self.sides[0 if self.groups is None else int(self.groups[key.index])]
        if not self.training:
            return View(sides)
        flip = self.config.random_flip and self._draw("flip", key) % 2 == 1
        return View(sides, self._draw("crop", key), flip)

    def _choose_caption(self, index: int, key: SampleKey) -> str:
        captions = self.source.captions[index] or [""]
        return captions[self._draw("caption", key) % len(captions) if self.training else 0]

    def _draw(self, stream: str, key: SampleKey) -> int:
        return rng.fold_seed(self.seed, stream, key.epoch, key.index)

    def caption(self, key: SampleKey) -> str:
        """The caption that belongs to the image that `self[key]` gives, without decoding it again."""
        return self._choose_caption(self.reader.resolve(key.index), key)

    def captions_of(self, key: SampleKey) -> list[str]:
        """All captions that `self[key]` can have; "" where there is none."""
        return list(self.source.captions[self.reader.resolve(key.index)]) or [""]

    @property
    def captions(self) -> Iterator[str]:
        """All captions of all images, without decoding any; none of a sharded set, which had to be downloaded first."""
        for captions in () if self.is_sharded else self.source.captions:
            yield from captions

    @property
    def is_sharded(self) -> bool:
        """Whether the set may be larger than the disk."""
        return bool(self.source.shard_rows)

    def make_batch_sampler(self, **options: int) -> EpochBatchSampler:
        """Which samples come when."""
        if rows := self.source.shard_rows:
            return ShardedBatchSampler(rows, streams=self.config.shard_streams, **options)
        return make_batch_sampler(len(self), self.groups, **options)

    def prefetch(self, keys: Sequence[SampleKey]) -> None:
        """Prepare for these samples, which are read next."""
        self.source.prefetch(keys, self.seed)

    def spread_images(self, count: int, *, batch_size: int = 64) -> Iterator[Tensor]:
        """Batches (b, c, h, w) of `count` images that are evenly spread over the set, cropped to squares."""
        squares = copy(self)
        squares.sides, squares.groups = [(self.config.resolution, self.config.resolution)], None
        for batch in sample_batches(squares, self.source.evenly_spaced(count), batch_size=batch_size):
            yield batch["image"]

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the images, which a resumed run must not change, wherever they are stored."""
        content = {} if self.config.drawn else {"content": self.source.content()}
        return {"items": self.source.fingerprint(), **content}

    def item_names(self) -> Sequence[str]:
        """The name of each image; none of a sharded set, which may have any number, or of one that is drawn."""
        return [] if self.is_sharded or self.config.drawn else self.source.names

    def describe(self) -> str:
        """What was opened, on one line; and a line for each note."""
        text = f"{self.source.description}; {len(self):,} in the {self.split} split"
        if self.groups is not None:
            counts = self.groups.bincount(minlength=len(self.sides)).tolist()
            listed = ", ".join(f"{w} x {h}: {n:,}" for (h, w), n in zip(self.sides, counts, strict=True))
            text = f"{text}; width x height: images, {listed}"
        return "\n".join([text, *self.source.notes])

    def report(self) -> str:
        """How many images could not be read, and which: for the end of a run."""
        bad = self.reader.unreadable()
        failed = f"{len(bad)} images could not be read and were replaced by others:"
        return "\n".join([f"{self.split} split: {failed if bad else 'every image could be read'}", *bad])


def open_dataset(config: DataConfig, split: Split, *, seed: int) -> ImageTextDataset:
    """One split of the data set that `config` names; `seed` decides crops, flips and captions.

    ValueError: the source is missing, empty, unreadable or has nothing for this split.
    """
    check_split(split)
    source = open_source(config, split)
    if not len(source.names):
        raise ValueError(f"{config.source}: one image alone leaves none for the test split; add at least one more")
    return ImageTextDataset(source, config, split, seed=seed)


def open_splits(config: DataConfig, *, seed: int) -> tuple[ImageTextDataset, ImageTextDataset]:
    """The training and the held-out split, with no patient in both; ValueError: see `open_dataset`."""
    train, test = open_dataset(config, "train", seed=seed), open_dataset(config, "test", seed=seed)
    if both := set(train.source.patients) & set(test.source.patients):
        raise ValueError(f"{config.source}: {len(both):,} patients are in both splits, as files changed: start again")
    return train, test


def open_source(config: DataConfig, split: Split) -> ImageTextSource:
    """One split of what `data.source` names. ValueError as in `open_dataset`."""
    from ldm.data.sources.encoded import join_sources  # each takes long to load

    if config.drawn and "phantom" in config.drawn.split("+"):
        if config.drawn != "phantom":
            raise ValueError("data.source: phantom is of 12 bits and is joined to no other set: leave the others out")
        from ldm.data.sources.phantom import open_phantom

        return open_phantom(split, size=config.resolution)
    if config.drawn:
        return join_sources([open_drawn(name, config, split) for name in config.drawn.split("+")])
    from ldm.data.sources.folder import list_files, open_images
    from ldm.data.sources.sharded import is_sharded, open_shards

    root = Path(config.source).expanduser()
    if root.is_dir() and is_medical([root / name for name in list_files(root)[0]]):
        try:
            from ldm.data.sources.medical import open_medical
        except ModuleNotFoundError as error:
            remedy = f"{error.name} is not installed: run `pip install 'ldm[medical]'`"
            raise ValueError(f"{root} holds medical files, and {remedy}") from None
        return open_medical(config, split)
    if is_sharded(config.source):
        return open_shards(config.source, split, streams=config.shard_streams)
    return open_images(config.source, split)


def open_drawn(name: str, config: DataConfig, split: Split) -> "EncodedSource":
    """One split of a set that is drawn here."""
    from ldm.data.sources.characters import open_characters
    from ldm.data.sources.emoji import open_emoji
    from ldm.data.sources.shapes import open_shapes

    size, channels, font = config.resolution, config.channels, config.emoji_font
    if name == "characters":
        return open_characters(split, size=size, channels=channels, font=font)
    if name == "emoji":
        return open_emoji(split, size=size, channels=channels, font=font)
    return open_shapes(split, size=size, channels=channels, pairs=name == "pairs")
