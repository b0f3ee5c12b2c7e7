"""Looking at a set before training on it, and files that were changed at random."""

import io
import random
import resource
import shutil
from pathlib import Path

import check_data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import encoded, plain, train
from PIL import Image, ImageDraw

from ldm.config import CONFIGS, relative
from ldm.data.inspect import find_duplicates, inspect_image, signature
from ldm.data.quarantine import quarantine
from ldm.data.sources.folder import open_images
from ldm.imaging import MAX_MEGAPIXELS, decode_reduced

RECIPE = ["--config", str(CONFIGS / "shapes/clip.yaml")]


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
    sheet = tmp_path / "sheet.png"
    check_data.main([str(folder), "--size", "60", *RECIPE, "--contact-sheet", str(sheet), "--sheet-images", "9"])
    report = capsys.readouterr().out
    for line in (
        "12 images, 1 unreadable\n  sub/broken.png: not a PNG, JPEG or WEBP",
        "for a training at 60 pixels (--size), whose text tower reads 20 tokens (clip.context_length of ",
        "shorter side from 32 to 64 pixels, median 64; 1 below 60",
        "width to height from 1.50 to 1.50, median 1.50",
        "1 images look like another one\n",
        "2 images without a caption\n  sub/again.jpg\n  sub/broken.png\n",
        "1 images with a caption of over 20 tokens, which is cut\n  04.png (102)",
    ):
        assert line in report
    assert "03.png = sub/again.jpg" in report or "sub/again.jpg = 03.png" in report
    with Image.open(sheet) as image:
        assert image.size == (8 * 136 - 8, 2 * 194 - 8)
        assert image.getpixel((64, 10)) == (128, 128, 128) != image.getpixel((64, 64))  # wide images are not stretched
    assert (folder / "sub/broken.png").exists()


