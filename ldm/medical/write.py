"""Write axial slices of 16 bits, as they are viewed: as DICOM files with new UIDs, or as a NIfTI volume."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

SYNTHETIC_DATA = 0x0008001C
Slices = Sequence[NDArray[np.uint16]]  # (height, width) each, from the feet to the head


def write_dicom(
    folder: Path, slices: Slices, *, spacing: float, positions: Sequence[float], patient: str, study: str, bits: int
) -> list[Path]:
    """One MR series of a study, a file for each slice; nothing but `patient` is in them that could name anybody.

    `spacing` and `positions` are in mm; slices of equal `study` are of one study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study_uid, series_uid, paths = generate_uid(entropy_srcs=[study]), generate_uid(), []
    for number, (values, position) in enumerate(zip(slices, positions, strict=True), 1):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.add_new(SYNTHETIC_DATA, "CS", "YES")
        data.Modality, data.ImageType = "MR", ["DERIVED", "SECONDARY"]
        data.PatientID = data.PatientName = patient
        data.StudyInstanceUID, data.SeriesInstanceUID, data.InstanceNumber = study_uid, series_uid, number
        data.BodyPartExamined, data.BurnedInAnnotation = "HEAD", "NO"
        data.PixelSpacing = [spacing, spacing]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        corner = [-(side - 1) / 2 * spacing for side in values.shape[::-1]]
        data.ImagePositionPatient = [*corner, position]
        data.Rows, data.Columns = values.shape
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
        data.PixelData = values.astype("<u2").tobytes()
        paths.append(folder / f"{number:04}.dcm")
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_nifti(path: Path, slices: Slices, *, spacing: float, distance: float) -> None:
    """A volume in RAS whose middle is the origin; `spacing` within slices and `distance` of two of them are in mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = np.stack([values.T[::-1, ::-1] for values in slices], axis=-1)
    affine = np.diag([spacing, spacing, distance, 1.0])
    affine[:3, 3] = -(np.array(volume.shape) - 1) / 2 * affine.diagonal()[:3]
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
