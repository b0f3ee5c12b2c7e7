"""What is in a set of images before anybody trains on it: sizes, unreadable files, duplicates, captions."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS, read_yaml, relative
from ldm.data.config import DataConfig
from ldm.data.dataset import open_source
from ldm.data.sources.base import ImageTextSource, Split, first_names
from ldm.data.transforms import Sides, View
from ldm.imaging import captioned_grid, check_image_file, save_image, tensor_to_pil
from ldm.labels import LabelFont
from ldm.medical.slices import Plane

THUMBNAIL_SIDE = 128  # the longer side, in pixels, of what is compared and shown of an image
ALIKE = 32  # by how much of 255 the colours of two images that look alike may differ
SLICES_ALIKE = 4  # the same of slices of medical images, which all look alike
MAX_LISTED = 20  # names that the report lists


class CheckDataConfig(ScriptConfig):
    """Settings of check_data."""

    config: Path = CONFIGS / "images-64/clip.yaml"
    """the training that is planned: the file of a recipe, or config.yaml of a run"""
    source: Positional[str] = ""
    """as data.source: a folder, a parquet file, the id of a hub data set, or shards"""
    size: int | None = Field(None, ge=8)
    """resolution of the training; by default data.resolution of --config"""
    window: str = ""
    """of medical images, as data.window; by default that of --config"""
    spacing: float | None = Field(None, gt=0)
    """of medical images, as data.spacing; by default that of --config"""
    plane: Plane | None = None
    """of NIfTI volumes, as data.plane; by default that of --config"""
    max_tokens: int | None = Field(None, ge=3)
    """tokens that the text tower reads, start and end among them; by default those of the tower of --config"""
    contact_sheet: Path | None = None
    """write a contact sheet, a PNG, of the first images with their captions"""
    sheet_images: int = Field(48, ge=1)
    """images on it"""
    quarantine: Path | None = None
    """move unreadable files of a folder here, with their captions; nothing is moved when left out"""
    num_workers: int = Field(os.cpu_count() or 1, ge=1)
    """threads that decode images"""

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> Self:
        """Without the values of `config`, which is the file of a training."""
        return super().from_dict({"config": values["config"]} if values["config"] else {}, source=source)

    @property
    def data(self) -> DataConfig:
        """The images, as the training would read them; ValueError: none are named, or the file is not one."""
        if not self.source:
            raise ValueError("no images: pass a folder, as in `python scripts/check_data.py my_photos`")
        data = DataConfig.from_dict(read_yaml(self.config).get("data", {}), source=f"{self.config}: data")
        given = {name: getattr(self, name) for name in ("window", "spacing", "plane")}
        given |= {"source": self.source, "resolution": self.size}
        return DataConfig.from_dict(data.to_dict() | {name: value for name, value in given.items() if value}, source="")


class TokenLimit(NamedTuple):
    """What captions are checked against."""

    max_tokens: int
    count: Callable[[str], int]  # tokens of a caption, start and end among them
    origin: str  # what says so


def check_data(config: CheckDataConfig, limit: TokenLimit | None) -> Iterator[str]:
    """Inspect all images of both splits: the lines of the report. Writes the sheet and moves files as configured.

    Without a `limit` captions are not checked.
    """
    from ldm.data.quarantine import check_quarantine, quarantine  # which take long to load

    data, folder = config.data, Path(os.path.expanduser(config.source))
    if config.contact_sheet:
        check_image_file(config.contact_sheet, "--contact-sheet")
    if config.quarantine:
        check_quarantine(folder, config.quarantine)
    train, test = (open_source(data, split) for split in get_args(Split))
    if config.quarantine and train.patients:
        raise ValueError("--quarantine moves images alone, not medical files: leave it out, and move them by hand")
    yield from [train.description, *train.notes]
    if train.patients:
        yield from listed("files refused", train.refused)
        series = [line for source in (train, test) for line in source.details()]
        yield f"{len(series):,} series"
        yield from (f"  {line}" for line in series)
        patients, held_out = set(train.patients), set(test.patients)
        both = len(patients & held_out)
        yield f"patients: {len(patients):,} in training, {len(held_out):,} held out, {both:,} in both"
    tower = f"whose text tower reads {limit.max_tokens} tokens ({limit.origin})" if limit else "without a text tower"
    side = f"{data.resolution} pixels ({'--size' if config.size else relative(config.config)})"
    yield f"for a training at {side}, {tower}"
    items = [(source, index) for source in (train, test) for index in range(len(source.names))]
    enough = range(2 * config.sheet_images)  # to find that many readable ones
    with ThreadPoolExecutor(config.num_workers) as pool:
        images = list(pool.map(lambda i: inspect_image(*items[i], thumbnail=i in enough), range(len(items))))
    yield from format_report(
        images,
        size=data.resolution,
        limit=limit,
        enlarged=data.spacing is None,
        alike=max_difference(train),
    )
    shown = [(info.thumbnail, next(iter(info.captions), "")) for info in images if info.thumbnail]
    if config.contact_sheet and shown:
        thumbnails, captions = zip(*shown[: config.sheet_images], strict=True)
        save_image(captioned_grid(thumbnails, captions, columns=8), config.contact_sheet)
        yield f"contact sheet: {config.contact_sheet}"
        if missing := LabelFont(captions).missing:
            remedy = "install a font that does, such as Noto Sans CJK (Debian: fonts-noto-cjk)"
            yield f"{len(missing):,} characters in it are escapes, as no font has {first_names(missing)}: {remedy}"
    if config.quarantine:
        unreadable = [info.name for info in images if info.error]
        yield from quarantine(folder, config.quarantine, unreadable, [info.name for info in images])


class ImageInfo(NamedTuple):
    """What one image is like; an error in place of the rest."""

    name: str
    captions: Sequence[str]
    error: str | None = None
    size: Sides = (0, 0)
    signature: NDArray[np.int16] | None = None
    thumbnail: Image.Image | None = None


def format_report(
    images: Sequence[ImageInfo], *, size: int, limit: TokenLimit | None, enlarged: bool, alike: int = ALIKE
) -> Iterator[str]:
    """The lines on a training at `size` pixels, under a text tower that reads captions up to a limit.

    Smaller images are enlarged, or else padded. `alike` is that of `find_duplicates`.
    """
    unreadable = [info for info in images if info.error is not None]
    yield f"{len(images):,} images, {len(unreadable):,} unreadable"
    yield from (f"  {info.name}: {info.error}" for info in unreadable)
    readable = [info for info in images if info.error is None]
    if readable:
        sides = [min(info.size) for info in readable]
        small = sum(side < size for side in sides)
        yield (
            f"shorter side from {min(sides):,} to {max(sides):,} pixels, median {median(sides):,.0f}; "
            f"{small:,} below {size}, which would be {'enlarged' if enlarged else 'padded'}"
        )
        ratios = [width / height for height, width in (info.size for info in readable)]
        yield f"width to height from {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}"
    groups = find_duplicates([info.signature for info in readable if info.signature is not None], alike)
    yield f"{sum(len(group) - 1 for group in groups):,} images look like another one"
    yield from (f"  {' = '.join(readable[i].name for i in group[:5])}{' ...' * (len(group) > 5)}" for group in groups)
    yield from listed("images without a caption", [info.name for info in images if not info.captions])
    if limit:
        longest = [(info.name, max(map(limit.count, info.captions), default=0)) for info in images]
        cut = [f"{name} ({count:,})" for name, count in longest if count > limit.max_tokens]
        yield from listed(f"images with a caption of over {limit.max_tokens} tokens, which is cut", cut)


def listed(title: str, names: Sequence[str]) -> Iterator[str]:
    """How many there are, and the first of them, one a line."""
    yield f"{len(names):,} {title}"
    yield from (f"  {name}" for name in names[:MAX_LISTED])
    if len(names) > MAX_LISTED:
        yield f"  ... and {len(names) - MAX_LISTED:,} more"


def inspect_image(source: ImageTextSource, index: int, *, thumbnail: bool) -> ImageInfo:
    """Decode one image, at no higher resolution than it takes to compare it and to show it."""
    name, captions = source.names[index], source.captions[index]
    height, width = source.size(index)
    scale = THUMBNAIL_SIDE / max(height, width, THUMBNAIL_SIDE)
    sides = max(1, round(height * scale)), max(1, round(width * scale))
    view = View((height, width) if source.patients else sides)  # with a spacing, a smaller view is a part of the slice
    try:
        image = source.read(index, view, channels=3, side=THUMBNAIL_SIDE // 2)
    except ValueError as error:
        return ImageInfo(name, captions, str(error))
    (small,) = tensor_to_pil(F.interpolate(image.pixels[None], sides, mode="area"))
    return ImageInfo(name, captions, None, image.original_size, signature(small), small if thumbnail else None)


def signature(image: Image.Image) -> NDArray[np.int16]:
    """Mean colours of 12 x 12 cells, and the shape: (433,), alike for the same image in another size or format."""
    grid = np.asarray(image.convert("RGB").resize((12, 12), Image.Resampling.BOX), np.int16)
    shape = math.log(image.width / image.height) * 10 * ALIKE  # differs too much where one is a tenth wider
    return np.array([*grid.flat, round(shape)], np.int16)


def max_difference(source: ImageTextSource) -> int:
    """By how much signatures of images that look alike may differ in a set."""
    return SLICES_ALIKE if source.patients else ALIKE


def find_duplicates(signatures: Sequence[NDArray[np.int16]], alike: int = ALIKE) -> list[list[int]]:
    """Groups of images that look like their first one: no number of their signatures differs by more than `alike`."""
    if not signatures:
        return []
    rows = np.stack(signatures)
    means = rows.mean(1)
    order = means.argsort(kind="stable")
    rows, ends = rows[order], means[order].searchsorted(means[order] + alike / 6, "right")  # as few cells differ much
    few = rows[:, ::16].copy()  # of the numbers: they tell most images apart
    free, groups = np.ones(len(rows), bool), []
    for i in range(len(rows)):
        if free[i]:
            near = i + 1 + (abs(few[i + 1 : ends[i]] - few[i]) <= alike).all(1).nonzero()[0]
            near = near[free[near] & (abs(rows[near] - rows[i]) <= alike).all(1)]
            free[near] = False
            groups.append(sorted(order[[i, *near]].tolist()))
    return sorted(group for group in groups if len(group) > 1)