@pytest.mark.parametrize(
    ("recipe", "flags", "size", "tokens", "origin"),
    [
        (None, [], 64, 77, "clip.context_length of {}/images-64/clip.yaml"),
        ("shapes/clip", [], 32, 20, "clip.context_length of {}/shapes/clip.yaml"),
        ("shapes/clip", ["--max-tokens", "19"], 32, 19, "--max-tokens"),
        ("shapes/ldm", [], 32, 20, "clip.context_length of {}/shapes/clip.yaml"),
        ("emoji/vae", [], 64, 32, "clip.context_length of {}/emoji/clip.yaml"),
        ("sdxl/ldm", [], 1024, 77, "text.model ViT-L-14-quickgelu of {}/sdxl/ldm.yaml"),
        ("images-256/vae", [], 256, 77, "text.model ViT-H-14 of {}/images-256/ldm.yaml"),
    ],
)
def test_captions_are_checked_against_the_tower_of_the_recipe(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str | None,
    flags: list[str],
    size: int,
    tokens: int,
    origin: str,
) -> None:
    """A caption that fits exactly is not cut; one more token is. The size is the recipe's, too."""
    for number, words in enumerate((tokens - 2, tokens - 1)):
        photo(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("red " * words)
    file = CONFIGS / f"{recipe or 'images-64/clip'}.yaml"  # which is the default
    check_data.main([str(tmp_path), *(["--config", str(file)] if recipe else []), *flags])
    report, origin = capsys.readouterr().out, origin.format(relative(CONFIGS))
    assert f"{size} pixels ({relative(file)}), whose text tower reads {tokens} tokens ({origin})\n" in report
    assert f"\n1 images with a caption of over {tokens} tokens, which is cut\n  1.png ({tokens + 1})\n" in report


def test_captions_are_checked_against_the_tower_of_a_run(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration says which: here the newest tower beside it. Pixels alone have none."""
    photo(1).save(tmp_path / "1.png")
    photo(2).save(tmp_path / "2.png")
    check_data.main([str(tmp_path), "--config", str(tiny_runs / "ldm/config.yaml")])
    assert f"reads 24 tokens (local-dir:{tiny_runs}/clip/model)" in capsys.readouterr().out
    (tmp_path / "ldm.yaml").write_text("text: {model: none}")
    check_data.main([str(tmp_path), "--config", str(tmp_path / "ldm.yaml")])
    report = capsys.readouterr().out
    assert "without a text tower" in report and "tokens" not in report
    (tmp_path / "ldm.yaml").write_text("text: {model: ViT-X}\ndata: {resolution: 1}")
    with pytest.raises(SystemExit, match=r"text.model 'ViT-X' is not in open_clip: pass one"):
        check_data.main([str(tmp_path), "--config", str(tmp_path / "ldm.yaml")])
    with pytest.raises(SystemExit, match=r"ldm.yaml: data: resolution: .* greater than or equal to 8"):
        check_data.main([str(tmp_path), "--max-tokens", "9", "--config", str(tmp_path / "ldm.yaml")])


# Moving unreadable files out of the folder.


def test_a_quarantine_is_filled_when_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the texts that belong to its images alone, and only to a place where it replaces nothing."""
    for sheet in ("sheet", "sheet.xyz", "sub"):
        with pytest.raises(SystemExit, match=f"--contact-sheet .*{sheet} names no image file: .*sheet.png"):
            check_data.main([str(folder), *RECIPE, "--contact-sheet", str(folder / sheet)])
    with pytest.raises(SystemExit, match="--quarantine .*/bad is inside of .*: pass a folder elsewhere"):
        check_data.main([str(folder), *RECIPE, "--quarantine", str(folder / "bad")])
    with pytest.raises(SystemExit, match="--quarantine: shapes is not a folder of images"):
        check_data.main(["shapes", *RECIPE, "--quarantine", str(tmp_path / "bad")])
    for name in ("sub/broken.txt", "sub/broken.png.TXT", "sub/twin.txt"):
        (folder / name).write_text("x")
    (folder / "sub/twin.png").write_bytes(b"no image")
    photo(11).save(folder / "sub/twin.jpg")
    check_data.main([str(folder), *RECIPE, "--quarantine", str(tmp_path / "bad")])
    assert "2 images and 2 texts moved to" in capsys.readouterr().out
    names = {path.relative_to(tmp_path / "bad").as_posix() for path in (tmp_path / "bad").rglob("*.*")}
    assert names == {"sub/broken.png", "sub/broken.txt", "sub/broken.png.TXT", "sub/twin.png"}
    assert not (folder / "sub/broken.png").exists() and (folder / "sub/twin.txt").exists()
    (folder / "sub/broken.png").write_bytes(b"another one")
    with pytest.raises(SystemExit, match=r"--quarantine: .*/bad/sub/broken.png exists already: pass another folder"):
        check_data.main([str(folder), *RECIPE, "--quarantine", str(tmp_path / "bad")])
    assert (tmp_path / "bad/sub/broken.png").read_bytes() == b"no image"


CSV = (
    'file_name,text,n\r\ngood.png,"two\r\nlines, é",1\r\n./sub/bad.png,x,2\r\n\r\n'
    '"SUB\\bad.png",again,3\r\nsub.png,"sub/bad.png?",4'
)
MOVED_CSV = 'file_name,text,n\r\n./sub/bad.png,x,2\r\n"SUB\\bad.png",again,3\r\n'
JSONL = '{"file_name": "sub/bad.png", "text": "é"}\n{"text": "é", "file_name": "b.png"}\n\n{"file_name": "c.png"}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text", "moved"),
    [
        ("metadata.csv", CSV, MOVED_CSV),
        ("Metadata.CSV", CSV.replace(",", ";"), MOVED_CSV.replace(",", ";")),
        ("metadata.csv", "sep=;\n" + CSV.replace(",", ";"), "sep=;\n" + MOVED_CSV.replace(",", ";")),
        ("metadata.csv", CSV.replace(',"two', ', "two'), MOVED_CSV),
        ("metadata.jsonl", JSONL, JSONL.splitlines(keepends=True)[0]),
    ],
)
def test_the_rows_of_a_table_move_along(tmp_path: Path, name: str, text: str, moved: str, encoding: str) -> None:
    """Those of a moved image, in any spelling of its path; all others stay as they were, to the byte."""
    folder, target = tmp_path / "photos", tmp_path / "bad"
    (folder / "sub").mkdir(parents=True)
    for image in ("good.png", "b.png", "sub/bad.png"):
        (folder / image).write_bytes(b"no image")
    (folder / name).write_bytes(text.encode(encoding))
    lines = list(quarantine(folder, target, ["sub/bad.png"], ["sub/bad.png", "good.png", "b.png"]))
    assert (target / name).read_bytes() == moved.encode(encoding)
    rows = moved.splitlines(keepends=True)["csv" in name.lower() :]
    rows = rows[moved.startswith("sep") :]
    for row in rows:
        text = text.replace(row, "", 1)
    assert (folder / name).read_bytes() == text.encode(encoding)
    assert f"{len(rows)} rows of {folder / name} moved to {target / name}" in lines
    assert (target / "sub/bad.png").is_file() and (folder / "good.png").is_file()


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_table_that_loses_all_rows_is_moved(tmp_path: Path, name: str) -> None:
    """One without a row would be refused afterwards."""
    folder, target = tmp_path / "photos", tmp_path / "bad"
    (folder / "sub").mkdir(parents=True)
    for image in ("good.png", "sub/bad.png"):
        (folder / image).write_bytes(b"no image")
    table, texts = (
        folder / "sub" / name,
        {"csv": "file_name,text\nbad.png,x\n\n,\n", "jsonl": '{"file_name": "bad.png"}\n\n'},
    )
    if text := texts.get(name.split(".")[1]):
        table.write_text(text)
    else:
        pq.write_table(pa.Table.from_pylist([{"file_name": "bad.png", "text": "x"}]), table)
    list(quarantine(folder, target, ["sub/bad.png"], ["good.png", "sub/bad.png"]))
    assert not table.exists() and (target / "sub" / name).is_file()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["good.png"]


def test_the_rows_of_a_parquet_table_move_along(tmp_path: Path) -> None:
    """With their columns; a table that names none of the images stays as it is."""
    folder, target = tmp_path / "photos", tmp_path / "bad"
    (folder / "train").mkdir(parents=True)
    (folder / "metadata.csv").write_text("file_name,text\nx.png,x\n")
    (folder / "train/bad.png").write_bytes(b"no image")
    rows = [{"file_name": f"{name}.png", "caption": [name, "x"], "n": n} for n, name in enumerate(("good", "bad"))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train/metadata.parquet")
    list(quarantine(folder, target, ["train/bad.png"], ["train/bad.png"]))
    assert pq.read_table(folder / "train/metadata.parquet").to_pylist() == rows[:1]
    assert pq.read_table(target / "train/metadata.parquet").to_pylist() == rows[1:]
    assert not (target / "metadata.csv").exists() and (folder / "metadata.csv").read_text().endswith("x.png,x\n")


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_a_folder_is_clean_after_its_quarantine(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    """Nothing has to be edited by hand before the training; also where a folder has its own splits."""
    root = folder / split
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*g"))
    if split:
        (folder / "train").mkdir()
        (folder / "test").mkdir()
        shutil.copytree(folder / "sub", root / "sub")
        shutil.copy(folder / "01.png", folder / "train")
        shutil.copy(folder / "02.png", folder / "test")
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.*g")]
    (root / "metadata.csv").write_text("\n".join(["file_name,text", *(f"{name},x" for name in names)]))
    check_data.main([str(folder), *RECIPE, "--quarantine", str(tmp_path / "bad")])
    assert (tmp_path / "bad" / split / "sub/broken.png").exists() and not (root / "sub/broken.png").exists()
    capsys.readouterr()
    check_data.main([str(folder), *RECIPE, "--quarantine", str(tmp_path / "bad")])
    assert ", 0 unreadable" in capsys.readouterr().out


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
    check_data.main([str(folder), *RECIPE])
    report = capsys.readouterr().out
    assert "JPEG or WEBP: caf\\udce9.tif" in report and "caf\\udce9.png: not a PNG" in report
    assert "02.png = zoo\\udce9.png" in report
    train("vae", tmp_path / "vae", "--data.source", str(folder), "--data.max-unreadable", "1")
    assert "replaced by others:\ncaf\\udce9.png: not a PNG" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="caf.*data.max-unreadable"):
        train("vae", tmp_path / "other", "--data.source", str(folder))
    check_data.main([str(folder), *RECIPE, "--quarantine", str(tmp_path / "bad")])
    assert (tmp_path / "bad/caf\udce9.png").exists()


def test_a_folder_must_be_passed() -> None:
    with pytest.raises(SystemExit, match="pass a folder, .*scripts/check_data.py"):
        check_data.main(RECIPE)


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


def duplicates(*images: Image.Image) -> list[list[int]]:
    return find_duplicates([signature(image) for image in images])


def flag(*stripes: str) -> Image.Image:
    image = Image.new("RGB", (96, 64))
    for number, color in enumerate(stripes):
        image.paste(color, (32 * number, 0, 32 * number + 32, 64))
    return image


def book(color: str, seed: int = 0) -> Image.Image:
    """A drawing on white: its cover, a spine and some pages."""
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((20 + seed, 12, 108, 116), 6, color)
    draw.rectangle((20 + seed, 100, 108, 108), "ivory")
    return image


def test_images_that_look_alike() -> None:
    """The same image in another size, format or quality, drawn or photographed."""
    for image in (photo(1), photo(2, (300, 170)), book("green"), book("orange"), flag("blue", "white", "red")):
        small = image.resize((image.width // 2, image.height // 2))
        jpegs = [Image.open(io.BytesIO(encoded(image, format, quality=40))) for format in ("JPEG", "WEBP")]
        assert duplicates(image, photo(99), small, *jpegs) == [[0, 2, 3, 4]]


def test_images_of_other_colors_do_not_look_alike() -> None:
    colors = ("green", "orange", "blue", "black", "dimgrey", "silver", "gold", "limegreen")
    assert duplicates(*map(book, colors)) == []
    flags = [("blue", "white", "red"), ("green", "white", "red"), ("green", "white", "orange"), ("blue", "gold", "red")]
    assert duplicates(*(flag(*stripes) for stripes in flags)) == []
    assert duplicates(*(plain(color) for color in ("red", "white", "black", "grey", "green", "white"))) == [[1, 5]]
    assert duplicates(*map(photo, range(200))) == [] == duplicates()
    assert duplicates(*(plain("red", size) for size in ((64, 64), (64, 48), (33, 32), (4000, 1)))) == [[0, 2]]


def test_duplicates_are_found_among_many() -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (2000, 433)).astype(np.int16)
    numbers[[7, 1500]] = numbers[[1999, 3]]
    numbers[1200] = numbers[3] ^ 7
    assert find_duplicates(list(numbers)) == [[3, 1200, 1500], [7, 1999]]


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
