"""Images that people have: every way to caption them, every kind of pixel, and every message."""

import io
import json
import os
import re
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import encoded, plain
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from ldm.data import DataConfig, ImageTextDataset, collate, open_dataset
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey
from ldm.data.sources import shapes
from ldm.data.sources.base import CAPTION_COLUMNS, Decoded, ImageTextSource, hash_split
from ldm.data.sources.folder import open_images
from ldm.data.transforms import Sides, View, crop_resize_to_tensor
from ldm.imaging import decode_image, decode_reduced, image_size, tensor_to_pil

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


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


@pytest.mark.parametrize("column", CAPTION_COLUMNS)
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
    described = f"images: 6 files in {photos}/, captions from metadata.{kind} column `{column}`, 5 captioned; "
    assert opened(photos).describe().splitlines() == [
        described + f"{len(opened(photos))} in the train split",
        "1 images without a caption: more/f.png",
        "1 skipped other files: notes.md (1 .md)",
    ]


def test_a_file_that_is_listed_twice_has_two_captions(photos):
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
    described = f"images: 6 files in {photos}/, captions from *.caption and *.txt, 2 captioned; "
    assert opened(photos).describe().startswith(described)


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
    assert "names 7 files" in text and "0.png, 1.png, 2.png, 3.png, 4.png, ...;" in text and "remove their" in text


