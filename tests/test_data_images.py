"""Images that people have: every way to caption them, every kind of pixel, and every message."""

import io
import json
import os
import struct
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from ldm.data import DataConfig, ImageTextDataset, collate, open_dataset
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey
from ldm.data.sources import folder, shapes

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(color: object = RED, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, color)  # type: ignore[arg-type]


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def opened(folder: Path, split: str = "train", *, seed: int = 0, **values: Any) -> ImageTextDataset:
    config = DataConfig(source=str(folder), **{"resolution": 8, **values})  # type: ignore[arg-type]
    return open_dataset(config, split, seed=seed)  # type: ignore[arg-type]


def message(folder: Path, split: str = "train", **values: Any) -> str:
    """The error on opening: always one line."""
    with pytest.raises(ValueError) as caught:
        opened(folder, split, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def captions(folder: Path) -> dict[str, str]:
    """The caption of every image of both splits, by name."""
    parts = [opened(folder, split, max_unreadable=1) for split in ("train", "test")]
    return {name: part.caption(SampleKey(i, 0, i)) for part in parts for i, name in enumerate(part.source.names)}


def table(path: Path, columns: dict[str, list], **types: pyarrow.DataType) -> Path:
    """A parquet file as any tool may write it."""
    arrays = {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Tables are copied to the cache of `datasets`: here, one for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    """Six images in two folders, with a hidden file and one that is no image."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.jpg", "d.JPEG", "more/e.webp", "more/f.png"):
        plain().save(root / name)
    (root / "._a.png").write_bytes(b"")
    (root / "notes.md").write_text("notes")
    return root


NAMES = ["a.png", "b.png", "c.jpg", "d.JPEG", "more/e.webp", "more/f.png"]


# Captions of a folder.


@pytest.mark.parametrize("column", folder.CAPTION_COLUMNS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata(photos, kind, column):
    rows = [{"file_name": name, column: f'a "{i}", é'} for i, name in enumerate(NAMES[:5])]
    path = photos / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == "csv":
        lines = [f'{row["file_name"]},"{row[column].replace(chr(34), chr(34) * 2)}"' for row in rows]
        path.write_text(f"file_name,{column}\n" + "\n".join(lines), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert captions(photos) == {**{name: f'a "{i}", é' for i, name in enumerate(NAMES[:5])}, NAMES[5]: ""}
    said = f"images: 6 files in {photos}/, captions from metadata.{kind} column `{column}`, 5 captioned; "
    assert opened(photos).describe() == said + f"{len(opened(photos))} in the train split"


def test_a_file_that_is_listed_twice_has_two_wordings(photos):
    rows = [{"file_name": name, "text": text} for name in NAMES for text in ("one", "two")]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, test = opened(photos), opened(photos, "test")
    assert {train[SampleKey(0, epoch, 0)]["caption"] for epoch in range(16)} == {"one", "two"}
    assert {test[SampleKey(0, epoch, 0)]["caption"] for epoch in range(16)} == {"one"}
    assert Counter(train.captions) == {"one": len(train), "two": len(train)}


def test_sidecars(photos):
    (photos / "a.txt").write_text("  one\n line ")
    (photos / "more/f.caption").write_text("two")
    (photos / "readme.txt").write_text("belongs to no image")
    assert captions(photos) == dict.fromkeys(NAMES, "") | {"a.png": "one line", "more/f.png": "two"}
    said = f"images: 6 files in {photos}/, captions from *.caption and *.txt, 2 captioned; "
    assert opened(photos).describe().startswith(said)


def test_no_captions(photos):
    assert captions(photos) == dict.fromkeys(NAMES, "")
    assert opened(photos).describe().startswith(f"images: 6 files in {photos}/, no captions; ")


def test_folders_that_are_splits_already(tmp_path):
    for split, names in {"train": "abc", "test": "de"}.items():
        (tmp_path / split).mkdir()
        for name in names:
            plain().save(tmp_path / split / f"{name}.png")
            (tmp_path / split / f"{name}.txt").write_text(f"{split} {name}")
    assert list(opened(tmp_path).captions) == ["train a", "train b", "train c"]
    assert list(opened(tmp_path, "test").captions) == ["test d", "test e"]


def test_captions_that_point_to_missing_files(photos):
    rows = [{"file_name": f"{i}.png", "text": "x"} for i in range(7)] + [{"file_name": "a.png", "text": "x"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = message(photos)
    assert "names 7 files that are not there" in text and "0.png, 1.png, 2.png, 3.png, 4.png, ...;" in text
    assert "add them or take their lines out" in text


@pytest.mark.parametrize("name", ["../a.png", "more/../../a.png", "/etc/a.png", "C:/a.png"])
def test_a_path_that_leads_out_of_the_folder(photos, name):
    plain().save(photos.parent / "a.png")
    (photos / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
    text = message(photos)
    assert f"file_name {name} leads out of the folder; use paths relative to {photos}" in text


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metadata.csv", "name,text\na.png,x\n", "no column file_name, or no row; name each image's path"),
        ("metadata.csv", "file_name,words\na.png,x\n", "no caption column; call it caption, text or prompt"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{oops\n',
            "line 2 is no JSON object; write one object",
        ),
        ("metadata.jsonl", "", "no column file_name"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8 text; save it as UTF-8"),
    ],
)
def test_captions_that_can_not_be_read(photos, file, content, told):
    (photos / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message(photos)
    assert str(photos / file) in text and told in text


# Splits.


def test_what_is_held_out_does_not_move_when_items_are_added():
    names = [f"{i}.png" for i in range(400)]
    few, many = ({names[i] for i in folder.hash_split(names[:count], "test")} for count in (200, 400))
    assert few == many & set(names[:200])
    assert 0.02 < len(many) / 400 < 0.09
    assert sorted(folder.hash_split(names, "train") + folder.hash_split(names, "test")) == list(range(400))


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_small_sets_have_both_splits(count):
    for start in range(60):
        names = [f"{start}-{i}" for i in range(count)]
        train, test = (folder.hash_split(names, split) for split in ("train", "test"))
        assert train and test and sorted(train + test) == list(range(count))


def test_one_image_alone(tmp_path):
    plain().save(tmp_path / "a.png")
    assert len(opened(tmp_path)) == 1
    assert "one image alone leaves none for the test split; add at least one more" in message(tmp_path, "test")


# What is not there.


def test_missing_folder(tmp_path):
    text = message(tmp_path / "none")
    assert f"data.source {tmp_path / 'none'}: no such folder or parquet file" in text
    assert "give --data.source an existing one, a hub id org/name, or shapes, pairs or emoji" in text


def test_empty_folder_and_folder_without_images(tmp_path):
    assert f"{tmp_path}: this folder is empty; put images there" in message(tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    assert "holds no PNG, JPEG or WEBP image; put images there" in message(tmp_path)


def test_folder_with_no_readable_image(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    text = message(tmp_path, max_unreadable=1)
    assert "none of the first 7 images can be read" in text and "no PNG, JPEG or WEBP image" in text
    assert "repair them or choose another --data.source" in text


def test_unknown_split(photos):
    assert message(photos, "val") == "split 'val' is unknown: choose train or test"
    assert message(Path("shapes"), "val") == "split 'val' is unknown: choose train or test"


@pytest.mark.parametrize("values", [{"resolution": 7}, {"channels": 2}, {"max_unreadable": 1.5}])
def test_values_that_can_not_be(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"f.yaml: {name}: Input should be"):
        DataConfig.from_dict(values, source="f.yaml")


# Tables.


def test_parquet_with_an_image_column(tmp_path):
    rows = {"picture": [{"bytes": encoded(plain((i, 0, 0))), "path": None} for i in range(30)], "prompt": ["p"] * 30}
    features = datasets.Features({"picture": datasets.Image(), "prompt": datasets.Value("string")})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    train, test = opened(path), opened(path, "test")
    assert train.describe().startswith(
        f"images: 30 rows of {path}, column `picture`, captions from column `prompt`, 30"
    )
    shown = [
        round((part[SampleKey(i, 0, i)]["image"][0, 0, 0].item() + 1) * 127.5)
        for part in (train, test)
        for i in range(len(part))
    ]
    assert sorted(shown) == list(range(30)) and test[SampleKey(0, 0, 0)]["caption"] == "p"


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_of_other_tools(tmp_path, kind):
    data = [encoded(plain(RED)), encoded(plain(RED), "JPEG", quality=95), encoded(plain(RED), "WEBP", lossless=True)]
    cells = data if kind == "bytes" else [{"bytes": item, "path": "x.png"} for item in data]
    path = table(tmp_path / "a.parquet", {"image": cells, "text": [["one", "two"], [], None]})
    parts = [opened(path, split) for split in ("train", "test")]
    for part in parts:
        for i in range(len(part)):
            assert (part[SampleKey(i, 0, i)]["image"] - torch.tensor([1.0, -1, -1])[:, None, None]).abs().max() < 0.05
    assert sorted(text for part in parts for text in part.captions) == ["", "one", "two"]


def test_a_path_in_a_table_stays_beside_the_table(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (folder / "in.png", tmp_path / "out.png"):
        plain().save(place)
    paths = ["in.png", "../out.png", str(tmp_path / "out.png")]
    cells = [{"bytes": None, "path": path} for path in paths] + [None]
    path = table(
        folder / "a.parquet",
        {"image": cells},
        image=pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
    )
    source = folder.ImageTextSource.select(
        folder._table(datasets.Dataset.from_parquet(str(path)), "a", [folder]), range(4)
    )
    assert source.images[0] == folder / "in.png"
    for index in (1, 2):
        with pytest.raises(ValueError, match="leads out of"):
            source.images[index]
    with pytest.raises(ValueError, match="holds no image"):
        source.images[3]


def test_tables_without_images(tmp_path):
    path = table(tmp_path / "a.parquet", {"text": ["x"], "label": [1]})
    assert f"{path}: none of the columns text, label holds images; choose another --data.source" in message(path)
    table(tmp_path / "b.parquet", {"image": []}, image=pyarrow.binary())
    (tmp_path / "c.parquet").write_text("no table")
    for name in ("b.parquet", "c.parquet"):
        assert f"{name}: no parquet file, a damaged one or an empty one; choose another" in message(tmp_path / name)


def hub(monkeypatch, **splits: int) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    cell = {"bytes": encoded(plain()), "path": None}
    made = {
        split: datasets.Dataset.from_dict({"image": [cell] * n, "caption": [split] * n}, features=features)
        for split, n in splits.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(made))


@pytest.mark.parametrize(
    ("splits", "own"),
    [
        ({"train": 20}, None),
        ({"train": 20, "test": 3, "validation": 2}, "test"),
        ({"train": 20, "validation": 2}, "validation"),
    ],
)
def test_hub_splits(monkeypatch, splits, own):
    hub(monkeypatch, **splits)
    train, test = opened(Path("org/set")), opened(Path("org/set"), "test")
    held_out = len(folder.hash_split([f"row {i}" for i in range(20)], "test"))
    assert list(test.captions) == (["train"] * held_out if own is None else [own] * splits[own])
    assert list(train.captions) == ["train"] * (20 - held_out if own is None else 20)
    assert train.describe().startswith("images: 20 rows of hub org/set, column `image`, captions from column `caption`")
    assert train[SampleKey(0, 0, 0)]["image"].shape == (3, 8, 8)


def test_hub_messages(monkeypatch):
    hub(monkeypatch, other=3)
    assert "data.source org/set: has no split train, only other; choose another one" in message(Path("org/set"))
    hub(monkeypatch, train=0)
    assert "hub org/set: holds no rows; choose another --data.source" in message(Path("org/set"))

    def fail(name: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    text = message(Path("org/set"))
    assert "no such folder, and the Hugging Face hub gave no data set of that name (no network)" in text
    assert "give --data.source an existing folder or a public hub id" in text


# Pixels.


def test_exif_rotation():
    image = plain(RED, (20, 10))
    ImageDraw.Draw(image).rectangle((0, 0, 9, 9), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for format in ("PNG", "JPEG", "WEBP"):
        upright = folder.decode_image(encoded(image, format, exif=exif))
        assert upright.size == (10, 20)
        top, bottom = (np.array(upright.getpixel((5, y)), int) for y in (4, 15))
        assert np.abs(top - BLUE).max() < 12 and np.abs(bottom - RED).max() < 12


def test_transparency_becomes_white():
    clear = plain((255, 0, 0, 0), mode="RGBA")
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    for data in (encoded(clear), encoded(clear, "WEBP", lossless=True, exact=True)):
        image = folder.decode_image(data)
        assert image.mode == "RGB"
        assert [image.getpixel((x, 0)) for x in range(3)] == [RED, (255, 127, 127), (255, 255, 255)]
    grey = Image.merge("LA", (plain(0, mode="L"), plain(0, mode="L")))
    assert folder.decode_image(encoded(grey)).getpixel((0, 0)) == (255, 255, 255)


def test_palettes():
    image = plain(0, mode="P")
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert [folder.decode_image(encoded(image)).getpixel((x, 0)) for x in (0, 1)] == [RED, GREEN]
    see_through = folder.decode_image(encoded(image, transparency=0))
    assert [see_through.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), GREEN]


def test_cmyk():
    image = folder.decode_image(encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB" and np.abs(np.array(image.getpixel((4, 4)), int) - RED).max() < 8


def test_sixteen_bits_are_scaled():
    values = np.tile(np.array([0, 257, 32896, 65535], np.uint16), (4, 1))
    data = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert [folder.decode_image(data).getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]
    assert [folder.decode_image(data, channels=1).getpixel((x, 0)) for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "color", "grey"), [("L", 100, 100), ("1", 1, 255), ("RGB", (0, 255, 0), 150)])
def test_grey(mode, color, grey):
    data = encoded(plain(color, mode=mode))
    assert folder.decode_image(data, channels=1).mode == "L"
    assert folder.decode_image(data, channels=1).getpixel((0, 0)) == grey
    assert folder.crop_resize_to_tensor(folder.decode_image(data, channels=1), (8, 8)).shape == (1, 8, 8)
    if mode != "RGB":
        assert folder.decode_image(data).getpixel((0, 0)) == (grey,) * 3


def test_the_first_frame_is_taken():
    frames = [plain(color) for color in (RED, GREEN)]
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert folder.decode_image(data).getpixel((0, 0)) == RED


def test_a_large_jpeg_is_read_smaller_but_not_too_small():
    data = encoded(plain(size=(640, 480)), "JPEG")
    assert min(folder.decode_image(data, side=32).size) in range(64, 128)
    assert folder.decode_image(data).size == (640, 480)


@pytest.mark.parametrize("size", [(20_000, 10_000), (9_000, 8_000)])  # above Pillow's own limit, and below it
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_giant_image_is_refused_from_its_header(size):
    with pytest.raises(ValueError, match="larger than the limit of 64 megapixels; shrink it"):
        folder.decode_image(png_header(*size))
    with pytest.raises(ValueError) as caught:  # small enough, it is decoded and found to lack its pixels
        folder.decode_image(png_header(20, 10))
    assert "megapixels" not in str(caught.value)


def test_damaged_files(tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(ValueError, match="truncated"):
        folder.decode_image(whole[: len(whole) // 2])
    for data in (b"", b"no image", encoded(plain(), "GIF"), encoded(plain(), "BMP")):
        with pytest.raises(ValueError, match=r"^no PNG, JPEG or WEBP image$"):
            folder.decode_image(data)
    (tmp_path / "a.png").write_bytes(whole)
    assert folder.decode_image(tmp_path / "a.png").size == (64, 64)
    with pytest.raises(ValueError, match="No such file"):
        folder.decode_image(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.png")  # which would be waited for, for ever
    with pytest.raises(ValueError, match="no regular file"):
        folder.decode_image(tmp_path / "c.png")
    assert folder.image_size(tmp_path / "c.png") == (1, 1)


def test_clear_grey_of_16_bits_is_white():
    grey = Image.fromarray(np.array([[0, 1000], [40000, 65535]], np.uint16))
    data = encoded(grey, transparency=1000)
    assert np.asarray(folder.decode_image(data, channels=1)).tolist() == [[0, 255], [156, 255]]


def test_files_that_are_left_out_are_told(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(plain()))
    (tmp_path / "c.tif").write_bytes(encoded(plain(), "TIFF"))
    assert "1 left out that are no PNG, JPEG or WEBP: c.tif" in opened(tmp_path).describe()
    (tmp_path / "metadata.parquet").write_bytes(b"no parquet")
    assert "metadata.parquet: no parquet file, or a damaged one" in message(tmp_path)


def test_values_are_minus_one_to_one():
    image = plain((0, 51, 255))
    pixels = folder.crop_resize_to_tensor(image, (8, 8))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 8, 8) and pixels.is_contiguous()
    assert torch.allclose(pixels[:, 3, 3], torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(
        folder.crop_resize_to_tensor(plain(size=(8, 8)), (8, 8)), folder.crop_resize_to_tensor(plain(), (8, 8))
    )


def test_resizing_is_antialiased():
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert folder.crop_resize_to_tensor(board, (8, 8)).abs().max() < 0.1


@pytest.mark.parametrize("wide", [True, False])
def test_crops(wide):
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (10, 1))  # 40 pixels long
    image = Image.fromarray(ramp if wide else ramp.T)

    def first(offset: int | None) -> float:
        pixels = folder.crop_resize_to_tensor(image, (10, 10), folder.crop_box(image, (10, 10), offset))
        return ((pixels[0, 0, 0] + 1) * 127.5 / 6).item()

    assert first(None) == pytest.approx(15)
    assert [first(offset) for offset in (0, 7, 30)] == pytest.approx([0, 7, 30])
    assert first(31) == pytest.approx(0)  # offsets count round


def test_a_strip_is_cut_before_it_is_enlarged():
    assert folder.crop_resize_to_tensor(plain(size=(1, 100_000)), (64, 64)).shape == (3, 64, 64)


def test_sizes_tell_how_a_picture_was_cut(tmp_path: Path) -> None:
    """Height and width before, also of a JPEG that was read smaller or lies on its side; the cut's corner; its size."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name, image, options in (
        ("a.png", plain(size=(24, 12)), {}),
        ("b.jpg", plain(size=(640, 960)), {}),
        ("c.jpg", plain(size=(640, 960)), {"exif": exif}),
    ):
        (tmp_path / name).write_bytes(encoded(image, "PNG" if name == "a.png" else "JPEG", **options))
    source = folder._read_folder(tmp_path)
    data = ImageTextDataset(source, DataConfig(resolution=8), "test", seed=0)
    assert [data[SampleKey(i, 0, 0)]["sizes"].tolist() for i in range(3)] == [
        [12, 24, 0, 4, 8, 8],
        [960, 640, 2, 0, 8, 8],
        [640, 960, 0, 2, 8, 8],
    ]
    mirrored = ImageTextDataset(source, DataConfig(resolution=8, random_flip=True), "train", seed=0)
    straight = ImageTextDataset(source, DataConfig(resolution=8), "train", seed=0)
    lefts = [tuple(d[SampleKey(0, epoch, 0)]["sizes"][3].item() for d in (straight, mirrored)) for epoch in range(20)]
    assert {a == b for a, b in lefts} == {True, False} and all(b in (a, 8 - a) for a, b in lefts)


# Random choices.


@pytest.fixture
def ramps(tmp_path):
    for i in range(12):
        ramp = np.tile(np.arange(200, dtype=np.uint8) + i, (10, 1))
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    return tmp_path


def test_crops_and_flips_depend_on_seed_epoch_and_index_alone(ramps):
    data, again, other = (opened(ramps, seed=seed, flip=True) for seed in (0, 0, 1))
    keys = [SampleKey(index, epoch, 0) for index in range(6) for epoch in range(3)]
    torch.manual_seed(0)
    expected = [data[key]["image"] for key in keys]
    torch.manual_seed(1)
    assert all(
        torch.equal(image, again[key._replace(position=5)]["image"]) for image, key in zip(expected, keys, strict=True)
    )
    assert not any(torch.equal(image, other[key]["image"]) for image, key in zip(expected, keys, strict=True))
    assert len({image[0, 0, 0].item() for image in expected}) > 10
    rising = [bool(image[0, 0, 0] < image[0, 0, -1]) for image in expected]
    assert True in rising and False in rising


def test_nothing_is_flipped_unless_asked(ramps):
    data = opened(ramps)
    images_ = [data[SampleKey(index, epoch, 0)]["image"] for index in range(6) for epoch in range(3)]
    assert all(image[0, 0, 0] < image[0, 0, -1] for image in images_)


def test_the_test_split_has_centre_crops_whatever_the_seed(ramps):
    data, other = (opened(ramps, "test", seed=seed, flip=True) for seed in (0, 1))
    image = data[SampleKey(0, 0, 0)]["image"]
    assert torch.equal(image, data[SampleKey(0, 5, 0)]["image"]) and torch.equal(
        image, other[SampleKey(0, 0, 0)]["image"]
    )
    assert image[0, 0, 0] < image[0, 0, -1]


def test_batches(ramps):
    loader = DataLoader(
        opened(ramps, channels=1), batch_sampler=EpochBatchSampler(8, seed=0, batch_size=4), collate_fn=collate
    )
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 1, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["caption"] == [""] * 4


@pytest.mark.parametrize("source", ["shapes", "pairs"])
def test_drawn_sets(monkeypatch, source):
    load = {"shapes": "load", "pairs": "load_pairs"}[source]
    whole = getattr(shapes, load)
    monkeypatch.setattr(shapes, load, lambda split, size: whole(split, size, count=6))
    data = open_dataset(DataConfig(source=source, resolution=16), "test", seed=9)
    rows = whole("test", 16, count=6)
    assert (
        data.describe()
        == {
            "shapes": "shapes: procedural scenes; 6 in the test split",
            "pairs": "pairs: scenes of two objects; 6 in the test split",
        }[source]
    )
    assert list(data.captions) == rows["caption"][:]
    for i, row in enumerate(rows):
        pixels = torch.tensor(np.asarray(row["image"])).permute(2, 0, 1) / 127.5 - 1
        sample = data[SampleKey(i, 3, 0)]
        assert torch.allclose(sample["image"], pixels, atol=1e-6) and sample["caption"] == row["caption"]


# Images that can not be read.


@pytest.fixture
def damaged(tmp_path):
    """Forty images with captions; those of number 3 and 7 are damaged."""
    for i in range(40):
        plain((i, 0, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    for i in (3, 7):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    assert {"03.png", "07.png"} <= set(opened(tmp_path).source.names), "both must be in the training split"
    return tmp_path


def test_another_image_stands_in_with_its_own_caption(damaged):
    data, again = (opened(damaged, max_unreadable=0.1) for _ in range(2))
    place = data.source.names.index("03.png")
    sample = data[SampleKey(place, 0, 0)]
    assert sample["caption"] not in ("3", "7")
    assert round((sample["image"][0, 0, 0].item() + 1) * 127.5) == int(sample["caption"])
    assert data.caption(SampleKey(place, 0, 0)) == sample["caption"] == data[SampleKey(place, 4, 0)]["caption"]
    assert again[SampleKey(place, 0, 0)]["caption"] == sample["caption"]
    assert data.unreadable == ["03.png: no PNG, JPEG or WEBP image"]
    assert len({data[SampleKey(i, 0, 0)]["caption"] for i in (place, data.source.names.index("07.png"))}) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_main_process_hears_of_them(damaged, workers):
    data = opened(damaged, max_unreadable=0.1)
    order = EpochBatchSampler(len(data), seed=0, batch_size=len(data))
    batches = list(islice(DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=collate), 2))
    assert not {"3", "7"} & {caption for batch in batches for caption in batch["caption"]}
    assert data.unreadable == [f"{name}: no PNG, JPEG or WEBP image" for name in ("03.png", "07.png")]


def test_too_many_stop_the_run(damaged):
    data = opened(damaged, max_unreadable=0.03)
    first, second = (data.source.names.index(name) for name in ("03.png", "07.png"))
    data[SampleKey(first, 0, 0)]
    data[SampleKey(first, 1, 0)]  # the same file counts once
    with pytest.raises(ValueError) as caught:
        data[SampleKey(second, 0, 0)]
    text = str(caught.value)
    share = (
        f"2 of {len(data)} images ({2 / len(data):.1%}) can not be read, above the 3.0% that data.max_unreadable allows"
    )
    assert f"{damaged}: {share}" in text
    assert "03.png: no PNG, JPEG or WEBP image; 07.png: no PNG, JPEG or WEBP image; repair or remove them" in text
    assert text.endswith("or raise --data.max-unreadable") and "\n" not in text


def test_no_more_than_five_are_named(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_bytes(encoded(plain()) if i == 0 else b"")
    data = opened(tmp_path, max_unreadable=0.3)
    with pytest.raises(ValueError) as caught:
        for i in range(len(data)):
            data[SampleKey(i, 0, 0)]
    assert str(caught.value).count(".png: ") == 5


def test_the_search_for_a_stand_in_ends(damaged):
    data = opened(damaged, max_unreadable=1)
    for name in data.source.names:
        (damaged / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"32 images in a row can not be read, .*; repair or remove them"):
        data[SampleKey(0, 0, 0)]
