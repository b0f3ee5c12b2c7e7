"""The training and held-out split of a stage, as the loop and the validation see them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data import Batch, DataConfig, ImageTextDataset, open_dataset
from ldm.data.batch_sampler import EpochBatchSampler, image_batches, sample_batches
from ldm.data.latents import LatentDataset


class Splits:
    """Images with captions, or latents that were computed from them."""

    def __init__(
        self,
        source: ImageTextDataset | LatentDataset,
        held_out: ImageTextDataset | LatentDataset,
    ) -> None:
        self.source, self.held_out = source, held_out
        self.train: Dataset[Any] = source

    @classmethod
    def open(cls, config: DataConfig, seed: int) -> "Splits":
        """Both splits of a set of images. ValueError: see `open_dataset`."""
        return cls(*(open_dataset(config, split, seed=seed) for split in ("train", "test")))

    @property
    def images(self) -> ImageTextDataset:
        """The training images."""
        assert isinstance(self.source, ImageTextDataset)
        return self.source

    def make_batch_sampler(self, **cut: Any) -> EpochBatchSampler:
        """Which samples a rank takes; see `EpochBatchSampler` for the arguments."""
        return self.source.make_batch_sampler(**cut)

    def sync(self, gather: Callable[[list[int]], list[int]]) -> None:
        """Learn which images other ranks could not read. ValueError when there are more than allowed."""
        if isinstance(self.source, ImageTextDataset):
            self.source.reader.sync(gather)

    def describe(self) -> str:
        """One line on what is trained on."""
        if isinstance(self.source, ImageTextDataset):
            return self.source.describe()
        index, embeddings = self.source.index, ""
        if "text_sha256" in index.fingerprint:
            embeddings = ", with text embeddings"
        counts = f"{len(self.source):,} with {index.augmentations} augmentations, {len(self.held_out):,} held out"
        return f"latents: {counts}, in {self.source.folder}{embeddings}"

    def report(self) -> str:
        """Which images of both splits could not be read."""
        return "\n".join(d.report() for d in (self.source, self.held_out) if isinstance(d, ImageTextDataset))

    def first_held_out(self, count: int) -> Batch:
        """A batch of the first held-out samples, the same at every call."""
        return next(sample_batches(self.held_out, batch_size=count))

    def spread_images(self, count: int) -> Iterator[Tensor]:
        """Batches (b, c, h, w) of `count` training images that are spread over the set, cut to squares."""
        squares = self.images.without_buckets()
        return image_batches(squares, squares.source.evenly_spaced(count))


def example_images(config: DataConfig, count: int) -> Batch:
    """A batch of random images, as `Splits` would give it."""
    shape = (count, config.channels, config.resolution, config.resolution)
    sizes = torch.tensor([config.resolution, config.resolution, 0, 0, config.resolution, config.resolution])
    return {"image": torch.rand(shape) * 2 - 1, "sizes": sizes.expand(count, -1), "caption": ["an image"] * count}
