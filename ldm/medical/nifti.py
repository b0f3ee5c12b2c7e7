"""NIfTI volumes: slices of a plane, turned as radiology views them."""

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import aff2axcodes

from ldm.medical.slices import MAX_VOXELS, VIEWS, Pixels, Plane, Slice, Turn, Values, fill_holes

CACHED_BYTES = 2**30  # of volumes, in each process
MM_IN_UNIT = {"meter": 1000.0, "micron": 0.001}
MIN_SHOWN = 0.01  # of the pixels of a slice are above the background, or it counts as empty
BACKGROUND = 0.05  # of the brightest values of a volume


class VolumeCache:
    """The volumes that were read last, in RAS, as float32."""

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        self.limit, self._lock = limit, Lock()
        self._volumes: OrderedDict[tuple[Path, int], Values] = OrderedDict()

    def read(self, path: Path) -> Values:
        """A volume (right, front, up). ValueError: see `_read`."""
        key = path, path.stat().st_mtime_ns
        with self._lock:
            if key in self._volumes:
                self._volumes.move_to_end(key)
                return self._volumes[key]
            volume = _read(path)  # one at a time, as some are large
            self._volumes[key] = volume
            while len(self._volumes) > 1 and sum(one.nbytes for one in self._volumes.values()) > self.limit:
                self._volumes.popitem(last=False)
        return volume


CACHE = VolumeCache()


def read_slices(path: Path, plane: Plane) -> list[Slice]:
    """The slices of a plane that are not empty, along the normal; ValueError: there are none."""
    volume, spacing = CACHE.read(path), _spacing(path)
    normal, (down, right) = _axes(plane)
    bright = float(np.percentile(volume, 99.5))
    floor = float(volume.min())
    level = floor + BACKGROUND * (bright - floor)
    others = tuple(axis for axis in range(3) if axis != normal)
    shown = (volume > level).mean(axis=others)
    if not (shown >= MIN_SHOWN).any():
        raise ValueError("no slice that is not empty")
    bits = int(_load(path).get_data_dtype().itemsize * 8)
    return [
        Slice(
            path=path,
            index=index,
            size=(volume.shape[down], volume.shape[right]),
            spacing=(spacing[down], spacing[right]),
            plane=plane,
            position=index * spacing[normal],
            bits=bits,
        )
        for index in np.flatnonzero(shown >= MIN_SHOWN).tolist()
    ]


def read_pixels(item: Slice) -> Pixels:
    """The values of a slice, after scl_slope and scl_inter."""
    assert item.plane is not None
    normal, (down, right) = _axes(item.plane)
    values = np.moveaxis(CACHE.read(item.path), normal, 0)[item.index]
    signs = [sum(way) for way in VIEWS[item.plane]]  # in DICOM's axes, whose first two are opposite to RAS
    flips = [sign * (1 if axis == 2 else -1) < 0 for sign, axis in zip(signs, (down, right), strict=True)]
    return Pixels(Turn(down > right, *flips)(values))


def _axes(plane: Plane) -> tuple[int, tuple[int, int]]:
    """The axis of a volume along the normal of a plane, and those along its columns and its rows."""
    down, right = (int(np.abs(way).argmax()) for way in VIEWS[plane])
    return 3 - down - right, (down, right)


def _read(path: Path) -> Values:
    """A volume in RAS, the first one of several. ValueError: damaged, of colour, of another shape or too large."""
    image = _load(path)
    try:
        if len(image.shape) > 3:
            image = image.slicer[(..., *[0] * (len(image.shape) - 3))]
        return fill_holes(np.asanyarray(nibabel.as_closest_canonical(image).dataobj))[0]
    except Exception as error:  # damaged files raise errors of many types, whose messages have names of files
        raise ValueError(f"values that cannot be read ({type(error).__name__})") from None


def _load(path: Path) -> Any:
    try:
        image: Any = nibabel.load(path)
        shape, dtype = image.shape, image.get_data_dtype()
        codes = aff2axcodes(image.affine)
    except Exception as error:
        raise ValueError(f"not a NIfTI volume, or a damaged one ({type(error).__name__})") from None
    if len(shape) < 3 or not all(shape):
        raise ValueError(f"of shape {shape}, a volume has three sides")
    if dtype.fields or dtype.kind not in "iuf":
        raise ValueError(f"values of type {dtype}, only grey ones are read")
    if np.prod(shape[:3], dtype=np.float64) > MAX_VOXELS:
        raise ValueError(f"of shape {shape}, which is beyond the limit of {MAX_VOXELS:,} voxels")
    if None in codes:
        raise ValueError("an affine that maps an axis to nothing")
    return image


def _spacing(path: Path) -> tuple[float, ...]:
    """mm along each axis of a volume in RAS."""
    image = _load(path)
    lengths = np.linalg.norm(image.affine[:3, :3], axis=0)
    unit = MM_IN_UNIT.get(image.header.get_xyzt_units()[0], 1.0) if hasattr(image.header, "get_xyzt_units") else 1.0
    axes = nibabel.io_orientation(image.affine)[:, 0].astype(int)
    return tuple(round(float(lengths[axes == axis][0] * unit), 4) for axis in range(3))
