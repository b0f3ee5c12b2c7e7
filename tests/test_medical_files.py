"""Medical files that others made: each is read right, or refused with one line."""

import random
import resource
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from helpers import write_dicom
from nibabel.testing import data_path
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from ldm.medical import dicom, nifti
from ldm.medical.slices import Plane, Slice

PYDICOM = Path(pydicom.__file__).parent / "data"
NIBABEL = Path(data_path)
READ = {  # height and width of the first frame, as viewed
    "693_J2KI": (512, 512),
    "CT_small": (128, 128),
    "J2K_pixelrep_mismatch": (512, 512),
    "JPEG2000": (1024, 256),
    "JPEGLSNearLossless_08": (45, 10),
    "JPEGLSNearLossless_16": (50, 10),
    "MR_small": (64, 64),
    "MR_small_RLE": (64, 64),
    "MR_small_bigendian": (64, 64),
    "MR_small_expb": (64, 64),
    "MR_small_implicit": (64, 64),
    "MR_small_jp2klossless": (64, 64),
    "MR_small_jpeg_ls_lossless": (64, 64),
    "MR_small_padded": (64, 64),
    "examples_overlay": (300, 484),
    "image_dfl": (512, 512),
}
NO_PIXELS = {"chrJapMulti", "chrJapMultiExplicitIR6", "chrKoreanMulti", "chrSQEncoding", "chrSQEncoding1"}
COLOUR = "a colour image"
REFUSED = {  # by the beginning of the name, what the line says
    "ExplVR_BigEnd": COLOUR,
    "ExplVR_BigEndNoMeta": "a treatment plan",
    "ExplVR_LitEndNoMeta": "a treatment plan",
    "GDCMJ2K_TextGBR": COLOUR,
    "JPEG-lossy": "JPEG Extended.*pip install pylibjpeg-libjpeg",
    "JPGExtended": "JPEG Extended.*pip install pylibjpeg-libjpeg",
    "JPEG2000-embedded-sequence-delimiter": "no installed decoder reads",
    "MR_truncated": "pixels that cannot be decoded",
    "SC_": COLOUR,
    "UN_sequence": "no pixel data",
    "badVR": "a radiation dose",
    "empty_charset_LEI": "no pixel data",
    "examples_": COLOUR,
    "liver_": "a segmentation",
    "meta_missing_tsyntax": "no Rows",
    "nested_priv_SQ": "no Rows",
    "no_meta": "not a DICOM file",
    "no_meta_group_length": "no pixel data",
    "priv_SQ": "no pixel data",
    "reportsi": "a report",
    "rtdose": "a radiation dose",
    "rtplan": "a treatment plan",
    "rtstruct": "contours",
    "test-SR": "a report",
    "waveform_ecg": "a waveform",
    "DICOMDIR": "no pixel data",
}


def read(path: Path) -> list[Slice]:
    """The slices of a DICOM file, whose first is decoded."""
    slices = dicom.read_slices(path)
    dicom.read_pixels(slices[0])
    return slices


def test_there_is_a_row_for_each_of_the_files_of_pydicom() -> None:
    files = sorted(PYDICOM.rglob("*.dcm"))
    assert len(files) == 104
    for path in files:
        if path.stem in READ:
            assert read(path)[0].size == READ[path.stem], path.name
            continue
        if path.parent.name == "charset_files" and path.stem not in NO_PIXELS:
            assert read(path)[0].size == (32, 32), path.name
            continue
        if path.stem in NO_PIXELS or path.parent.name == "palettes":
            reason = "no pixel data"
        else:
            reason = REFUSED[max((start for start in REFUSED if path.stem.startswith(start)), key=len)]
        with pytest.raises(ValueError, match=reason) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", READ)
def test_values_are_those_of_pydicom(name: str) -> None:
    path = PYDICOM / f"test_files/{name}.dcm"
    data = pydicom.dcmread(path)
    item = dicom.read_slices(path)[0]
    pixels = dicom.read_pixels(item)
    expected = apply_modality_lut(data.pixel_array, data).astype(np.float32)
    orientation = data.get("ImageOrientationPatient")
    if orientation is None or list(orientation) == [1, 0, 0, 0, 1, 0]:
        assert np.array_equal(pixels.values, expected)
    else:
        turned = [np.rot90(way, turns) for way in (expected, expected.T) for turns in range(4)]
        assert any(np.array_equal(pixels.values, one) for one in turned)
    if "WindowWidth" in data:
        assert pixels.own_window
        shown, voi = pixels.own_window(), apply_voi_lut(apply_modality_lut(data.pixel_array, data), data)
        assert shown.min() >= 0 and shown.max() <= 1
        np.testing.assert_allclose(_stretched(np.sort(shown.ravel())), _stretched(np.sort(voi.ravel())), atol=1e-6)


def _stretched(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / np.ptp(values)


def test_values_do_not_depend_on_how_a_file_is_encoded() -> None:
    first = dicom.read_pixels(dicom.read_slices(PYDICOM / "test_files/MR_small.dcm")[0]).values
    for name in [name for name in READ if name.startswith("MR_small_")]:
        values = dicom.read_pixels(dicom.read_slices(PYDICOM / f"test_files/{name}.dcm")[0]).values
        assert np.array_equal(values, first), name


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "0.dcm": (256, 256),
        "1.dcm": (256, 256),
        "decimal_rescale.dcm": (96, 128),
        "slicethickness_empty_string.dcm": (384, 384),
        "csa_slice_norm.dcm": "no pixel data",
    }.items(),
)
def test_dicom_files_of_nibabel(name: str, expected: tuple[int, int] | str) -> None:
    path = NIBABEL.parents[1] / f"nicom/tests/data/{name}"
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(path)
    else:
        assert read(path)[0].size == expected


