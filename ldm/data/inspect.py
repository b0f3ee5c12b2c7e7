"""What is in a set of images before anybody trains on it: sizes, unreadable files, duplicates, captions."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.data.config import DataConfig
from ldm.data.dataset import open_user_data
from ldm.data.sources.base import ImageTextSource
from ldm.data.sources.folder import find_metadata
from ldm.data.transforms import Sides, View
from ldm.imaging import captioned_grid, save_image, tensor_to_pil

THUMBNAIL_SIDE = 128  # the longer side, in pixels, of what is hashed and shown of an image


class CheckDataConfig(ScriptConfig):
    """Settings of check_data."""

    source: Positional[str] = ""
    """folder, parquet file, hub id or shards, as in data.source"""
    size: int = Field(256, ge=8)
    """resolution of the training that is planned"""
    max_tokens: int = Field(77, ge=3)
    """tokens that the text tower reads, start and end among them"""
    contact_sheet: Path | None = None
    """write a contact sheet, a PNG, of the first images with their captions"""
    sheet_images: int = Field(48, ge=1)
    """images on it"""
    quarantine: Path | None = None
    """move unreadable files of a folder here; nothing is moved when left out"""
    num_workers: int = Field(os.cpu_count() or 1, ge=1)
    """threads that decode images"""


def check_data(config: CheckDataConfig, count_tokens: Callable[[str], int]) -> Iterator[str]:
    """Inspect all images of both splits: the lines of the report. Writes the sheet and moves files as configured."""
    if not config.source:
        raise ValueError("no images: pass a folder, as in `python scripts/check_data.py my_photos`")
    streams = DataConfig().shard_streams
    sources = [open_user_data(config.source, "train", streams=streams)]
    sources += [open_user_data(config.source, "test", streams=streams)]
    yield sources[0].description
    report, examples = inspect_dataset(
        sources,
        count_tokens,
        max_tokens=config.max_tokens,
        num_examples=config.sheet_images,
        num_workers=config.num_workers,
    )
    yield from report.format(config.size, config.max_tokens)
    if config.contact_sheet and examples:
        thumbnails = [info.thumbnail for info in examples if info.thumbnail]
        sheet = captioned_grid(thumbnails, [info.caption for info in examples], columns=8)
        save_image(sheet, config.contact_sheet)
        yield f"contact sheet: {config.contact_sheet}"
    if config.quarantine:
        yield from _quarantine(Path(config.source), config.quarantine, list(report.unreadable))


def _quarantine(folder: Path, target: Path, names: list[str]) -> Iterator[str]:
    """Move files out of a folder, to the same relative paths below `target`; ValueError when it is not a folder."""
    if not folder.is_dir():
        raise ValueError(f"--quarantine: {folder} is not a folder, and only files of a folder can be moved")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--quarantine {target} is inside of {folder}: pass a folder elsewhere")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, target / name)
    yield f"{len(names):,} files moved to {target}"
    if names and (table := find_metadata(folder)):
        yield f"{table} may still name them: remove their lines before you train"


class ImageInfo(NamedTuple):
    """What one image is like; an error in place of the rest."""

    name: str
    error: str | None
    size: Sides = (0, 0)
    dhash: int = 0  # equal for images that look the same
    thumbnail: Image.Image | None = None
    caption: str = ""


class DatasetReport(NamedTuple):
    """What all images are like."""

    total: int
    unreadable: dict[str, str]  # name -> error
    sizes: list[Sides]
    duplicates: list[list[str]]  # names of images that look the same
    uncaptioned: int
    too_long: list[str]  # names of images with a caption over the limit of tokens

    def format(self, size: int, max_tokens: int) -> Iterator[str]:
        """The report for a training at `size` pixels under a text tower of `max_tokens`."""
        yield f"{self.total:,} images, {len(self.unreadable):,} unreadable"
        yield from (f"  {name}: {error}" for name, error in self.unreadable.items())
        if self.sizes:
            sides = [min(sides) for sides in self.sizes]
            small = sum(side < size for side in sides)
            yield (
                f"shorter side from {min(sides):,} to {max(sides):,} pixels, median {median(sides):,.0f}; "
                f"{small:,} below {size}, which would be enlarged"
            )
            ratios = [width / height for height, width in self.sizes]
            yield f"width to height from {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}"
        yield f"{sum(len(names) - 1 for names in self.duplicates):,} images look like another one"
        yield from (f"  {' = '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for names in self.duplicates)
        long = f"{len(self.too_long):,} with one of over {max_tokens} tokens"
        yield f"{self.uncaptioned:,} images without a caption; {long}"
        yield from (f"  {name}" for name in self.too_long[:20])


def inspect_dataset(
    sources: Sequence[ImageTextSource],
    count_tokens: Callable[[str], int],
    *,
    max_tokens: int,
    num_examples: int,
    num_workers: int,
) -> tuple[DatasetReport, list[ImageInfo]]:
    """The report of all sources, and the first readable images, at most `num_examples`, with a thumbnail each."""
    items = [(source, index) for source in sources for index in range(len(source.names))]
    with ThreadPoolExecutor(num_workers) as pool:
        images = list(pool.map(lambda i: inspect_image(*items[i], thumbnail=i < 2 * num_examples), range(len(items))))
    captions = [source.captions[index] for source, index in items]
    readable = [info for info in images if info.error is None]
    by_hash: dict[int, list[str]] = defaultdict(list)
    for info in readable:
        by_hash[info.dhash].append(info.name)
    report = DatasetReport(
        total=len(images),
        unreadable={info.name: info.error for info in images if info.error is not None},
        sizes=[info.size for info in readable],
        duplicates=[names for names in by_hash.values() if len(names) > 1],
        uncaptioned=sum(not entry for entry in captions),
        too_long=[
            info.name
            for info, entry in zip(images, captions, strict=True)
            if any(count_tokens(caption) > max_tokens for caption in entry)
        ],
    )
    pairs = [(info, entry) for info, entry in zip(images, captions, strict=True) if info.thumbnail]
    return report, [info._replace(caption=next(iter(entry), "")) for info, entry in pairs[:num_examples]]


def inspect_image(source: ImageTextSource, index: int, *, thumbnail: bool) -> ImageInfo:
    """Decode one image, at no higher resolution than it takes to hash it and to show it."""
    height, width = source.size(index)
    scale = THUMBNAIL_SIDE / max(height, width, THUMBNAIL_SIDE)
    view = View((max(1, round(height * scale)), max(1, round(width * scale))))
    try:
        image = source.read(index, view, channels=3, side=THUMBNAIL_SIDE // 2)
    except ValueError as error:
        return ImageInfo(source.names[index], str(error))
    (small,) = tensor_to_pil(image.pixels[None])
    return ImageInfo(
        source.names[index], None, image.original_size, difference_hash(small), small if thumbnail else None
    )


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each cell of an 8 x 8 grid is darker than the one to its right (Krawetz 2013, "dHash").

    A plain image hashes to its brightness, since all its bits would be 0.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2) or -1 - int(grey.mean())
