"""DICOM files: their headers, and the values of their pixels in the order that the standard asks for (PS3.3 C.11)."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
)

from ldm.medical.formats import is_dicom
from ldm.medical.slices import MAX_PIXELS, Pixels, Slice, Turn, Values, fill_holes, plane_of, turn_for_viewing

# Warnings would show values of patients.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module="pydicom")

# Fields that say nothing of who a patient is, for captions.
CAPTION_FIELDS = (
    *("Modality", "BodyPartExamined", "PatientSex", "PatientAge", "SliceThickness", "ViewPosition", "Laterality"),
    *("ImageLaterality", "PatientPosition", "ScanningSequence", "SequenceVariant", "MagneticFieldStrength"),
    *("EchoTime", "RepetitionTime", "KVP"),
)
NO_IMAGES = {  # modalities whose pixels, if there are any, show no patient
    **{"SEG": "a segmentation", "RTDOSE": "a radiation dose", "RTSTRUCT": "contours", "RTPLAN": "a treatment plan"},
    **{"SR": "a report", "KO": "a list of images", "PR": "a presentation state", "ECG": "a waveform"},
}
# Sequences in which a file of several frames has, for each or for all, what others have at the top.
FRAME_GROUPS = (
    *("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence"),
    *("PlaneOrientationSequence", "PlanePositionSequence"),
)
PIXEL_DATA = "PixelData", "FloatPixelData", "DoubleFloatPixelData"
RARE_JPEG = JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1  # which Pillow does not decode
DEFERRED_BYTES = 4096  # elements above this are left in the file until they are needed
MAX_FRAMES = 100_000


class RefusedError(ValueError):
    """A file that is understood, but holds nothing that can be trained on."""


def read_slices(path: Path) -> list[Slice]:
    """A slice for each frame of a file, from its header. ValueError: no grey image, not DICOM or damaged."""
    with _short_errors("damaged header"):
        data = _open(path)
        return [_slice(data, path, frame) for frame in range(_count_frames(data))]


def read_pixels(item: Slice) -> Pixels:
    """The values of a slice, after slope and intercept. ValueError: they cannot be decoded."""
    with _short_errors("pixels that cannot be decoded"):
        data = _open(item.path)
        _count_frames(data)
        stored = _decode(data, item)
        if stored.shape != (data.Rows, data.Columns):
            raise RefusedError(f"pixels of shape {stored.shape}, the header says {(data.Rows, data.Columns)}")
        frame = _frame(data, item.index)
        turn, padding = _turn(frame), _padding(stored, frame)
        values, holes = fill_holes(apply_modality_lut(stored, frame))
        if holes is not None:
            padding = holes if padding is None else padding | holes
        return Pixels(
            turn(values),
            None if padding is None else turn(padding),
            frame.PhotometricInterpretation == "MONOCHROME1",
            (lambda: turn(_own_window(values, frame))) if _has_window(frame) else None,
        )


def _decode(data: pydicom.Dataset, item: Slice) -> NDArray[Any]:
    """The stored values of a frame, by the first decoder that is installed for them."""
    syntax = data.file_meta.TransferSyntaxUID
    try:
        # One frame is read of a file; all of one that is deflated, or older than file headers.
        source: Any = item.path if is_dicom(item.path) and not syntax.is_deflated else data
        return pixel_array(source, index=item.index, raw=True)
    except RuntimeError:  # no decoder, or damaged data
        remedy = "; try `pip install pylibjpeg-libjpeg`, which is under the GPL" if syntax in RARE_JPEG else ""
        raise RefusedError(f"{syntax.name} that no installed decoder reads{remedy}") from None


@contextmanager
def _short_errors(what: str) -> Iterator[None]:
    """One line, whatever a damaged file makes the parser or a decoder raise."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__})") from None  # whose message may have values of the file


def _open(path: Path) -> pydicom.FileDataset:
    """The header of a file; large elements are read when they are asked for."""
    data = pydicom.dcmread(path, defer_size=DEFERRED_BYTES, force=True)
    if not is_dicom(path) and "SOPClassUID" not in data and "Rows" not in data:
        raise RefusedError("not a DICOM file")
    if "TransferSyntaxUID" not in data.file_meta:  # files from before there were file headers
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return data


def _count_frames(data: pydicom.Dataset) -> int:
    """How many images a file has. ValueError: none that can be read."""
    modality = str(data.get("Modality", ""))
    if modality in NO_IMAGES:
        raise RefusedError(f"{NO_IMAGES[modality]} ({modality}), not an image")
    if not any(name in data for name in PIXEL_DATA):
        raise RefusedError("no pixel data")
    if missing := [name for name in ("Rows", "Columns", "BitsAllocated") if not data.get(name)]:
        raise RefusedError(f"no {missing[0]} in the header")
    kind = data.get("PhotometricInterpretation", "")
    if data.get("SamplesPerPixel", 1) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise RefusedError(f"a colour image ({kind or 'unknown'}), only grey ones are read: export it as PNG")
    frames = int(data.get("NumberOfFrames") or 1)
    if data.Rows * data.Columns > MAX_PIXELS or not 0 < frames <= MAX_FRAMES:
        raise RefusedError(f"{frames:,} frames of {data.Columns:,} x {data.Rows:,}, which is beyond the limit")
    return frames


def _frame(data: pydicom.Dataset, index: int) -> pydicom.Dataset:
    """The header as it is for one frame."""
    shared, each = (data.get(f"{kind}FunctionalGroupsSequence") for kind in ("Shared", "PerFrame"))
    if not shared and not each:
        return data
    frame = copy(data)
    for groups in (*(shared or ())[:1], *(each or ())[index : index + 1]):
        for name in FRAME_GROUPS:
            for values in groups.get(name) or ():
                frame.update(values)
    return frame