NIFTI = {
    "anatomical.nii": 25,
    "example4d.nii.gz": 24,
    "example_nifti2.nii.gz": 12,
    "functional.nii": 3,
    "reoriented_anat_moved.nii": 19,
    "resampled_anat_moved.nii": 3,
    "standard.nii.gz": 7,
    "row_major.dconn.nii": "not a NIfTI volume",
}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", NIFTI)
def test_nifti_files_of_nibabel(name: str, plane: Plane) -> None:
    """Values are `get_fdata` in RAS, each slice with the head or the front up, and the patient's left at the right."""
    path, expected = NIBABEL / name, NIFTI[name]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            nifti.read_slices(path, plane)
        return
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    volume = volume.reshape(*volume.shape[:3], -1)[..., 0].astype(np.float32)
    volume = np.nan_to_num(volume, nan=float(np.nanmin(volume)))  # as black as the background
    slices = nifti.read_slices(path, plane)
    assert plane != "axial" or len(slices) == expected
    for item in slices:
        right, front, up = (slice(None),) * 3
        if plane == "axial":
            viewed = volume[right, front, item.index][::-1, ::-1].T
        elif plane == "coronal":
            viewed = volume[right, item.index, up][::-1, ::-1].T
        else:
            viewed = volume[item.index, front, up][::-1, ::-1].T
        assert np.array_equal(nifti.read_pixels(item).values, viewed)


@pytest.mark.parametrize("way", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("flips", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_slice_is_viewed_alike_however_it_was_stored(
    tmp_path: Path, way: Plane, flips: tuple[int, int], swapped: bool
) -> None:
    """The image shows its top left corner, whose place in the patient is the same in all of them."""
    directions = {"axial": ("L", "P"), "coronal": ("L", "F"), "sagittal": ("P", "F")}[way]
    axes = {"L": (1, 0, 0), "P": (0, 1, 0), "F": (0, 0, -1)}
    image = np.arange(12).reshape(3, 4)
    row, column = np.array(axes[directions[0]]), np.array(axes[directions[1]])
    stored = image[:: flips[1], :: flips[0]]
    along = row * flips[0], column * flips[1]
    if swapped:
        stored, along = stored.T, along[::-1]
    orientation = [*map(float, along[0]), *map(float, along[1])]
    spacing = [2.0, 3.0] if swapped else [3.0, 2.0]
    path = write_dicom(tmp_path / "a.dcm", stored, ImageOrientationPatient=orientation, PixelSpacing=spacing)
    (item,) = dicom.read_slices(path)
    assert (item.plane, item.size, item.spacing) == (way, (3, 4), (3.0, 2.0))
    assert np.array_equal(dicom.read_pixels(item).values, image)


def test_each_frame_has_its_own_values_position_and_spacing(tmp_path: Path) -> None:
    frames = np.stack([np.full((4, 5), 10), np.full((4, 5), 20)])

    def group(position: float, slope: float) -> pydicom.Dataset:
        item, place, scale = (pydicom.Dataset() for _ in range(3))
        place.ImagePositionPatient = [0, 0, position]
        scale.RescaleSlope, scale.RescaleIntercept = slope, -1
        item.PlanePositionSequence, item.PixelValueTransformationSequence = [place], [scale]
        return item

    shared, way, measures = (pydicom.Dataset() for _ in range(3))
    way.ImageOrientationPatient, measures.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.5, 0.25]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [way], [measures]
    path = write_dicom(
        tmp_path / "a.dcm",
        frames,
        NumberOfFrames=2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[group(7, 2), group(3, 0.5)],
    )
    slices = dicom.read_slices(path)
    assert [item.position for item in slices] == [7, 3]
    assert [item.spacing for item in slices] == [(0.5, 0.25)] * 2
    assert [dicom.read_pixels(item).values.max() for item in slices] == [19, 9]


def test_padding_is_left_out_and_monochrome1_is_known(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 4, 5]])
    path = write_dicom(
        tmp_path / "a.dcm",
        values,
        PixelPaddingValue=0,
        PixelPaddingRangeLimit=1,
        PhotometricInterpretation="MONOCHROME1",
    )
    pixels = dicom.read_pixels(dicom.read_slices(path)[0])
    assert pixels.inverted and sorted(pixels.unpadded()) == [2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore")
def test_changed_files_crash_nothing_and_use_little_memory(tmp_path: Path) -> None:
    names = ["693_J2KI", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "JPEGLSNearLossless_16"]
    names += ["CT_small", "JPEG2000", "MR_small_bigendian", "MR_small_implicit", "image_dfl", "liver_expb_1frame"]
    files = [bytearray((PYDICOM / f"test_files/{name}.dcm").read_bytes()) for name in names]
    draw, path = random.Random(0), tmp_path / "changed.dcm"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {True: 0, False: 0}
    for number in range(2000):
        changed = files[number % len(files)].copy()
        for _ in range(draw.choice([1, 3, 20])):
            changed[draw.randrange(min(len(changed), draw.choice([2000, len(changed)])))] = draw.randrange(256)
        path.write_bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.2 else changed)
        try:
            outcomes[bool(read(path))] += 1
        except ValueError as error:
            outcomes[False] += 1
            assert "\n" not in str(error)
    assert min(outcomes.values()) > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
