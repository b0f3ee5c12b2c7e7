"""Find the medical files of a folder, and read their headers."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ldm.data.sources.captions import METADATA_FILES, SIDECAR_SUFFIXES
from ldm.data.sources.folder import list_files
from ldm.medical import dicom, grey, nifti
from ldm.medical.formats import Format, format_of
from ldm.medical.slices import Pixels, Plane, Slice

BIDS_SUBJECT = re.compile(r"(?:^|[/_])sub-([a-zA-Z0-9]+)(?=[/_.])")
MAX_LISTED = 5  # reasons, or rows of a table
PIXEL_READERS: dict[Format, Callable[[Slice], Pixels]] = {
    "dicom": dicom.read_pixels,
    "nifti": nifti.read_pixels,
    "grey": grey.read_pixels,
}


class Scan(NamedTuple):
    """What a folder holds."""

    slices: Sequence[Slice]  # in the order of series and positions
    files: Sequence[str]  # all, relative
    localizers: int
    refused: Sequence[tuple[str, str]]  # files that are not read, with reasons

    def notes(self) -> Iterator[str]:
        """Lines on what was left out."""
        if self.localizers:
            yield f"{self.localizers:,} localizers left out"
        if self.refused:
            yield f"{len(self.refused):,} files refused (check_data.py lists them): {count_reasons(self.refused)}"
        paths = map(PurePosixPath, self.files)
        texts = (*METADATA_FILES, *SIDECAR_SUFFIXES)
        if others := [path for path in paths if not format_of(path) and not path.name.lower().endswith(texts)]:
            yield f"{len(others):,} other files skipped"


def read_pixels(item: Slice) -> Pixels:
    """The values of a slice, whatever its file is. ValueError: they cannot be read."""
    kind = format_of(item.path)
    assert kind is not None
    try:
        return PIXEL_READERS[kind](item)
    except OSError as error:
        raise ValueError(_reason(error)) from None


def _reason(error: OSError) -> str:
    """What is wrong, without the name of the file, which the error's own message has."""
    return f"a file that cannot be read ({error.strerror or type(error).__name__})"


def scan(root: Path, plane: Plane) -> Scan:
    """Read the headers of all files below a folder, again where one has changed."""
    files = tuple(name for name in list_files(root)[0] if (root / name).is_file())
    stats = [(root / name).stat() for name in files]
    return _scan(root, plane, files, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=1)  # both splits are made of it
def _scan(root: Path, plane: Plane, files: Sequence[str], states: Sequence[tuple[int, int]]) -> Scan:
    slice_readers: dict[Format, Callable[[Path], list[Slice]]] = {
        "dicom": dicom.read_slices,
        "nifti": partial(nifti.read_slices, plane=plane),
        "grey": grey.read_slices,
    }
    readers = {name: slice_readers[kind] for name in files if (kind := format_of(PurePosixPath(name)))}

    def read(name: str) -> list[Slice] | str:
        try:
            return readers[name](root / name)
        except OSError as error:
            return _reason(error)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(readers, pool.map(read, readers), strict=True))
    slices = [_grouped(item, root) for items in found.values() if not isinstance(items, str) for item in items]
    images = [item for item in slices if not item.localizer]
    images.sort(key=lambda item: (item.series, item.position or 0, str(item.path), item.index))
    refused = [(name, reason) for name, reason in found.items() if isinstance(reason, str)]
    return Scan(images, files, len(slices) - len(images), refused)


def _grouped(item: Slice, root: Path) -> Slice:
    """With a series and a patient, also where the file names none; images of one series have one direction."""
    relative = item.path.relative_to(root).as_posix()
    subject = BIDS_SUBJECT.search(relative)
    turned = ",".join(f"{number:.3f}" for number in item.orientation)
    return replace(
        item,
        series=f"{item.series} {turned}" if item.series else f"file {relative}",
        patient=item.patient or (f"sub-{subject[1]}" if subject else "") or item.study,
    )


def positions(slices: Sequence[Slice], key: Callable[[Slice], str]) -> Mapping[str, list[int]]:
    """Indices of slices by a key."""
    found = defaultdict[str, list[int]](list)
    for index, item in enumerate(slices):
        found[key(item)].append(index)
    return found


def count_reasons(refused: Iterable[tuple[str, str]]) -> str:
    """How many files were refused for each reason, on one line."""
    counts = Counter(reason for _, reason in refused).most_common()
    listed = "; ".join(f"{count:,} x {reason}" for reason, count in counts[:MAX_LISTED])
    return listed + "; ..." * (len(counts) > MAX_LISTED)
