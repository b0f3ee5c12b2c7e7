"""What is wrong with the slices of a folder, or worth saying of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

from ldm.data.batch_sampler import evenly_spaced
from ldm.data.sources.base import short_hash
from ldm.data.sources.medical_scan import MAX_LISTED, positions, read_pixels
from ldm.medical.slices import MAX_PIXELS, Pixels, Slice
from ldm.medical.windows import Window

MISSING_SLICE = 1.5  # times the usual distance of two slices
SLICES_FOR_VALUES = 8  # of a series, evenly spaced


def check_series(slices: Sequence[Slice]) -> None:
    """ValueError: a series of several patients."""
    patients = defaultdict[str, set[str]](set)
    for item in slices:
        patients[item.series].add(item.patient)
    if mixed := [series for series, found in patients.items() if len(found) > 1]:
        raise ValueError(
            f"{len(mixed):,} series have slices of several patients, such as series {series_name(mixed[0])} of "
            f"{len(patients[mixed[0]])}: correct PatientID in these files, or remove them"
        )


def check_windows(slices: Sequence[Slice], windows: Sequence[Window], text: str) -> None:
    """ValueError: a window in HU of what is no CT."""
    other = {item.modality for item in slices} - {"CT", ""}
    if other and any(window.in_hounsfield_units for window in windows):
        raise ValueError(
            f"data.window {text} is in Hounsfield units, and there are {', '.join(sorted(other))} images: "
            "choose percentile, file, or C,W, or keep CT apart"
        )


def check_spacing(slices: Sequence[Slice], spacing: float | None) -> None:
    """ValueError: pixels of several sizes that are not resampled, or of unknown size that would be."""
    unknown = sum(item.spacing is None for item in slices)
    known = sorted({round(side, 3) for item in slices for side in item.spacing or ()})
    if spacing is not None and unknown:
        raise ValueError(
            f"data.spacing {spacing}: {unknown:,} of {len(slices):,} slices do not say how large their pixels are: "
            "say it in a table metadata.csv with columns file_name and spacing, or leave data.spacing out"
        )
    if spacing is not None and any(
        side[0] * mm[0] * side[1] * mm[1] / spacing**2 > MAX_PIXELS
        for side, mm in {(item.size, item.spacing) for item in slices if item.spacing}
    ):
        raise ValueError(
            f"data.spacing {spacing}: some slices would have over {MAX_PIXELS:,} pixels: pass a larger one"
        )
    if spacing is None and (len(known) > 1 or (known and unknown)):
        have = f"{known[0]:g} to {known[-1]:g} mm" if len(known) > 1 else f"{known[0]:g} mm or unknown"
        raise ValueError(
            f"pixels are of several sizes, {have}: pass --data.spacing {median(known):g} to resample them all"
        )


def describe(slices: Sequence[Slice]) -> str:
    """What was detected, on one line."""
    series, patients = len({item.series for item in slices}), len({item.patient for item in slices})
    spacings = sorted({side for item in slices for side in item.spacing or ()})
    parts = [
        f"medical: {series:,} series of {patients:,} patients, {len(slices):,} slices",
        _counted(item.modality or "unknown modality" for item in slices),
        _counted(item.plane or "unknown plane" for item in slices),
        _counted(f"{item.size[1]} x {item.size[0]} pixels" for item in slices),
        f"spacing {spacings[0]:.3g} to {spacings[-1]:.3g} mm" if spacings else "spacing unknown",
        _counted(f"{item.bits} bits" for item in slices),
    ]
    return "; ".join(parts)


def _counted(words: Iterable[str]) -> str:
    """`CT 12, MR 3`: the most frequent ones, with how many there are."""
    counts = Counter(words).most_common()
    return ", ".join(f"{word}: {count:,}" for word, count in counts[:4]) + (", ..." if len(counts) > 4 else "")


def series_name(series: str) -> str:
    """What a series is called in messages and names: a hash of its UID."""
    return short_hash(series)[:12]


def gaps(slices: Sequence[Slice]) -> Iterator[str]:
    """A line on series in which a slice is missing; none of a volume is, but for empty ones."""
    found = []
    for series, members in positions(slices, lambda item: item.series).items():
        places = sorted({round(slices[i].position or 0, 3) for i in members if slices[i].orientation})
        steps = [after - before for before, after in pairwise(places)]
        if len(steps) > 1 and max(steps) > MISSING_SLICE * median(steps):
            at = steps.index(max(steps))
            found.append(f"series {series_name(series)} between {places[at]:g} and {places[at + 1]:g} mm")
    if found:
        yield f"{len(found):,} series miss slices: {', '.join(found[:MAX_LISTED])}"


def count_burned_in(slices: Sequence[Slice]) -> Iterator[str]:
    """A line on slices whose header says that text is part of the pixels."""
    burned = sum(item.burned_in for item in slices)
    if burned:
        yield f"{burned:,} slices say that text is burned into them, which may name the patient: look at them"


def some_pixels(members: Sequence[Slice]) -> Iterator[Pixels]:
    """The values of some slices of a series, in which all are alike; those that cannot be read are left out."""
    for index in evenly_spaced(SLICES_FOR_VALUES, len(members)):
        with suppress(ValueError):
            yield read_pixels(members[index])


def describe_series(members: Sequence[Slice], root: Path) -> str:
    """Size, kind, values, polarity and place of a series, on one line."""
    first, pixels = members[0], list(some_pixels(members))
    values = [one.unpadded() for one in pixels]
    low, high = (limit(map(limit, filter(len, values)), default=0) for limit in (min, max))
    where = first.path.parent if len({item.path for item in members}) > 1 else first.path
    parts = [
        f"{len(members):,} slices",
        " ".join(filter(None, (first.modality, first.plane))),
        f"{first.size[1]} x {first.size[0]} pixels",
        f"{first.spacing[1]:.3g} x {first.spacing[0]:.3g} mm" if first.spacing else "spacing unknown",
        f"values {low:g} to {high:g}" if pixels else "no slice can be decoded",
        "high values are dark" if any(one.inverted for one in pixels) else "",
        "padding" if any(one.padding is not None for one in pixels) else "",
        where.relative_to(root).as_posix(),
    ]
    return ", ".join(filter(None, parts))
