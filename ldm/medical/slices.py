"""What the readers of medical files have in common: `Slice`, `Pixels`, and how a slice is turned for viewing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = Literal["axial", "coronal", "sagittal"]
Values = NDArray[np.float32]
MAX_PIXELS = 64_000_000  # of a slice
MAX_VOXELS = 2**29  # of a volume, which is 2 GiB as float32

# Where rows and columns of a slice lead as it is viewed, in DICOM's axes: to the patient's left, back and head.
VIEWS: dict[Plane, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sagittal": ((0, 0, -1), (0, 1, 0)),
    "coronal": ((0, 0, -1), (1, 0, 0)),
    "axial": ((0, 1, 0), (1, 0, 0)),
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What a file says of one image in it. The ids are there to group slices by; nothing may write them."""

    path: Path
    index: int = 0  # of the frame, the slice of a volume or the page
    size: tuple[int, int]  # height and width, in pixels
    spacing: tuple[float, float] | None = None  # mm from row to row, and from column to column
    plane: Plane | None = None
    position: float | None = None  # mm along the normal of the plane
    orientation: tuple[float, ...] = ()  # the direction cosines of a DICOM image
    bits: int
    modality: str = ""
    localizer: bool = False
    burned_in: bool = False  # text may be part of the pixels
    patient: str = ""  # "" where the file has none
    study: str = ""
    series: str = ""
    captions: tuple[str, ...] = ()  # that a table has for it
    fields: Mapping[str, str] = field(default_factory=dict)  # that a caption may use


class Pixels(NamedTuple):
    """The values of a slice, as it is viewed."""

    values: Values  # (height, width), in the unit of the modality, such as HU
    padding: NDArray[np.bool_] | None = None  # pixels that are no part of the image
    inverted: bool = False  # high values are dark (MONOCHROME1)
    own_window: Callable[[], Values] | None = None  # the values in [0, 1] as the file itself has them displayed

    def unpadded(self) -> Values:
        """The values that are no padding, (n,)."""
        return self.values.ravel() if self.padding is None else self.values[~self.padding]


class Turn(NamedTuple):
    """How a stored slice is turned for viewing: transposed first, then flipped."""

    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        array = array.T if self.transposed else array
        return array[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def fill_holes(values: NDArray[Any]) -> tuple[Values, NDArray[np.bool_] | None]:
    """As float32, with the lowest value where there is no number; and where that is, if anywhere."""
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if finite.all():
        return values, None
    lowest = values[finite].min() if finite.any() else 0
    return np.where(finite, values, lowest).astype(np.float32), ~finite


def plane_of(normal: NDArray[np.float64]) -> Plane:
    """The plane whose normal is the nearest to this one."""
    return list(VIEWS)[int(np.abs(normal).argmax())]


def turn_for_viewing(along_row: NDArray[np.float64], along_column: NDArray[np.float64]) -> Turn:
    """How to turn a slice whose columns and rows follow each other in these directions, in DICOM's axes."""
    rows, columns = (np.array(way) for way in VIEWS[plane_of(np.cross(along_row, along_column))])
    transposed = abs(along_row @ columns) < abs(along_row @ rows)
    down, right = (along_row, along_column) if transposed else (along_column, along_row)
    return Turn(bool(transposed), bool(down @ rows < 0), bool(right @ columns < 0))
