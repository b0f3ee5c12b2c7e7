"""Folders of medical files: what is detected, windows, splits by patient, and that no patient is named."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_latents
import check_data
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from helpers import train, write_dicom
from PIL import Image

from ldm.data import DataConfig, ImageTextDataset, open_dataset, open_splits
from ldm.data.batch_sampler import SampleKey
from ldm.data.latents import LatentDataset
from ldm.data.transforms import View
from ldm.medical.slices import Pixels
from ldm.medical.windows import parse_windows
from ldm.pipeline.load import load_vae

AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
RAMP = np.arange(64 * 64).reshape(64, 64)  # all values of 12 bits


def write_series(folder: Path, patient: str, *, count: int = 3, size: int = 16, **fields: Any) -> None:
    """A series of one patient, whose file names are in no order."""
    uid, folder = f"1.2.{zlib.crc32(patient.encode())}", folder / f"series-{patient}"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 4096, (size, size))
        common = {
            **{"PatientID": patient, "SeriesInstanceUID": uid, "StudyInstanceUID": f"{uid}.1", "PixelSpacing": [1, 1]},
            **{"ImageOrientationPatient": AXIAL, "ImagePositionPatient": [0, 0, 5 * index]},
            **{"PatientSex": "F", "PatientAge": "061Y", "InstanceNumber": count - index},
        }
        write_dicom(folder / f"{(7 * index) % 10}.dcm", values, **{**common, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    for number in range(4):
        write_series(root, f"P{number}")
    return root


def config(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"source": str(folder), "channels": 1, "resolution": 16, **values})


def pixels(dataset: ImageTextDataset, index: int = 0) -> torch.Tensor:
    return dataset[SampleKey(index, 0, 0)]["image"]


def test_what_is_detected_is_said(folder: Path) -> None:
    write_dicom(folder / "scout.dcm", RAMP, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(folder, "P9", BurnedInAnnotation="YES")
    (folder / "notes.doc").write_text("")
    (folder / "report.dcm").write_text("")
    text = open_dataset(config(folder), "train", seed=0).describe()
    for part in (
        "medical: 5 series of 5 patients, 15 slices; MR: 15; axial: 15; 16 x 16 pixels: 15; spacing 1 to 1 mm",
        "; 12 bits: 15, in ",
        "window percentile; 12 in the train split",
        "1 localizers left out",
        "1 files refused (check_data.py lists them): 1 x not a DICOM file",
        "1 other files skipped",
        "held out: 1 of 5 patients",
        "3 slices say that text is burned into them",
    ):
        assert part in text


def test_slices_are_in_the_order_of_their_positions(folder: Path) -> None:
    train_set, _ = open_splits(config(folder), seed=0)
    slices = train_set.source.slices  # type: ignore[attr-defined]
    assert [item.position for item in slices] == [0, 5, 10] * 3
    assert train_set.source.names[:2] == [f"{train_set.source.names[0][:-1]}{number}" for number in (1, 2)]


def test_a_patient_is_in_one_split_and_all_slices_are_somewhere(folder: Path) -> None:
    train_set, held_out = open_splits(config(folder), seed=0)
    patients = [set(one.source.patients) for one in (train_set, held_out)]
    assert not patients[0] & patients[1] and patients[0] | patients[1] == {f"P{number}" for number in range(4)}
    assert len(train_set) + len(held_out) == 12


def test_a_table_names_patients_and_captions(tmp_path: Path) -> None:
    for number in range(6):
        Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,X{number // 2},scan {number}" for number in range(6)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,patient,caption", *rows]))
    for split in open_splits(config(tmp_path), seed=0):
        assert len(split) in (2, 4) and len(set(split.source.patients)) == len(split) / 2
        for index, patient in enumerate(split.source.patients):
            assert split.caption(SampleKey(index, 0, 0)) in (
                f"scan {2 * int(patient[1])}",
                f"scan {2 * int(patient[1]) + 1}",
            )


def test_text_files_beside_images_are_captions(tmp_path: Path) -> None:
    for name in "abc":
        Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"scan {name}")
    captions = {text for split in open_splits(config(tmp_path), seed=0) for text in split.captions}
    assert captions == {"scan a", "scan b", "scan c"}


def test_a_table_names_the_size_of_pixels_and_one_slice_of_a_volume(folder: Path) -> None:
    """A mixed folder; whole numbers as pandas writes them; an empty cell names nothing."""
    Image.fromarray(RAMP.astype(np.uint16)).save(folder / "x.png")
    volume = np.random.default_rng(0).integers(500, 1000, (16, 16, 4)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 3, 1])), folder / "v.nii.gz")
    (folder / "metadata.csv").write_text(
        "file_name,slice,spacing,text\nx.png,,0.5,a ramp\nv.nii.gz,2.0,,the third slice\n"
    )
    found = {}
    for split in open_splits(config(folder, spacing=1.0), seed=0):
        source: Any = split.source
        found |= {(item.path.name, item.index): item for item in source.slices}
    assert found["x.png", 0].spacing == (0.5, 0.5) and found["x.png", 0].captions == ("a ramp",)
    assert [found["v.nii.gz", index].captions for index in range(4)] == [(), (), ("the third slice",), ()]
    (folder / "metadata.csv").write_text("study,text\n,healthy\n")
    with pytest.raises(ValueError, match=r"1 rows name a study that is not there \(rows 1\)"):
        open_dataset(config(folder, spacing=1.0), "train", seed=0)


@pytest.mark.parametrize("key", ["series", "study", "patient"])
def test_a_table_gives_captions_by_an_id(folder: Path, key: str) -> None:
    of_p0 = next(
        item for one in open_splits(config(folder), seed=0) for item in one.source.slices if item.patient == "P0"
    )  # type: ignore[attr-defined]
    value = getattr(of_p0, key).split(" ")[0]
    (folder / "metadata.csv").write_text(f"{key},text\n{value},a healthy brain\n")
    source = next(one.source for one in open_splits(config(folder), seed=0) if "P0" in one.source.patients)
    captions = {patient: list(texts) for patient, texts in zip(source.patients, source.captions, strict=True)}
    assert captions.pop("P0") == ["a healthy brain"] and not any(captions.values())


def test_a_template_makes_captions_of_allowed_fields(folder: Path) -> None:
    template = "{Modality} of the head, {plane}, {PatientSex}, {PatientAge}"
    data = open_dataset(config(folder, caption_template=template), "train", seed=0)
    assert set(data.captions) == {"MR of the head, axial, female, 61 years"}
    template = "{Modality} of the head, {ViewPosition}, {PatientSex}"
    assert set(open_dataset(config(folder, caption_template=template), "train", seed=0).captions) == {
        "MR of the head, female"
    }
    with pytest.raises(ValueError, match="write fields as {Modality}, without a format"):
        open_dataset(config(folder, caption_template="{Modality:{PatientName}}"), "train", seed=0)
    with pytest.raises(ValueError, match="data.caption_template: 'PatientName' is no field that it can have: Modality"):
        open_dataset(config(folder, caption_template="{PatientName}"), "train", seed=0)


def test_a_ramp_of_12_bits_keeps_its_values(tmp_path: Path) -> None:
    for patient in "ab":
        write_dicom(tmp_path / f"{patient}.dcm", RAMP, PatientID=patient)
    shown = pixels(open_dataset(config(tmp_path, resolution=64, window="2048,4096"), "train", seed=0))
    expected = torch.from_numpy(RAMP / 4096 * 2 - 1).float()
    torch.testing.assert_close(shown[0], expected, atol=1e-6, rtol=0)
    assert len(shown.unique()) == 4096


def test_names_of_windows_are_centres_and_widths_in_hounsfield_units(tmp_path: Path) -> None:
    values = np.array([[0, 40, 80, 120], [1064, 1024, 984, 2000]])
    for patient in "ab":
        write_dicom(
            tmp_path / f"{patient}.dcm",
            values,
            PatientID=patient,
            Modality="CT",
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )
    data = open_dataset(config(tmp_path, channels=3, window="brain+lung+0,200"), "train", seed=0)
    image = data.source.read(0, View((2, 4)), channels=3, side=4).pixels / 2 + 0.5
    units = torch.from_numpy(values - 1024.0)
    for channel, (center, width) in zip(image, [(40, 80), (-600, 1500), (0, 200)], strict=True):
        torch.testing.assert_close(channel, ((units - center) / width + 0.5).clamp(0, 1).float(), atol=1e-6, rtol=0)


def test_inversion_is_last_and_padding_is_black() -> None:
    values = np.array([[0.0, 10, 20]], np.float32)
    padding = np.array([[True, False, False]])
    (window,) = parse_windows("10,20")
    shown = window.apply(Pixels(values, padding, inverted=True), lambda: (0, 0))
    assert shown.tolist() == [[0, 0.5, 0]]


def test_percentiles_are_of_a_series_without_padding(tmp_path: Path) -> None:
    values = np.full((16, 16), 4000)
    values[:, 8:] = np.arange(128).reshape(16, 8) + 100
    for patient in "ab":
        write_dicom(tmp_path / f"{patient}.dcm", values, PatientID=patient, PixelPaddingValue=4000)
    shown = pixels(open_dataset(config(tmp_path), "train", seed=0))[0]
    assert (shown[:, :8] == -1).all() and shown[:, 8:].unique().numel() > 120 and shown[-1, -1] == 1


def test_pixels_are_of_one_size_in_mm_with_spacing(tmp_path: Path) -> None:
    """A square of 8 mm is as large in images of 0.5 and 1 mm, and what is beyond an image is black."""
    for patient, spacing in (("a", 0.5), ("b", 1.0)):
        side = round(8 / spacing)
        values = np.zeros((2 * side, 2 * side))
        values[side // 2 : -side // 2, side // 2 : -side // 2] = 1000
        write_dicom(tmp_path / f"{patient}.dcm", values, PatientID=patient, PixelSpacing=[spacing, spacing])
    for split in open_splits(config(tmp_path, resolution=32, spacing=1.0, window="500,1000"), seed=0):
        shown = pixels(split)[0] / 2 + 0.5
        assert shown[12:20, 12:20].min() > 0.85 and shown.sum().item() == pytest.approx(64, abs=2)


def test_slices_of_volumes_are_of_the_plane_that_is_named(tmp_path: Path) -> None:
    """With the patients of file names as BIDS has them, and without empty slices."""
    volume = np.zeros((6, 8, 10), np.int16)
    volume[1:5, 2:7, 3:9] = np.random.default_rng(0).integers(500, 1000, (4, 5, 6))
    for subject in ("01", "02"):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"sub-{subject}_T1w.nii.gz")
    for plane, count in (("axial", 6), ("coronal", 5), ("sagittal", 4)):
        data = open_dataset(config(tmp_path, plane=plane), "train", seed=0)
        assert len(data) == count and data.source.patients[0] in ("sub-01", "sub-02")


def test_a_table_of_values_is_the_window_of_a_file(tmp_path: Path) -> None:
    """With more entries than 8 bits count, and values before and after it; a damaged one is refused in one line."""
    item = pydicom.Dataset()
    item.add_new(0x00283002, "US", [1000, 100, 8])
    item.add_new(0x00283006, "OW", (np.arange(1000) // 4).astype("<u2").tobytes())
    for patient in "ab":
        values = np.array([[0, 100, 500], [1099, 2000, 104]])
        write_dicom(tmp_path / f"{patient}.dcm", values, PatientID=patient, VOILUTSequence=[item])
    source = open_dataset(config(tmp_path, window="file"), "train", seed=0).source
    shown = source.read(0, View((2, 3)), channels=1, side=3).pixels[0] / 2 + 0.5
    torch.testing.assert_close(shown, torch.tensor([[0, 0, 100], [249, 249, 1]]) / 255, atol=1e-6, rtol=0)
    write_dicom(tmp_path / "a.dcm", values, PatientID="a", VOILUTSequence=[pydicom.Dataset()])
    write_dicom(tmp_path / "b.dcm", values, PatientID="b", VOILUTSequence=[pydicom.Dataset()])
    with pytest.raises(ValueError, match="a window that cannot be read"):
        open_dataset(config(tmp_path, window="file"), "train", seed=0).source.read(0, View((2, 3)), channels=1, side=3)


def test_the_split_is_the_same_wherever_the_folder_is(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for number in range(30):
            Image.fromarray((RAMP + number).astype(np.uint16)).save(tmp_path / place / f"{number}.png")
    names = [open_dataset(config(tmp_path / place), "test", seed=0).source.names for place in ("here", "there")]
    assert names[0] == names[1]


# Nobody is named.

PLANTED = ("Quorra", "PLANT7731", "19470203", "ACC99417", "Hospital Zyx", "Dr. Wexley", "1.2.3.4.777")


def test_what_is_written_names_no_patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans, runs = tmp_path / "scans", tmp_path / "runs"
    for number in range(4):
        fields = {
            **{"PatientName": f"{PLANTED[0]}^{number}", "PatientBirthDate": PLANTED[2], "AccessionNumber": PLANTED[3]},
            **{"InstitutionName": PLANTED[4], "ReferringPhysicianName": PLANTED[5], "StudyDescription": PLANTED[0]},
            **{"SeriesInstanceUID": f"{PLANTED[6]}.{number}", "StudyInstanceUID": f"{PLANTED[6]}.9{number}"},
        }
        write_series(scans, f"{PLANTED[1]}-{number}", **fields)
    (scans / f"{PLANTED[1]}.nii.gz").write_bytes(b"")
    (scans / f"MR.{PLANTED[1]}").write_bytes(b"")
    (scans / f"{PLANTED[1]}.dcm").write_bytes(bytes(128) + b"DICM" + b"damaged")
    source = ["--data.source", str(scans), "--data.caption-template", "{Modality} of a head"]
    train("clip", runs / "clip", *source)
    train("vae", runs / "vae", *source, "--data.channels", "1", "--vae.image-channels", "1")
    data = [*source, "--data.channels", "1", "--data.resolution", "16"]
    cache_latents.main(["--out", str(runs / "latents"), "--images-per-file", "100", *data])
    train("ldm", runs / "ldm", *data, "--cached-latents", str(runs / "latents"), "--sample-prompts", "MR of a head")
    train("ldm", runs / "ldm2", *data, "--sample-prompts", "MR of a head")
    written = [path for path in runs.rglob("*") if path.is_file()]
    assert len(written) > 20
    for name in PLANTED:
        for path in written:
            assert name.encode() not in path.read_bytes() and name not in str(path), path
    shown = capsys.readouterr()
    assert not any(name in shown.out + shown.err for name in PLANTED)
    # Values are floats all the way: the cache holds what the VAE makes of the image, not of one of 8 bits.
    vae = load_vae(runs / "vae/model")
    held_out = open_dataset(config(scans), "test", seed=0)
    cached = LatentDataset(runs / "latents", "test", seed=0)[SampleKey(0, 0, 0)]["mean"]
    with torch.no_grad():
        torch.testing.assert_close(cached, vae.encode(pixels(held_out)[None]).mean[0], atol=2e-3, rtol=2e-3)


# Bad input.


def broken(name: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Register a way to break a folder under its name."""

    def register(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
        BROKEN[name] = change
        return change

    return register


BROKEN: dict[str, Callable[[Path], Any]] = {}


@broken("pixels are of several sizes, 0.5 to 1 mm: pass --data.spacing 0.75 to resample them all")
def mixed_spacing(folder: Path) -> None:
    write_series(folder, "P8", PixelSpacing=[0.5, 0.5])


@broken("1 series have slices of several patients, such as series [0-9a-f]{12} of 2: correct PatientID")
def two_patients_in_a_series(folder: Path) -> None:
    write_series(folder, "P8", SeriesInstanceUID="1.9")
    write_series(folder, "P9", SeriesInstanceUID="1.9")


@broken("1 patients are in both splits of this folder: move all files of a patient to one")
def a_patient_in_both_splits(folder: Path) -> None:
    write_series(folder / "train", "P8")
    write_series(folder / "test", "P8")


@broken(r"metadata.csv: 2 rows name a series that is not there \(rows 1, 2\): add its files, or remove the rows")
def a_table_with_unknown_series(folder: Path) -> None:
    (folder / "metadata.csv").write_text("series,caption\n1.1,a\n1.2,b\n")


@broken("metadata.csv says nothing that is understood: give it a column file_name, series, study or patient")
def a_table_without_a_key(folder: Path) -> None:
    (folder / "metadata.csv").write_text("what,caption\n1.1,a\n")


@broken("all 3 slices are of one patient, who is in one split alone: add more, or say who is who in a table")
def one_patient(folder: Path) -> None:
    for number in range(1, 4):
        shutil.rmtree(folder / f"series-P{number}")


@broken("data.spacing 0.0001: some slices would have over 64,000,000 pixels: pass a larger one")
def a_tiny_spacing(folder: Path) -> dict[str, Any]:
    return {"spacing": 0.0001}


@broken(r"data.spacing 1.0: 1 of 13 slices do not say how large their pixels are: say it in a table metadata.csv")
def an_unknown_spacing(folder: Path) -> dict[str, Any]:
    Image.fromarray(RAMP.astype(np.uint16)).save(folder / "x.png")
    return {"spacing": 1.0}


@broken("data.window 'liver': no such window; choose brain, lung, bone, soft-tissue, file, percentile, or centre")
def a_window_that_does_not_exist(folder: Path) -> dict[str, Any]:
    return {"window": "liver"}


@broken("data.window brain is in Hounsfield units, and there are MR images")
def a_window_of_ct(folder: Path) -> dict[str, Any]:
    return {"window": "brain"}


@broken("data.window 1,2[+]3,4 makes 2 channels, data.channels is 1")
def more_windows_than_channels(folder: Path) -> dict[str, Any]:
    return {"window": "1,2+3,4"}


@pytest.mark.parametrize("message", BROKEN)
def test_a_folder_that_contradicts_itself_or_the_settings(folder: Path, message: str) -> None:
    settings = BROKEN[message](folder) or {}
    with pytest.raises(ValueError, match=message):
        open_dataset(config(folder, **settings), "train", seed=0)


def test_only_files_that_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.dcm", format="JPEG")
    write_dicom(
        tmp_path / "colour.dcm", np.zeros((8, 24)), SamplesPerPixel=3, PhotometricInterpretation="RGB", Columns=8
    )
    (empty,) = [write_dicom(tmp_path / "empty.dcm", np.zeros((8, 8)), Modality="CT")]
    data = pydicom.dcmread(empty)
    del data.PixelData
    data.save_as(empty)
    reasons = (
        "1 x not a DICOM file",
        r"1 x a colour image \(RGB\), only grey ones are read: export it as PNG",
        "1 x no pixel data",
    )
    for reason in reasons:
        with pytest.raises(ValueError, match=f"no medical image can be read here: .*{reason}"):
            open_dataset(config(tmp_path), "train", seed=0)


def test_a_missing_slice_is_said(folder: Path) -> None:
    write_series(folder, "P8", count=6)
    (next(path for path in folder.glob("series-P8/*") if path.stem == str(7 * 3 % 10))).unlink()
    assert "1 series miss slices: series " in (text := open_dataset(config(folder), "train", seed=0).describe())
    assert "between 10 and 20 mm" in text


def test_images_beside_a_folder_of_photos_change_nothing(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "d.tif")
    assert "medical" not in open_dataset(config(tmp_path), "train", seed=0).describe()


def test_without_the_extra_its_name_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ldm.data.sources.medical", None)
    with pytest.raises(
        ValueError, match=r"holds medical files, and .* is not installed: run `pip install 'ldm\[medical\]'`"
    ):
        open_dataset(config(folder), "train", seed=0)


def test_check_data_reports_series_and_patients(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(folder, "P8", PhotometricInterpretation="MONOCHROME1", PixelSpacing=[0.5, 0.5])
    (folder / "photo.dcm").write_text("")
    sheet = tmp_path / "sheet.png"
    check_data.main(
        [str(folder), "--spacing", "1", "--contact-sheet", str(sheet), "--window", "2048,4096", "--size", "16"]
    )
    report = capsys.readouterr().out
    for line in (
        "1 files refused\n  photo.dcm: not a DICOM file",
        "\n5 series\n",
        ": 3 slices, MR axial, 16 x 16 pixels, 0.5 x 0.5 mm, values ",
        ", high values are dark, series-P8\n",
        "patients: 4 in training, 1 held out, 0 in both",
        "3 below 16, which would be padded",
    ):
        assert line in report
    assert sheet.exists()
    with pytest.raises(SystemExit, match="--quarantine moves images alone, not medical files"):
        check_data.main([str(folder), "--spacing", "1", "--quarantine", str(tmp_path / "q")])
