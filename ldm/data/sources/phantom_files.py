"""Write drawn heads as the files that scanners make: a folder of DICOM series or of NIfTI volumes, with a table."""

import csv
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from pydantic import Field
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.data.sources import phantom
from ldm.data.sources.phantom_art import FIELD, LEVELS


class ExportPhantomConfig(ScriptConfig):
    """Settings of export_phantom."""

    out: Positional[Path] = Path()
    """folder to write; it must not exist"""
    format: Literal["dicom", "nifti"] = "dicom"
    """a DICOM series or a NIfTI volume for each patient and contrast"""
    patients: int = Field(20, ge=1, le=phantom.NUM_PATIENTS)
    """how many of the training split"""
    size: int = Field(64, ge=8)
    """width and height of a slice, in pixels"""


def export_phantom(config: ExportPhantomConfig) -> None:
    """Write the slices, and their captions in metadata.csv. ValueError: the folder exists, or the extra is missing."""
    if config.out.exists():
        raise ValueError(f"{config.out} exists already: name another folder")
    try:
        from ldm.medical.write import write_dicom, write_nifti
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: run `pip install 'ldm[medical]'`") from None
    spacing, rows = FIELD / config.size, []
    positions = list(LEVELS.values())
    distance = positions[1] - positions[0]
    by_patient = groupby(phantom.slices("train"), key=lambda item: item[0])
    for patient, items in islice(by_patient, config.patients):
        for contrast, group in groupby([scene for _, scene in items], key=lambda scene: scene.contrast):
            scenes = list(group)
            drawn = [phantom.draw(scene, patient, config.size)[0] for scene in scenes]
            name = f"sub-{patient:04}"
            if config.format == "nifti":
                if len(scenes) < len(LEVELS):  # a slice that belongs to the held-out scenes is missing
                    continue
                path = config.out / f"{name}_{contrast}.nii.gz"
                write_nifti(path, drawn, spacing=spacing, distance=distance)
                paths, indices = [path] * len(scenes), list(range(len(scenes)))
            else:
                paths = write_dicom(
                    config.out / name / contrast,
                    drawn,
                    spacing=spacing,
                    positions=[LEVELS[scene.level] for scene in scenes],
                    patient=name,
                    study=name,
                    bits=12,
                )
                indices = [0] * len(scenes)
            rows += [
                (path.relative_to(config.out).as_posix(), index, phantom.captions(scene)[0])
                for path, index, scene in zip(paths, indices, scenes, strict=True)
            ]
    with (config.out / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "slice", "caption"), *rows])
    print(f"{len(rows):,} slices of {config.patients:,} patients: {config.out}")
