"""A folder of medical files: DICOM, NIfTI, and grey PNG and TIFF of 16 bits, also mixed.

Values stay floats from the file to the sample. A patient is never in both splits. What identifies one groups files and
is written nowhere: items are named by hashes, and messages name no id and no file; check_data lists files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ldm.data.config import DataConfig
from ldm.data.sources.base import (
    Decoded,
    ImageTextSource,
    Split,
    hash_split,
    short_hash,
)
from ldm.data.sources.folder import own_splits
from ldm.data.sources.medical_checks import (
    check_series,
    check_spacing,
    check_windows,
    count_burned_in,
    describe,
    describe_series,
    gaps,
    series_name,
    some_pixels,
)
from ldm.data.sources.medical_scan import count_reasons, positions, read_pixels, scan
from ldm.data.sources.medical_tables import add_tables, add_template
from ldm.data.transforms import Sides, View, crop_resize_values, crop_values, scaled_sides
from ldm.medical.slices import Slice
from ldm.medical.windows import PERCENTILES, Window, parse_windows


@dataclass(frozen=True, kw_only=True)
class MedicalSource(ImageTextSource):
    """Slices whose values are shown through windows, at their own pixel spacing or at another."""

    slices: Sequence[Slice]
    windows: Sequence[Window]
    spacing: float | None
    root: Path
    _percentiles: dict[str, tuple[float, float]] = field(default_factory=dict)  # of each series that was asked for

    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        item = self.slices[index]
        pixels = read_pixels(item)
        limits = partial(self._limits, item.series)
        shown = np.stack([window.apply(pixels, limits) for window in self.windows])
        scale = self._scale(item)
        cropped, corner = crop_values(shown, view, scale) if scale else crop_resize_values(shown, view)
        return Decoded(cropped.expand(channels, -1, -1), corner, self.size(index))

    def size(self, index: int) -> Sides:
        item = self.slices[index]
        scale = self._scale(item)
        return scaled_sides(item.size, scale) if scale else item.size

    def content(self) -> str:
        """Of the values of a few slices."""
        some = some_pixels(self.slices)
        return short_hash(" ".join(str(pixels.values.sum(dtype=np.float64)) for pixels in some))

    def details(self) -> Iterator[str]:
        for series, members in self._series.items():
            yield f"{series_name(series)}: {describe_series(members, self.root)}"

    @cached_property
    def _series(self) -> Mapping[str, list[Slice]]:
        by_series = positions(self.slices, lambda item: item.series)
        return {series: [self.slices[i] for i in members] for series, members in by_series.items()}

    def _scale(self, item: Slice) -> tuple[float, float] | None:
        """By how much height and width of a slice grow."""
        if self.spacing is None or item.spacing is None:
            return None
        return item.spacing[0] / self.spacing, item.spacing[1] / self.spacing

    def _limits(self, series: str) -> tuple[float, float]:
        """The percentiles of a series, without padding."""
        if series not in self._percentiles:
            values = np.concatenate([pixels.unpadded() for pixels in some_pixels(self._series[series])])
            low, high = np.percentile(values, PERCENTILES) if len(values) else (0.0, 0.0)
            self._percentiles[series] = float(low), float(high)
        return self._percentiles[series]


def open_medical(config: DataConfig, split: Split) -> MedicalSource:
    """One split of a folder. ValueError: nothing can be read, or it contradicts itself or the settings."""
    windows, root = parse_windows(config.window), Path(config.source).expanduser()
    if len(windows) not in (1, config.channels):
        raise ValueError(
            f"data.window {config.window} makes {len(windows)} channels, data.channels is {config.channels}: "
            "give one window, or as many as channels"
        )
    found = scan(root, config.plane)
    if not found.slices:
        reasons = count_reasons(found.refused) or "localizers alone"
        raise ValueError(f"{root}: no medical image can be read here: {reasons}")
    slices = add_template(add_tables(root, found), config.caption_template)
    slices, patient_notes = _fill_in_patients(root, slices)
    check_series(slices)
    check_windows(slices, windows, config.window)
    check_spacing(slices, config.spacing)
    chosen, split_notes = _choose_split(root, slices, split)
    numbers = Counter[str]()
    names = []
    for item in slices:
        numbers[item.series] += 1
        names.append(f"series {series_name(item.series)} slice {numbers[item.series]}")
    notes = [*found.notes(), *split_notes, *patient_notes, *gaps(slices), *count_burned_in(slices)]
    return MedicalSource(
        names=[names[i] for i in chosen],
        captions=[slices[i].captions for i in chosen],
        slices=[slices[i] for i in chosen],
        windows=windows,
        spacing=config.spacing,
        patients=[slices[i].patient for i in chosen],
        root=root,
        refused=[f"{name}: {reason}" for name, reason in found.refused],
        description=f"{describe(slices)}, in {root}/; window {config.window}",
        notes=notes,
    )


def _fill_in_patients(root: Path, slices: Sequence[Slice]) -> tuple[list[Slice], list[str]]:
    """Each file without a patient counts as one; and a note on that."""
    nameless = {item.path for item in slices if not item.patient}
    remedy = "write a table metadata.csv with columns file_name and patient"
    notes = [f"{len(nameless):,} files name no patient, and each counts as one: {remedy}"] if nameless else []

    def filled(item: Slice) -> Slice:
        return replace(item, patient=item.patient or f"file {item.path.relative_to(root).as_posix()}")

    return list(map(filled, slices)), notes


def _choose_split(root: Path, slices: Sequence[Slice], split: Split) -> tuple[list[int], list[str]]:
    """The slices of a split, by patient: the folder's own splits, or a part that is held out.

    ValueError: a patient in both.
    """
    by_file = positions(slices, lambda item: item.path.relative_to(root).as_posix())
    own, _ = own_splits(list(by_file))  # whose notes name files
    if own:
        of_patients = {name: {slices[by_file[file][0]].patient for file in files} for name, files in own.items()}
        if both := of_patients["train"] & of_patients["test"]:
            raise ValueError(
                f"{root}: {len(both):,} patients are in both splits of this folder: move all files of a patient to one"
            )
        notes = [f"held out: the {len(own['test']):,} files of the held-out folder"]
        if others := len(by_file) - sum(map(len, own.values())):
            notes.append(f"{others:,} files skipped, in neither split")
        return [index for file in own[split] for index in by_file[file]], notes
    patients = sorted({item.patient for item in slices})
    if len(patients) == 1:
        remedy = "add more, or say who is who in a table metadata.csv with columns file_name and patient"
        raise ValueError(f"{root}: all {len(slices):,} slices are of one patient, who is in one split alone: {remedy}")
    chosen = {patients[i] for i in hash_split(patients, split)}
    held_out = {patients[i] for i in hash_split(patients, "test")}
    note = f"held out: {len(held_out):,} of {len(patients):,} patients"
    return [index for index, item in enumerate(slices) if item.patient in chosen], [note]