@pytest.mark.parametrize("name", ["../a.png", "more/../../a.png", "/etc/a.png", "C:/a.png"])
def test_a_path_that_leads_out_of_the_folder(photos, name):
    plain().save(photos.parent / "a.png")
    (photos / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
    text = message(photos)
    assert f"names 1 files that are not there as PNG, JPEG or WEBP: {name};" in text and f"relative to {photos}" in text


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("metadata.csv", "name,text\na.png,x\n", "no column file_name.*write each image's path"),
        ("metadata.csv", "file_name,words\na.png,x\n", "no caption column; .*caption, text or prompt"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops\n', "line 2 .*JSON object; write one object"),
        ("metadata.jsonl", "", "no column file_name"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8 text; save it as UTF-8"),
    ],
)
def test_captions_that_cannot_be_read(photos, file, content, expected):
    (photos / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message(photos)
    assert str(photos / file) in text and re.search(expected, text)


# Splits.


def test_what_is_held_out_does_not_move_when_items_are_added():
    names = [f"{i}.png" for i in range(400)]
    few, many = ({names[i] for i in hash_split(names[:count], "test")} for count in (200, 400))
    assert few == many & set(names[:200])
    assert 0.02 < len(many) / 400 < 0.09
    assert sorted(hash_split(names, "train") + hash_split(names, "test")) == list(range(400))


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_small_sets_have_both_splits(count):
    for start in range(60):
        names = [f"{start}-{i}" for i in range(count)]
        train, test = (hash_split(names, split) for split in ("train", "test"))
        assert train and test and sorted(train + test) == list(range(count))


def test_one_image_alone(tmp_path):
    plain().save(tmp_path / "a.png")
    assert len(opened(tmp_path)) == 1
    assert re.search("one image alone .* test split; add at least one more", message(tmp_path, "test"))


# What is not there.


def test_missing_folder(tmp_path):
    text = message(tmp_path / "none")
    assert f"data.source {tmp_path / 'none'}: no such folder or parquet file" in text
    assert re.search("give --data.source .*a hub id org/name, or shapes, pairs or emoji", text)


def test_empty_folder_and_folder_without_images(tmp_path):
    assert re.search(f"{tmp_path}: .*is empty; put images there", message(tmp_path))
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    assert re.search("no PNG, JPEG or WEBP image; put images there", message(tmp_path))


def test_folder_with_no_readable_image(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    for cap, found in ((1, "32 images in a row"), (0.01, "1 of 7 images .* above the 1.0%")):
        with pytest.raises(ValueError, match=f"{found}.* .*not a PNG, JPEG or WEBP.*; repair or remove them"):
            opened(tmp_path, max_unreadable=cap)[SampleKey(0, 0, 0)]


def test_unknown_split(photos):
    for source in (photos, Path("shapes")):
        assert re.search("split 'val' .*: choose train or test", message(source, "val"))


@pytest.mark.parametrize("values", [{"resolution": 7}, {"channels": 2}, {"max_unreadable": 1.5}])
def test_values_that_are_out_of_range(values):
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
    path = table(tmp_path / "a.parquet", {"image": cells, "Text": [["one", "two"], [], None]})
    parts = [opened(path, split) for split in ("train", "test")]
    for part in parts:
        for i in range(len(part)):
            assert (part[SampleKey(i, 0, i)]["image"] - torch.tensor([1.0, -1, -1])[:, None, None]).abs().max() < 0.05
    assert sorted(text for part in parts for text in part.captions) == ["one", "two"]


def test_a_path_in_a_table_stays_next_to_the_table(tmp_path):
    tables = tmp_path / "data"
    tables.mkdir()
    for path in (tables / "in.png", tmp_path / "out.png"):
        plain().save(path)
    cells = [{"bytes": None, "path": path} for path in ("in.png", "../out.png", str(tmp_path / "out.png"))] + [None]
    types = {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})}
    path = table(tables / "a.parquet", {"image": cells}, **types)
    rows: dict[str, Any] = {}
    for split in ("train", "test"):
        source = open_images(str(path), split)
        for i, name in enumerate(source.names):
            try:
                rows[name] = source.read(i, View((8, 8)), channels=3, side=8).pixels.shape
            except ValueError as error:
                rows[name] = str(error)
    assert rows["row 0"] == (3, 8, 8) and "holds no image" in rows["row 3"]
    assert all("leads out of" in rows[name] for name in ("row 1", "row 2"))


def test_tables_without_images(tmp_path):
    path = table(tmp_path / "a.parquet", {"text": ["x"], "label": [1]})
    assert re.search(f"{path}: none of the columns text, label .*choose another --data.source", message(path))
    table(tmp_path / "b.parquet", {"image": []}, image=pyarrow.binary())
    (tmp_path / "c.parquet").write_text("no table")
    for name in ("b.parquet", "c.parquet"):
        assert re.search(f"{name}: not a parquet file.*; choose another", message(tmp_path / name))


def hub(monkeypatch, **splits: int) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    cell = {"bytes": encoded(plain()), "path": None}
    made = {
        split: datasets.Dataset.from_dict({"image": [cell] * n, "caption": [split] * n}, features=features)
        for split, n in splits.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(made))


@pytest.mark.parametrize(
    ("splits", "held_out"),
    [
        ({"train": 20}, None),
        ({"train": 20, "test": 3, "validation": 2}, "test"),
        ({"train": 20, "validation": 2}, "validation"),
        ({"extra": 2, "training": 20, "dev": 2, "eval_images": 3}, "eval_images"),
    ],
)
def test_hub_splits(monkeypatch, splits, held_out):
    hub(monkeypatch, **splits)
    train, test = opened(Path("org/set")), opened(Path("org/set"), "test")
    hashed, name = len(hash_split([f"row {i}" for i in range(20)], "test")), max(splits, key=lambda key: splits[key])
    assert list(test.captions) == (["train"] * hashed if held_out is None else [held_out] * splits[held_out])
    assert list(train.captions) == [name] * (20 - hashed if held_out is None else 20)
    notes = "\n".join(train.source.notes)
    assert (f"held out: the {splits.get(held_out)} rows of split {held_out}" in notes) == (held_out is not None)
    skipped = [other for other in splits if other not in (name, held_out)]
    assert not skipped or f"{len(skipped)} splits skipped: {', '.join(skipped)}" in notes
    assert train.describe().startswith("images: 20 rows of hub org/set, column `image`, captions from column `caption`")
    assert train[SampleKey(0, 0, 0)]["image"].shape == (3, 8, 8)


def test_hub_messages(monkeypatch):
    hub(monkeypatch, other=3)
    assert re.search("data.source org/set: no split train, only other; choose another", message(Path("org/set")))
    hub(monkeypatch, train=0)
    assert re.search("hub org/set: no rows; choose another --data.source", message(Path("org/set")))

    def fail(name: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    text = message(Path("org/set"))
    assert re.search(r"no such folder.*Hugging Face hub .*\(no network\).*give --data.source .*a public hub id", text)


# Pixels.


def test_exif_rotation():
    image = plain(RED, (20, 10))
    ImageDraw.Draw(image).rectangle((0, 0, 9, 9), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for format in ("PNG", "JPEG", "WEBP"):
        upright = decode_image(encoded(image, format, exif=exif))
        assert upright.size == (10, 20)
        top, bottom = (np.array(upright.getpixel((5, y)), int) for y in (4, 15))
        assert np.abs(top - BLUE).max() < 12 and np.abs(bottom - RED).max() < 12


def test_transparency_becomes_white():
    clear = plain((255, 0, 0, 0), mode="RGBA")
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    for data in (encoded(clear), encoded(clear, "WEBP", lossless=True, exact=True)):
        image = decode_image(data)
        assert image.mode == "RGB"
        assert [image.getpixel((x, 0)) for x in range(3)] == [RED, (255, 127, 127), (255, 255, 255)]
    grey = Image.merge("LA", (plain(0, mode="L"), plain(0, mode="L")))
    assert decode_image(encoded(grey)).getpixel((0, 0)) == (255, 255, 255)


def test_palettes():
    image = plain(0, mode="P")
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert [decode_image(encoded(image)).getpixel((x, 0)) for x in (0, 1)] == [RED, GREEN]
    see_through = decode_image(encoded(image, transparency=0))
    assert [see_through.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), GREEN]


def test_cmyk():
    image = decode_image(encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB" and np.abs(np.array(image.getpixel((4, 4)), int) - RED).max() < 8


def test_sixteen_bits_are_scaled():
    values = np.tile(np.array([0, 257, 32896, 65535], np.uint16), (4, 1))
    data = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert [decode_image(data).getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]
    assert [decode_image(data, channels=1).getpixel((x, 0)) for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "color", "grey"), [("L", 100, 100), ("1", 1, 255), ("RGB", (0, 255, 0), 150)])
def test_grey(mode, color, grey):
    data = encoded(plain(color, mode=mode))
    assert decode_image(data, channels=1).mode == "L"
    assert decode_image(data, channels=1).getpixel((0, 0)) == grey
    assert resized(decode_image(data, channels=1), channels=1).shape == (1, 8, 8)
    if mode != "RGB":
        assert decode_image(data).getpixel((0, 0)) == (grey,) * 3


def test_the_first_frame_is_taken():
    frames = [plain(color) for color in (RED, GREEN)]
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data).getpixel((0, 0)) == RED


def test_a_large_jpeg_is_read_smaller_but_not_too_small():
    data = encoded(plain(size=(640, 480)), "JPEG")
    image, size = decode_reduced(data, channels=3, side=32)
    assert min(image.size) in range(64, 128) and size == (480, 640)
    assert decode_image(data).size == (640, 480)


@pytest.mark.parametrize("size", [(20_000, 10_000), (9_000, 8_000)])  # above Pillow's own limit, and below it
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_giant_image_is_refused_from_its_header(size):
    with pytest.raises(ValueError, match="64 megapixels; shrink it"):
        decode_image(png_header(*size))
    with pytest.raises(ValueError) as caught:  # small enough, it is decoded and found to lack its pixels
        decode_image(png_header(20, 10))
    assert "megapixels" not in str(caught.value)


def test_damaged_files(tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(ValueError, match="truncated"):
        decode_image(whole[: len(whole) // 2])
    for data in (b"", b"no image", encoded(plain(), "GIF"), encoded(plain(), "BMP")):
        with pytest.raises(ValueError, match="not a PNG, JPEG or WEBP"):
            decode_image(data)
    (tmp_path / "a.png").write_bytes(whole)
    assert decode_image(tmp_path / "a.png").size == (64, 64)
    with pytest.raises(ValueError, match="No such file"):
        decode_image(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.png")  # which would be waited for, for ever
    with pytest.raises(ValueError, match="not a regular file"):
        decode_image(tmp_path / "c.png")
    assert image_size(tmp_path / "c.png") == (1, 1)
    assert image_size(tmp_path / "b.png") == (1, 1)


def test_clear_grey_of_16_bits_is_white():
    grey = Image.fromarray(np.array([[0, 1000], [40000, 65535]], np.uint16))
    data = encoded(grey, transparency=1000)
    assert np.asarray(decode_image(data, channels=1)).tolist() == [[0, 255], [156, 255]]


def test_files_that_are_skipped_are_named(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(plain()))
    (tmp_path / "c.tif").write_bytes(encoded(plain(), "TIFF"))
    assert re.search("1 skipped .*: c.tif", opened(tmp_path).describe())
    (tmp_path / "metadata.parquet").write_bytes(b"no parquet")
    assert re.search("metadata.parquet: not a parquet file.*write it again or remove it", message(tmp_path))


def resized(image: Image.Image, sides: Sides = (8, 8), *, channels: int = 3) -> torch.Tensor:
    """The pixels of a centre crop."""
    return crop_resize_to_tensor(image, View(sides), channels=channels)[0]


def test_values_are_minus_one_to_one():
    pixels = resized(plain((0, 51, 255)))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 8, 8) and pixels.is_contiguous()
    assert torch.allclose(pixels[:, 3, 3], torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(resized(plain(size=(8, 8))), resized(plain()))


def test_resizing_is_antialiased():
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert resized(board, channels=1).abs().max() < 0.1


def test_resizing_is_that_of_pillow():
    """In 8 bits, over the box of the crop: the values that a reader of the file would get."""
    image = Image.effect_noise((50, 30), 50)
    want = image.resize((16, 16), Image.Resampling.LANCZOS, box=(10, 0, 40, 30))
    (shown,) = tensor_to_pil(resized(image, (16, 16), channels=1)[None])
    assert np.array_equal(np.asarray(shown), np.asarray(want))


@pytest.mark.parametrize("wide", [True, False])
def test_crops(wide):
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (10, 1))  # 40 pixels long
    image = Image.fromarray(ramp if wide else ramp.T)

    def first(offset: int | None) -> float:
        pixels, corner = crop_resize_to_tensor(image, View((10, 10), offset), channels=1)
        value = ((pixels[0, 0, 0] + 1) * 127.5 / 6).item()
        assert corner == ((0, round(value)) if wide else (round(value), 0))
        return value

    assert first(None) == pytest.approx(15)
    assert [first(offset) for offset in (0, 7, 30)] == pytest.approx([0, 7, 30])
    assert first(31) == pytest.approx(0)  # offsets count round


def test_flips():
    image = Image.effect_noise((24, 16), 50)
    (straight, corner), (mirrored, other) = (
        crop_resize_to_tensor(image, View((8, 8), 2, flip), channels=1) for flip in (False, True)
    )
    assert torch.equal(straight.flip(-1), mirrored)
    assert corner == (0, 1) and other == (0, 3)  # of 12 pixels, at half the size


def test_a_strip_is_cropped_before_it_is_enlarged():
    assert resized(plain(size=(1, 100_000)), (64, 64)).shape == (3, 64, 64)


def test_sizes_tell_how_an_image_was_cropped(tmp_path: Path) -> None:
    """Original size, also of a JPEG that was read smaller or is turned; corner of the crop; sides of the sample."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name, image, options in (
        ("a.png", plain(size=(24, 12)), {}),
        ("b.jpg", plain(size=(640, 960)), {}),
        ("c.jpg", plain(size=(640, 960)), {"exif": exif}),
    ):
        for split in ("train", "test"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / name).write_bytes(encoded(image, "PNG" if name == "a.png" else "JPEG", **options))
    data = opened(tmp_path, "test")
    assert [data[SampleKey(i, 0, 0)]["sizes"].tolist() for i in range(3)] == [
        [12, 24, 0, 4, 8, 8],
        [960, 640, 2, 0, 8, 8],
        [640, 960, 0, 2, 8, 8],
    ]
    mirrored, straight = opened(tmp_path, random_flip=True), opened(tmp_path)
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
    data, again, other = (opened(ramps, seed=seed, random_flip=True) for seed in (0, 0, 1))
    keys = [SampleKey(index, epoch, 0) for index in range(6) for epoch in range(3)]
    torch.manual_seed(0)
    expected = [data[key]["image"] for key in keys]
    torch.manual_seed(1)
    assert all(
        torch.equal(image, again[replace(key, position=5)]["image"]) for image, key in zip(expected, keys, strict=True)
    )
    assert not any(torch.equal(image, other[key]["image"]) for image, key in zip(expected, keys, strict=True))
    assert len({image[0, 0, 0].item() for image in expected}) > 10
    rising = [bool(image[0, 0, 0] < image[0, 0, -1]) for image in expected]
    assert True in rising and False in rising


def test_nothing_is_flipped_unless_asked(ramps):
    data = opened(ramps)
    images = [data[SampleKey(index, epoch, 0)]["image"] for index in range(6) for epoch in range(3)]
    assert all(image[0, 0, 0] < image[0, 0, -1] for image in images)


def test_the_test_split_has_centre_crops_whatever_the_seed(ramps):
    data, other = (opened(ramps, "test", seed=seed, random_flip=True) for seed in (0, 1))
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
    monkeypatch.setattr(shapes, "num_rows", lambda split, *, pairs: 6)
    data = open_dataset(DataConfig(source=source, resolution=16), "test", seed=9)
    rows = {"shapes": shapes.load, "pairs": shapes.load_pairs}[source]("test", 16, count=6)
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


# A source decides how it decodes.


@dataclass(frozen=True, kw_only=True)
class Scans(ImageTextSource):
    """Images of more than 8 bits: ramps whose steps 8 bits do not show."""

    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        height, width = view.sides
        if index == 0:
            raise ValueError("no scan")
        pixels = torch.linspace(0, 1e-3, width).mul(index).expand(channels, height, width)
        return Decoded(pixels, (0, 0), (512, 512))

    def size(self, index: int) -> Sides:
        return 512, 512


def test_a_source_of_floats_is_not_rounded_to_8_bits():
    source = Scans(names=["a", "b", "c"], captions=[[], ["one"], ["two", "three"]], description="scans")
    data = ImageTextDataset(source, DataConfig(resolution=8, channels=1, max_unreadable=1), "test", seed=0)
    sample = data[SampleKey(1, 0, 0)]
    assert torch.equal(sample["image"], torch.linspace(0, 1e-3, 8).expand(1, 8, 8))
    assert sample["caption"] == "one" and sample["sizes"].tolist() == [512, 512, 0, 0, 8, 8]
    assert data[SampleKey(0, 0, 0)]["caption"] in ("one", "two") and data.reader.unreadable() == ["a: no scan"]
    assert data.captions_of(SampleKey(2, 0, 0)) == ["two", "three"]


# Images that cannot be read.


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


def test_another_image_replaces_it_with_its_own_caption(damaged):
    data, again = (opened(damaged, max_unreadable=0.1) for _ in range(2))
    index = data.source.names.index("03.png")
    sample = data[SampleKey(index, 0, 0)]
    assert sample["caption"] not in ("3", "7")
    assert round((sample["image"][0, 0, 0].item() + 1) * 127.5) == int(sample["caption"])
    assert data.caption(SampleKey(index, 0, 0)) == sample["caption"] == data[SampleKey(index, 4, 0)]["caption"]
    assert again[SampleKey(index, 0, 0)]["caption"] == sample["caption"]
    assert len(data.reader.unreadable()) == 1 and re.match(
        "03.png: not a PNG, JPEG or WEBP", data.reader.unreadable()[0]
    )
    assert len({data[SampleKey(i, 0, 0)]["caption"] for i in (index, data.source.names.index("07.png"))}) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_main_process_knows_them(damaged, workers):
    data = opened(damaged, max_unreadable=0.1)
    sampler = EpochBatchSampler(len(data), seed=0, batch_size=len(data))
    batches = list(islice(DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=collate), 2))
    assert not {"3", "7"} & {caption for batch in batches for caption in batch["caption"]}
    assert [line.split(":")[0] for line in data.reader.unreadable()] == ["03.png", "07.png"]
    assert re.search("train split: 2 images could not be read.*\n03.png: .*\n07.png: ", data.report())


def test_ranks_exchange_them(damaged):
    """What one rank met all know; above the cap all of them stop."""
    ranks = [opened(damaged, max_unreadable=0.03) for _ in range(2)]
    indices = [ranks[0].source.names.index(name) for name in ("03.png", "07.png")]
    for rank, index in zip(ranks, indices, strict=True):
        rank[SampleKey(index, 0, 0)]
    for rank, index in zip(ranks, indices, strict=True):
        sent: list[list[int]] = []
        with pytest.raises(ValueError, match="2 of .* images .*03.png: .*; 07.png: .*--data.max-unreadable"):
            rank.reader.sync(lambda mine, sent=sent: sent.append(mine) or indices)
        assert sent == [[index]]
        assert len(rank.reader.unreadable()) == 2


def test_too_many_stop_the_run(damaged):
    data = opened(damaged, max_unreadable=0.03)
    first, second = (data.source.names.index(name) for name in ("03.png", "07.png"))
    data[SampleKey(first, 0, 0)]
    data[SampleKey(first, 1, 0)]  # the same file counts once
    with pytest.raises(ValueError) as caught:
        data[SampleKey(second, 0, 0)]
    text = str(caught.value)
    assert f"{damaged}: 2 of {len(data)} images ({2 / len(data):.1%})" in text and "\n" not in text
    assert re.search("3.0% .*data.max_unreadable.*: 03.png: .*; 07.png: .*; repair or remove them", text)
    assert text.endswith("or raise --data.max-unreadable")


def test_no_more_than_five_are_named(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_bytes(encoded(plain()) if i == 0 else b"")
    data = opened(tmp_path, max_unreadable=0.3)
    with pytest.raises(ValueError) as caught:
        for i in range(len(data)):
            data[SampleKey(i, 0, 0)]
    assert str(caught.value).count(".png: ") == 5


def test_the_search_for_a_fallback_ends(damaged):
    data = opened(damaged, max_unreadable=1)
    for name in data.source.names:
        (damaged / name).write_bytes(b"")
    with pytest.raises(ValueError, match="32 images in a row .*; repair or remove them"):
        data[SampleKey(0, 0, 0)]
