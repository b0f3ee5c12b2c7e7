"""Looking at a set before training on it, and files that were changed at random."""

import io
import random
import resource
from pathlib import Path

import data
import numpy as np
import pytest
from PIL import Image

from ldm.data.inspect import difference_hash
from ldm.data.sources import folder


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth random colours, so that it looks like nothing else."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 pictures: one again as a small JPEG, one that is none, one with a long caption, two without any."""
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for number in range(10):
        photo(number).save(photos / f"{number:02}.png")
        (photos / f"{number:02}.txt").write_text("word " * (100 if number == 4 else 3))
    photo(3).resize((48, 32)).save(photos / "sub/again.jpg", quality=80)
    (photos / "sub/broken.png").write_bytes(b"no image")
    return photos


def test_the_report_and_the_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.main(
        ["check", str(folder), "--size", "60", "--contact-sheet", str(tmp_path / "sheet.png"), "--sheet-images", "9"]
    )
    told = capsys.readouterr().out
    for line in (
        "12 images, 1 unreadable\n  sub/broken.png: no PNG, JPEG or WEBP image\n",
        "shorter side from 32 to 64 pixels, median 64; 1 below 60, which would be enlarged",
        "width to height from 1.50 to 1.50, median 1.50",
        "1 images look like another one\n",
        "2 images without a caption; 1 with one of over 77 tokens\n  04.png",
    ):
        assert line in told
    assert "03.png = sub/again.jpg" in told or "sub/again.jpg = 03.png" in told
    assert Image.open(tmp_path / "sheet.png").size == (8 * 136 - 8, 2 * 194 - 8)
    assert (folder / "sub/broken.png").exists()


def test_a_quarantine_is_filled_when_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="quarantine .* lies in .* itself: name a folder elsewhere"):
        data.main(["check", str(folder), "--quarantine", str(folder / "bad")])
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *(f"{name},x" for name in names)]))
    data.main(["check", str(folder), "--quarantine", str(tmp_path / "bad")])
    assert (tmp_path / "bad/sub/broken.png").exists() and not (folder / "sub/broken.png").exists()
    assert len(list(folder.rglob("*.png"))) == 10
    assert "metadata.csv may name them still: take their lines out before you train" in capsys.readouterr().out


def test_no_folder_is_told() -> None:
    with pytest.raises(SystemExit, match="name a folder, as in `python scripts/data.py check my_photos`"):
        data.main(["check"])


def test_the_hash_is_of_what_is_seen() -> None:
    assert difference_hash(photo(1)) == difference_hash(photo(1).resize((300, 200)))
    assert len({difference_hash(photo(seed)) for seed in range(200)}) == 200
    assert difference_hash(Image.new("RGB", (9, 9), "red")) != difference_hash(Image.new("RGB", (9, 9), "white"))


@pytest.mark.slow
def test_ten_thousand_changed_files_crash_nothing() -> None:
    """Turned bits, cut and joined files of every format: each is read, or is one line; memory stays bounded."""
    draw, wholes = random.Random(0), []
    for format, options in (("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {})):
        buffer = io.BytesIO()
        photo(7).save(buffer, format, **options)
        wholes.append(buffer.getvalue())
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
            image = folder.decode_image(bytes(content), side=32)
            assert image.mode == "RGB" and image.width * image.height <= folder.MAX_MEGAPIXELS * 1e6
            read += 1
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    assert read > 500 and refused > 2_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 2**10  # KiB: one picture at the cap
