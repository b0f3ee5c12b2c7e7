"""Which files are medical, by their names and first bytes: this needs none of the libraries that read them."""

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Literal

from PIL import Image

Format = Literal["dicom", "nifti", "grey"]
NIFTI_SUFFIXES = (".nii", ".nii.gz")
GREY_SUFFIXES = (".png", ".tif", ".tiff")
DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
GREY_MODES = {"I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}  # of Pillow, with the bits of a pixel
PREAMBLE = 128  # bytes before the letters DICM
MAX_TRIED = 16  # files whose first bytes are read


def format_of(path: PurePath) -> Format | None:
    """What a file may be, by its name: one without a suffix, or with digits as UIDs have, may be DICOM."""
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    if name.endswith(GREY_SUFFIXES):
        return "grey"
    is_index = name == "dicomdir"
    return "dicom" if not is_index and (path.suffix.lower() in DICOM_SUFFIXES or path.suffix[1:].isdigit()) else None


def is_medical(files: Sequence[Path]) -> bool:
    """Whether there are DICOM or NIfTI files among these, or all PNG and TIFF are grey and of 16 bits."""
    if any(path.name.lower().endswith((*DICOM_SUFFIXES[1:], *NIFTI_SUFFIXES)) for path in files):
        return True
    grey = [path for path in files if format_of(path) == "grey"]
    unnamed = [path for path in files if format_of(path) == "dicom"]
    return any(map(is_dicom, _some(unnamed))) or (bool(grey) and all(map(_is_grey_16, _some(grey))))


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return file.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    except OSError:
        return False


def _is_grey_16(path: Path) -> bool:
    """Whether an image has grey pixels of 16 bits or floats."""
    try:
        with Image.open(path, formats=["PNG", "TIFF"]) as image:
            return image.mode in GREY_MODES
    except Exception:  # damaged files raise errors of many types in Pillow's decoders
        return False


def _some(paths: Sequence[Path]) -> Sequence[Path]:
    return paths[:: max(1, len(paths) // MAX_TRIED)]
