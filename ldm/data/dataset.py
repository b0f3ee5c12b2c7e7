"""TODO."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import default_collate as collate

from ldm import rng
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey, ShardedBatchSampler, make_batch_sampler
from ldm.data.buckets import assign_buckets, bucket_resolutions
from ldm.data.sources import emoji, shapes
from ldm.data.sources.base import Encoded, ImageTextSource, as_caption_list, check_split
from ldm.data.sources.decode import ORIGINAL_SIZE, decode_image, image_size
from ldm.data.sources.folder import open_images
from ldm.data.sources.shapes import Split
from ldm.data.sources.shard_cache import ShardReadError
from ldm.data.sources.sharded import ShardedSource, is_sharded, open_shards
from ldm.data.transforms import crop_box, crop_resize_to_tensor

if TYPE_CHECKING:
    import datasets
from ldm.data.config import DataConfig

__all__ = ["DataConfig", "ImageTextDataset", "collate", "open_dataset"]
MAX_FALLBACKS = 32  # images that are tried before a data set counts as unreadable
DECODED_CACHE_BYTES = 2**28  # bytes of decoded pictures of a drawn set that are kept in memory


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Images as float32 tensors (c, size, size) in [-1, 1], with a caption each and the sizes that tell how it was cut.

    With buckets a training image has the sides of its bucket, `sides[groups[index]]`; `groups` is None for squares.
    Crop, flip and wording of a training sample depend on (seed, epoch, index) alone; a test sample has the centre crop
    and the first wording. An image that can not be read is replaced by another one of the set, the same at every call.
    """

    def __init__(self, source: ImageTextSource, config: DataConfig, split: Split, *, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        self._split, self.training = split, split == "train"
        # In shared memory, so that the main process sees what its loading processes met.
        self._bad = torch.zeros(len(source.images), dtype=torch.bool).share_memory_()
        self._shared: set[int] = set()  # those that all processes know
        self._check_readable()
        self.sides, self.groups = [(config.resolution, config.resolution)], None
        if config.bucket_step and isinstance(source, ShardedSource):
            raise ValueError("data.bucket_step: the shapes of images in shards are not known ahead; leave it at 0")
        if config.bucket_step and self.training:
            with ThreadPoolExecutor() as pool:
                shapes_of_all = list(pool.map(self._shape, range(len(self))))
            self.sides, self.groups = assign_buckets(
                shapes_of_all, bucket_resolutions(config.resolution, config.bucket_step)
            )

    def __len__(self) -> int:
        return len(self.source.images)

    @property
    def is_sharded(self) -> bool:
        """Whether the set may be larger than the disk."""
        return isinstance(self.source, ShardedSource)

    @property
    def make_batch_sampler(self) -> Callable[..., EpochBatchSampler]:
        """Makes the order of its samples."""
        if isinstance(self.source, ShardedSource):
            rows = [span.rows for span in self.source.spans]
            return partial(ShardedBatchSampler, rows, streams=self.config.shard_streams)
        return make_batch_sampler(len(self), self.groups)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples, which a resumed run must not change."""
        return {**self.config.fingerprint(), "items": self.source.fingerprint()}

    def prefetch(self, keys: Sequence[SampleKey]) -> None:
        """Make ready for these samples, which are read next."""
        self.source.prefetch(keys, self.seed)

    def evenly_spaced(self, count: int) -> list[int]:
        """`count` samples that are spread over the set, as far as they can be had soon."""
        return self.source.evenly_spaced(count)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        for index in self._with_fallbacks(key.index):
            try:
                image = self._decode(index)
            except ShardReadError:
                raise
            except ValueError:
                self._note_bad(index)
                continue
            return {**self._cut(image, key, self._sides(key.index)), "caption": self._wording(index, key)}
        raise ValueError(f"{self.config.source}: {MAX_FALLBACKS} images in a row can not be read, {self._remedy()}")

    def caption(self, key: SampleKey) -> str:
        """The caption that belongs to the image that `self[key]` gives, without decoding it again."""
        return self._wording(next(self._with_fallbacks(key.index), key.index), key)

    def captions_of(self, key: SampleKey) -> list[str]:
        """All captions that `self[key]` can have; "" where there is none."""
        return as_caption_list(self.source.captions[next(self._with_fallbacks(key.index), key.index)]) or [""]

    @property
    def captions(self) -> Iterator[str]:
        """All wordings of all images, without decoding any; none of a set in shards, which had to be fetched for it."""
        for entry in () if self.is_sharded else self.source.captions:
            yield from as_caption_list(entry)

    @property
    def unreadable(self) -> list[str]:
        """`name: error` of every image that could not be read so far, in this process or its loading processes."""
        return self._describe_failures(self._bad.nonzero().flatten().tolist())

    def _describe_failures(self, bad: Sequence[int]) -> list[str]:
        """`name: error` of images; of one that had to be fetched again the name alone."""
        errors = [self._error(index) or "readable by now" if self.source.is_local(index) else None for index in bad]
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

    def without_buckets(self) -> "ImageTextDataset":
        """The same images, cut to squares: where a batch holds images of any shape."""
        other = copy(self)
        other.sides, other.groups = [(self.config.resolution, self.config.resolution)], None
        return other

    def _shape(self, index: int) -> tuple[int, int]:
        try:
            return image_size(self.source.images[index])
        except ValueError:
            return 1, 1

    def _decode(self, index: int) -> Image.Image:
        image = self.source.images[index]
        if isinstance(image, Image.Image):
            return image
        return decode_image(image, channels=self.config.channels, side=self.config.resolution)

    def _draw(self, stream: str, key: SampleKey) -> int:
        return rng.fold_seed(self.seed, stream, key.epoch, key.index)

    def _sides(self, index: int) -> tuple[int, int]:
        return self.sides[0 if self.groups is None else int(self.groups[index])]

    def _cut(self, image: Image.Image, key: SampleKey, sides: tuple[int, int]) -> dict[str, Tensor]:
        """The image and its sizes (6,): height and width before, top and left of the cut, height and width after."""
        same = image.width * sides[0] == image.height * sides[1]  # shape: nothing is cut off
        offset = self._draw("crop", key) if self.training and not same else None
        cut = crop_box(image, sides, offset)
        pixels, left = crop_resize_to_tensor(image, sides, cut), float(cut.left)
        if self.config.random_flip and self.training and self._draw("flip", key) % 2:
            pixels, left = pixels.flip(-1), image.width - cut.width - left
        corner = [round(place * sides[0] / cut.height) for place in (cut.top, left)]
        width, height = image.info.get(ORIGINAL_SIZE, image.size)
        return {"image": pixels, "sizes": torch.tensor([height, width, *corner, *sides])}

    def _wording(self, index: int, key: SampleKey) -> str:
        entry = self.source.captions[index]
        if isinstance(entry, str):
            return entry
        if not entry:
            return ""
        return entry[self._draw("caption", key) % len(entry) if self.training else 0]

    # Images that can not be read.

    def _with_fallbacks(self, index: int) -> Iterator[int]:
        """`index`, then those that stand in for it, without the ones known to be unreadable."""
        near, every = self.source.fallback_candidates(index), range(len(self))
        for attempt in range(MAX_FALLBACKS):
            others = near if attempt < MAX_FALLBACKS // 2 else every
            candidate = others[rng.fold_seed("stand-in", index, attempt) % len(others)] if attempt else index
            if not self._bad[candidate]:
                yield candidate

    def sync_unreadable(self, gather: Callable[[list[int]], list[int]]) -> None:
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
        return f"{'; '.join(self._describe_failures(first))}; repair or remove them, or raise --data.max-unreadable"

    def _error(self, index: int) -> str | None:
        try:
            self._decode(index)
        except ShardReadError:
            raise
        except ValueError as error:
            return str(error)
        return None

    def _check_readable(self) -> None:
        """ValueError when none of the first images can be read; cheap where the first one can."""
        first = range(min(MAX_FALLBACKS, len(self)))
        if all(self._error(index) for index in first):
            listed = "; ".join(f"{self.source.names[index]}: {self._error(index)}" for index in first[:5])
            raise ValueError(
                f"{self.config.source}: none of the first {len(first)} images can be read ({listed}); "
                "repair them or choose another --data.source"
            )


def open_dataset(config: DataConfig, split: Split, *, seed: int) -> ImageTextDataset:
    """One split of the data set that `config` names; `seed` decides crops, flips and wordings.

    ValueError: the source is missing, empty, unreadable or has nothing for this split.
    """
    check_split(split)
    drawn: dict[str, Callable[[], ImageTextSource]] = {
        "shapes": lambda: _scenes(shapes.load(split, config.resolution), config, "shapes: procedural scenes"),
        "pairs": lambda: _scenes(shapes.load_pairs(split, config.resolution), config, "pairs: scenes of two objects"),
        "emoji": lambda: _emoji(config, split),
    }
    files = partial(open_user_data, config.source, split, streams=config.shard_streams)
    source = drawn.get(config.source, files)()
    if not source.names:
        raise ValueError(f"{config.source}: one image alone leaves none for the test split; add at least one more")
    return ImageTextDataset(source, config, split, seed=seed)


def open_user_data(source: str, split: Split, *, streams: int) -> ImageTextSource:
    """One split of what a person has: images, a table of them, or shards. ValueError as in `open_dataset`."""
    return open_shards(source, split, streams=streams) if is_sharded(source) else open_images(source, split)


def _scenes(rows: "datasets.Dataset", config: DataConfig, description: str) -> ImageTextSource:
    names = [f"row {index}" for index in range(len(rows))]
    return ImageTextSource(names, _pictures(rows, config), rows["caption"][:], description)


def _emoji(config: DataConfig, split: Split) -> ImageTextSource:
    font = config.emoji_font or emoji.find_font()
    rows = emoji.load(split, config.resolution, font=font)
    lacking = "" if features.check("raqm") else ", without flags and other joined ones, as Pillow found no libraqm"
    return ImageTextSource(
        rows["emoji"][:], _pictures(rows, config), rows["captions"][:], f"emoji: drawn with {font}{lacking}"
    )


def _pictures(rows: "datasets.Dataset", config: DataConfig) -> list[Encoded] | list[Image.Image]:
    """All pictures of a drawn set, in memory; decoded once for all where there is room."""
    encoded: list[Encoded] = [image["bytes"] for image in rows.data.column("image").to_pylist()]
    if len(encoded) * config.channels * config.resolution**2 > DECODED_CACHE_BYTES:
        return encoded
    return [decode_image(data, channels=config.channels) for data in encoded]
