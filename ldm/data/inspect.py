"""What is in a set of images before anybody trains on it: sizes, unreadable files, duplicates, captions."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple, get_args

import numpy as np
from PIL import Image
from pydantic import Field
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.data.config import DataConfig
from ldm.data.dataset import open_source
from ldm.data.sources.base import ImageTextSource, Split
from ldm.data.sources.folder import find_metadata
from ldm.data.transforms import Sides, View
from ldm.imaging import captioned_grid, check_image_file, save_image, tensor_to_pil
from ldm.io.atomic import check_folder

THUMBNAIL_SIDE = 128  # the longer side, in pixels, of what is hashed and shown of an image


class CheckDataConfig(ScriptConfig):
    """Settings of check_data."""

    source: Positional[str] = ""
    """as data.source: a folder, a parquet file, the id of a hub data set, or shards"""
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
    if config.contact_sheet:
        check_image_file(config.contact_sheet, "--contact-sheet")
    if config.quarantine:
        check_quarantine(Path(config.source), config.quarantine)
    data = DataConfig(source=config.source)
    train, test = (open_source(data, split) for split in get_args(Split))
    yield from [train.description, *train.notes]
    items = [(source, index) for source in (train, test) for index in range(len(source.names))]
    enough = range(2 * config.sheet_images)  # to find that many readable ones
    with ThreadPoolExecutor(config.num_workers) as pool:
        images = list(pool.map(lambda i: inspect_image(*items[i], thumbnail=i in enough), range(len(items))))
    yield from format_report(images, count_tokens, size=config.size, max_tokens=config.max_tokens)
    shown = [(info.thumbnail, next(iter(info.captions), "")) for info in images if info.thumbnail]
    if config.contact_sheet and shown:
        save_image(captioned_grid(*zip(*shown[: config.sheet_images], strict=True), columns=8), config.contact_sheet)
        yield f"contact sheet: {config.contact_sheet}"
    if config.quarantine:
        yield from _quarantine(Path(config.source), config.quarantine, [info.name for info in images if info.error])


def check_quarantine(folder: Path, target: Path) -> None:
    """ValueError unless files of `folder` can be moved to `target`."""
    if not folder.is_dir():
        raise ValueError(f"--quarantine: {folder} is not a folder, and only files of a folder can be moved")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--quarantine {target} is inside of {folder}: pass a folder elsewhere")
    check_folder(target, "--quarantine")


def _quarantine(folder: Path, target: Path, names: list[str]) -> Iterator[str]:
    """Move files out of a folder, to the same relative paths below `target`."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, target / name)
    yield f"{len(names):,} files moved to {target}"
    if names and (table := find_metadata(folder)):
        yield f"{table} may still name them: remove their lines before you train"


class ImageInfo(NamedTuple):
    """What one image is like; an error in place of the rest."""

    name: str
    captions: Sequence[str]
    error: str | None = None
    size: Sides = (0, 0)
    dhash: int = 0  # equal for images that look the same
    thumbnail: Image.Image | None = None


def format_report(
    images: Sequence[ImageInfo], count_tokens: Callable[[str], int], *, size: int, max_tokens: int
) -> Iterator[str]:
    """The lines on a training at `size` pixels under a text tower of `max_tokens`."""
    unreadable = [info for info in images if info.error is not None]
    yield f"{len(images):,} images, {len(unreadable):,} unreadable"
    yield from (f"  {info.name}: {info.error}" for info in unreadable)
    readable = [info for info in images if info.error is None]
    if readable:
        sides = [min(info.size) for info in readable]
        small = sum(side < size for side in sides)
        yield (
            f"shorter side from {min(sides):,} to {max(sides):,} pixels, median {median(sides):,.0f}; "
            f"{small:,} below {size}, which would be enlarged"
        )
        ratios = [width / height for height, width in (info.size for info in readable)]
        yield f"width to height from {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}"
    by_hash: dict[int, list[str]] = defaultdict(list)
    for info in readable:
        by_hash[info.dhash].append(info.name)
    duplicates = [names for names in by_hash.values() if len(names) > 1]
    yield f"{sum(len(names) - 1 for names in duplicates):,} images look like another one"
    yield from (f"  {' = '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for names in duplicates)
    uncaptioned = sum(not info.captions for info in images)
    too_long = [info.name for info in images if any(count_tokens(text) > max_tokens for text in info.captions)]
    yield f"{uncaptioned:,} images without a caption; {len(too_long):,} with one of over {max_tokens} tokens"
    yield from (f"  {name}" for name in too_long[:20])


def inspect_image(source: ImageTextSource, index: int, *, thumbnail: bool) -> ImageInfo:
    """Decode one image, at no higher resolution than it takes to hash it and to show it."""
    name, captions = source.names[index], source.captions[index]
    height, width = source.size(index)
    scale = THUMBNAIL_SIDE / max(height, width, THUMBNAIL_SIDE)
    view = View((max(1, round(height * scale)), max(1, round(width * scale))))
    try:
        image = source.read(index, view, channels=3, side=THUMBNAIL_SIDE // 2)
    except ValueError as error:
        return ImageInfo(name, captions, str(error))
    (small,) = tensor_to_pil(image.pixels[None])
    return ImageInfo(name, captions, None, image.original_size, difference_hash(small), small if thumbnail else None)


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each cell of an 8 x 8 grid is darker than the one to its right (Krawetz 2013, "dHash").

    A plain image hashes to its brightness, since all its bits would be 0.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2) or -1 - int(grey.mean())
