"""What is in a set of images before anybody trains on it: sizes, unreadable files, duplicates, captions."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.data.sources.base import ImageTextSource, as_caption_list
from ldm.data.sources.decode import ORIGINAL_SIZE, decode_image

INSPECT_SIDE, THUMBNAIL_SIDE = 64, 128  # pixels that images are decoded to, at least, and those of a contact sheet


class ImageInfo(NamedTuple):
    """What one image is like; an error takes the place of the rest."""

    name: str
    error: str | None
    size: tuple[int, int] = (0, 0)  # width and height
    dhash: int = 0  # equal for images that look the same
    thumb: Image.Image | None = None
    caption: str = ""


class DatasetReport(NamedTuple):
    """What all images are like."""

    total: int
    unreadable: dict[str, str]  # name -> error
    sizes: list[tuple[int, int]]
    duplicates: list[list[str]]  # names of images that look the same
    uncaptioned: int
    long: list[str]  # captions over the limit of tokens, by the name of their image

    def format(self, size: int, limit: int) -> Iterator[str]:
        """The report for a person who wants to train at `size` pixels under a tower of `limit` tokens."""
        yield f"{self.total:,} images, {len(self.unreadable):,} unreadable"
        yield from (f"  {name}: {error}" for name, error in self.unreadable.items())
        if self.sizes:
            sides = [min(pair) for pair in self.sizes]
            small = sum(side < size for side in sides)
            yield (
                f"shorter side from {min(sides):,} to {max(sides):,} pixels, median {median(sides):,.0f}; "
                f"{small:,} below {size}, which would be enlarged"
            )
            ratios = [width / height for width, height in self.sizes]
            yield f"width to height from {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}"
        more = sum(len(names) - 1 for names in self.duplicates)
        yield f"{more:,} images look like another one"
        yield from (f"  {' = '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for names in self.duplicates)
        yield f"{self.uncaptioned:,} images without a caption; {len(self.long):,} with one of over {limit} tokens"
        yield from (f"  {name}" for name in self.long[:20])


def inspect_image(source: ImageTextSource, index: int, *, thumb: bool) -> ImageInfo:
    """Decode one image, never at more than it takes to hash it and to show it."""
    name = source.names[index]
    try:
        image = source.images[index]
        whole = image if isinstance(image, Image.Image) else decode_image(image, side=INSPECT_SIDE)
    except ValueError as error:
        return ImageInfo(name, str(error))
    size = whole.info.get(ORIGINAL_SIZE, whole.size)
    small = whole.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return ImageInfo(name, None, size, difference_hash(whole), small if thumb else None)


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is darker than the one to its right (Krawetz 2013, "dHash").

    A plain image hashes to its brightness, since all its bits would be 0.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2) or -1 - int(grey.mean())


def inspect_dataset(
    sources: Sequence[ImageTextSource], count_tokens: Callable[[str], int], *, limit: int, shown: int, workers: int
) -> tuple[DatasetReport, list[ImageInfo]]:
    """The report of all sources, and the first images that could be read, at most `shown`, with a thumbnail each."""
    places = [(source, index) for source in sources for index in range(len(source.names))]
    with ThreadPoolExecutor(workers) as pool:
        jobs = pool.map(lambda job: inspect_image(*job[1], thumb=job[0] < 2 * shown), enumerate(places))
        images = list(jobs)
    alike: dict[int, list[str]] = defaultdict(list)
    for seen in images:
        if seen.error is None:
            alike[seen.dhash].append(seen.name)
    captions = [as_caption_list(source.captions[index]) for source, index in places]
    report = DatasetReport(
        total=len(images),
        unreadable={seen.name: seen.error for seen in images if seen.error is not None},
        sizes=[seen.size for seen in images if seen.error is None],
        duplicates=[names for names in alike.values() if len(names) > 1],
        uncaptioned=sum(not any(entry) for entry in captions),
        long=[
            seen.name
            for seen, entry in zip(images, captions, strict=True)
            if any(count_tokens(caption) > limit for caption in entry)
        ],
    )
    told = [s._replace(caption=next(iter(c), "")) for s, c in zip(images, captions, strict=True) if s.thumb is not None]
    return report, told[:shown]
