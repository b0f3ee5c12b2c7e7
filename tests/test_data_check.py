"""Looking at a set before training on it, and files that were changed at random."""

import random
import re
import resource
from pathlib import Path

import check_data
import numpy as np
import pytest
from helpers import encoded, train
from PIL import Image

from ldm.data.inspect import difference_hash, inspect_image
from ldm.data.sources.folder import open_images
from ldm.imaging import MAX_MEGAPIXELS, decode_reduced


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth random colours, so that it looks like nothing else."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 files: one image again as a small JPEG, one not an image, one with a long caption, two without a caption."""
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for number in range(10):
        photo(number).save(photos / f"{number:02}.png")
        (photos / f"{number:02}.txt").write_text("word " * (100 if number == 4 else 3))
    photo(3).resize((48, 32)).save(photos / "sub/again.jpg", quality=80)
    (photos / "sub/broken.png").write_bytes(b"no image")
    return photos


def test_the_report_and_the_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_data.main(
        [str(folder), "--size", "60", "--contact-sheet", str(tmp_path / "sheet.png"), "--sheet-images", "9"]
    )
    report = capsys.readouterr().out
    for line in (
        "12 images, 1 unreadable\n  sub/broken.png: not a PNG, JPEG or WEBP",
        "shorter side from 32 to 64 pixels, median 64; 1 below 60",
        "width to height from 1.50 to 1.50, median 1.50",
        "1 images look like another one\n",
        "2 images without a caption; 1 with one of over 77 tokens\n  04.png",
    ):
        assert line in report
    assert "03.png = sub/again.jpg" in report or "sub/again.jpg = 03.png" in report
    assert Image.open(tmp_path / "sheet.png").size == (8 * 136 - 8, 2 * 194 - 8)
    assert (folder / "sub/broken.png").exists()


def test_a_quarantine_is_filled_when_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="--quarantine .*/bad is inside of .*: pass a folder elsewhere"):
        check_data.main([str(folder), "--quarantine", str(folder / "bad")])
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *(f"{name},x" for name in names)]))
    check_data.main([str(folder), "--quarantine", str(tmp_path / "bad")])
    assert (tmp_path / "bad/sub/broken.png").exists() and not (folder / "sub/broken.png").exists()
    assert len(list(folder.rglob("*.png"))) == 10
    assert re.search("metadata.csv may still name them: remove their lines", capsys.readouterr().out)


def test_names_of_another_encoding_are_shown_with_escapes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the report, in what a training prints, and in errors."""
    try:
        (folder / "sub/broken.png").rename(folder / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    photo(1).save(folder / "caf\udce9.tif")
    photo(2).save(folder / "zoo\udce9.png")  # like 02.png
    check_data.main([str(folder)])
    report = capsys.readouterr().out
    assert "JPEG or WEBP: caf\\udce9.tif" in report and "caf\\udce9.png: not a PNG" in report
    assert "02.png = zoo\\udce9.png" in report
    train("vae", tmp_path / "vae", "--data.source", str(folder), "--data.max-unreadable", "1")
    assert "replaced by others:\ncaf\\udce9.png: not a PNG" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="caf.*data.max-unreadable"):
        train("vae", tmp_path / "other", "--data.source", str(folder))
    check_data.main([str(folder), "--quarantine", str(tmp_path / "bad")])
    assert (tmp_path / "bad/caf\udce9.png").exists()


def test_a_folder_must_be_passed() -> None:
    with pytest.raises(SystemExit, match="pass a folder, .*scripts/check_data.py"):
        check_data.main([])


def test_images_of_any_shape_are_shown_whole(tmp_path: Path) -> None:
    """What is hashed and shown is the whole image, at most 128 pixels long, and not enlarged."""
    for name, size in {"a.png": (300, 100), "b.png": (1, 5000), "c.png": (30, 20)}.items():
        photo(1, size).save(tmp_path / name)
    source = open_images(str(tmp_path), "train")
    infos = {source.names[i]: inspect_image(source, i, thumbnail=True) for i in range(len(source.names))}
    expected = {"a.png": ((100, 300), (128, 43)), "b.png": ((5000, 1), (1, 128)), "c.png": ((20, 30), (30, 20))}
    assert len(infos) == 2
    for name, info in infos.items():
        assert info.thumbnail is not None and (info.size, info.thumbnail.size) == expected[name]


def test_the_hash_is_of_how_an_image_looks() -> None:
    assert difference_hash(photo(1)) == difference_hash(photo(1).resize((300, 200)))
    assert len({difference_hash(photo(seed)) for seed in range(200)}) == 200
    assert difference_hash(Image.new("RGB", (9, 9), "red")) != difference_hash(Image.new("RGB", (9, 9), "white"))


@pytest.mark.slow
def test_ten_thousand_changed_files_crash_nothing() -> None:
    """Turned bits, cut and joined files of every format: each is read, or is one line; memory stays bounded."""
    draw, wholes = random.Random(0), []
    for format, options in (("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {})):
        wholes.append(encoded(photo(7), format, **options))
    before, read, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0
    for number in range(10_000):
        content = bytearray(wholes[number % len(wholes)])
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            content[draw.choice((draw.randrange(len(content)), draw.randrange(64)))] ^= 1 << draw.randrange(8)
        if number % 3 == 1:
            del content[draw.randrange(len(content)) :]
        elif number % 3 == 2:
            content += wholes[draw.randrange(len(wholes))][: draw.randrange(400)]
        try:
            image, (height, width) = decode_reduced(bytes(content), channels=3, side=32)
            assert image.mode == "RGB" and image.width * image.height <= height * width <= MAX_MEGAPIXELS * 1e6
            read += 1
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    assert read > 500 and refused > 2_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 2**10  # KiB: one image at the cap