def _slice(data: pydicom.Dataset, path: Path, index: int) -> Slice:
    frame = _frame(data, index)
    turn, ways = _turn(frame), _directions(frame)
    rows, columns = int(frame.Rows), int(frame.Columns)
    spacing = _numbers(frame.get("PixelSpacing") or frame.get("ImagerPixelSpacing"), 2)
    if spacing and min(spacing) <= 0:
        spacing = ()
    plane = position = None
    if ways:
        normal = np.cross(ways[0], ways[1])
        plane, corner = plane_of(normal), _numbers(frame.get("ImagePositionPatient"), 3)
        if corner:
            position = float(np.array(corner) @ normal * np.sign(normal[np.abs(normal).argmax()]))

    def as_viewed(pair: tuple[Any, Any]) -> tuple[Any, Any]:
        return (pair[1], pair[0]) if turn.transposed else pair

    return Slice(
        path=path,
        index=index,
        size=as_viewed((rows, columns)),
        spacing=as_viewed((spacing[0], spacing[1])) if spacing else None,
        plane=plane,
        position=position,
        orientation=tuple(round(float(number), 3) + 0.0 for way in ways for number in way),
        bits=int(frame.get("BitsStored") or frame.BitsAllocated),
        modality=str(frame.get("Modality", "")),
        localizer=bool({"LOCALIZER", "SCOUT"} & {word.upper() for word in _words(frame.get("ImageType"))}),
        burned_in=str(frame.get("BurnedInAnnotation", "")).upper() == "YES",
        patient=str(frame.get("PatientID") or ""),
        study=str(frame.get("StudyInstanceUID") or ""),
        series=str(frame.get("SeriesInstanceUID") or ""),
        fields={name: _caption_field(frame, name) for name in CAPTION_FIELDS},
    )


def _directions(frame: pydicom.Dataset) -> list[NDArray[np.float64]]:
    """Where columns and rows follow each other, as unit vectors; none where the file does not say."""
    numbers = _numbers(frame.get("ImageOrientationPatient"), 6)
    ways = [np.array(numbers[:3]), np.array(numbers[3:])] if numbers else []
    lengths = [float(np.linalg.norm(way)) for way in ways]
    return [way / length for way, length in zip(ways, lengths, strict=True)] if all(lengths) else []


def _turn(frame: pydicom.Dataset) -> Turn:
    ways = _directions(frame)
    return turn_for_viewing(*ways) if ways else Turn()


def _padding(stored: NDArray[Any], frame: pydicom.Dataset) -> NDArray[np.bool_] | None:
    """Pixels that stand for nothing: of one value, or of a range of values."""
    numbers = [frame.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    value, limit = (number if isinstance(number, int | float) else None for number in numbers)
    if value is None:
        return None
    other = value if limit is None else limit
    if stored.dtype.kind == "i":  # unsigned fields of signed pixels
        value, other = (number - 2**16 if number >= 2**15 else number for number in (value, other))
    return (stored >= min(value, other)) & (stored <= max(value, other))


def _has_window(frame: pydicom.Dataset) -> bool:
    return bool(frame.get("VOILUTSequence")) or None not in (frame.get("WindowCenter"), frame.get("WindowWidth"))


def _own_window(values: Values, frame: pydicom.Dataset) -> Values:
    """Values in [0, 1] by the first window or table of the file (PS3.3 C.11.2). ValueError: it is damaged."""
    with _short_errors("a window that cannot be read"):
        if tables := frame.get("VOILUTSequence"):
            return _look_up(values, tables[0], frame)
        if table := frame.get("ModalityLUTSequence"):
            low, high = 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
        else:
            bits, slope = int(frame.BitsStored), float(frame.get("RescaleSlope", 1))
            low, high = (0.0, 2.0**bits - 1) if frame.PixelRepresentation == 0 else _signed(bits)
            low, high = (limit * slope + float(frame.get("RescaleIntercept", 0)) for limit in (low, high))
        if low == high:
            raise RefusedError("a window over one value")
        return ((apply_voi_lut(values, frame) - low) / (high - low)).astype(np.float32)


def _look_up(values: Values, item: pydicom.Dataset, frame: pydicom.Dataset) -> Values:
    """Values by a table; those before and after it are as its ends."""
    count, first, bits = item.LUTDescriptor
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * (count or 2**16) else "u1")
    table = np.asarray(data, np.float32)[: count or 2**16]
    if frame.PixelRepresentation == 1 and first >= 2**15:  # an unsigned field of signed pixels
        first -= 2**16
    return (table / np.float32(2.0**bits - 1))[np.clip(values - first, 0, len(table) - 1).astype(int)]


def _signed(bits: int) -> tuple[float, float]:
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    """So many finite numbers; none where the field holds anything else."""
    try:
        numbers = tuple(float(number) for number in value or ())
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else ()


def _words(value: Any) -> list[str]:
    """The values of a field that has none, one or several."""
    several = isinstance(value, MultiValue | list)
    return [" ".join(str(word).split()) for word in (value if several else [value]) if word not in (None, "")]


def _caption_field(frame: pydicom.Dataset, name: str) -> str:
    """A field as words: ages and sexes are written out."""
    text = " ".join(_words(frame.get(name)))
    if name == "PatientSex":
        return {"M": "male", "F": "female", "O": "other"}.get(text, "")
    if name == "PatientAge" and (age := re.fullmatch(r"0*(\d+)([DWMY])", text)):
        unit = {"D": "day", "W": "week", "M": "month", "Y": "year"}[age[2]]
        return f"{age[1]} {unit}{'s' * (age[1] != '1')}"
    return text
