"""What lies in a folder of images: captions in any table or text file, splits, links, and what is left out."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from helpers import encoded, plain, write_tar

from ldm.data import DataConfig, open_dataset
from ldm.data.sources.shard import read_rows
from ldm.data.sources.sharded import is_sharded

THREE = ("0.png", "1.png", "2.png")


class Opened(NamedTuple):
    """Both splits of a folder: the captions of each image, and what is said of it."""

    train: dict[str, list[str]]
    test: dict[str, list[str]]
    summary: str
    notes: list[str]

    @property
    def captions(self) -> dict[str, list[str]]:
        return {name: texts for name, texts in {**self.train, **self.test}.items() if texts}


def fill(root: Path, *names: str, **files: str | bytes) -> Path:
    """Write images, and files whose names hold `__` for a dot and `___` for a slash."""
    contents = {name.replace("___", "/").replace("__", "."): content for name, content in files.items()}
    for name in names:
        contents[name] = encoded(plain(), "PNG" if name.lower().endswith("png") else "JPEG")
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path) -> Opened:
    parts = [open_dataset(DataConfig(source=str(root), resolution=8), split, seed=0) for split in ("train", "test")]
    found = [dict(zip(part.source.names, map(list, part.source.captions), strict=True)) for part in parts]
    summary, *notes = parts[0].describe().splitlines()
    return Opened(*found, summary, notes)


def refused(root: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(opened: Opened, *words: str) -> bool:
    """Whether one of the lines has all of these."""
    return any(all(word in note for word in words) for note in opened.notes)


# Tables.


def test_commas_outside_of_quotes_are_the_captions(tmp_path: Path) -> None:
    rows = 'file_name,text\n0.png,"a cat, asleep"\n1.png,a cat, red, big\n2.png,a "big, red" cat\n'
    opened = read(fill(tmp_path, *THREE, metadata__csv=rows))
    assert opened.captions == {"0.png": ["a cat, asleep"], "1.png": ["a cat, red, big"], "2.png": ['a "big, red" cat']}
    assert said(opened, "2 captions hold the delimiter outside of quotes", "line 3 of metadata.csv")


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ("file_name,text,size\n0.png,a,8\n1.png,a cat, red,8\n", "line 3 has 4 columns, the header 3; .* quotes"),
        ("file_name,size,text\n0.png,8,a cat, red\n", "line 2 has 4 columns, the header 3; .* quotes"),
        ('text,file_name\n"a\ncat",0.png\na cat, red,1.png\n', "line 4 has 3 columns, the header 2; .* quotes"),
        ('file_name,text\n0.png,a\n1.png,"b\n2.png,c\n', "line 3 is not CSV .*; is a quote left open there"),
        ("0.png,a\n1.png,b\n", "no column file_name.* 0.png, a; write each image's path"),
        ("file_name;words\n0.png;a\n", "no caption column; call it caption, text or prompt"),
        ("file_name,text,Text\n0.png,a,b\n", "several columns are called text; rename or remove"),
        ("file_name,text\n,a\n", r"names 1 files .* \(no path\); .* remove their lines"),
        ("file_name,words\n0.png,a\n", "no caption column; call it caption, text or prompt"),
        ("file_name,text\n7.png,a\n8.png,b\n", "names 2 files .* 7.png, 8.png; .* remove their lines"),
        ("file_name,text\n0.png,café\n".encode("cp1252"), "line 2 is not UTF-8 text; save it as UTF-8"),
        ("file_name,text\n0.png,a\n".encode("utf-16"), "line 1 is not UTF-8 text; save it as UTF-8"),
        ("file_name,text\n0.png,a\n".encode("utf-16-le"), "line 1 is UTF-16.* text; save it as UTF-8"),
        ("file_name,text\n0.png,a\n".encode("utf-16-be"), "line 1 is UTF-16.* text; save it as UTF-8"),
    ],
)
def test_tables_that_are_refused_name_the_line(tmp_path: Path, rows: str | bytes, want: str) -> None:
    text = refused(fill(tmp_path, *THREE, metadata__csv=rows))
    assert str(tmp_path / "metadata.csv") in text and re.search(want, text)


@pytest.mark.parametrize(
    "rows",
    [
        "file_name;text\n0.png;a cat, red\n1.png;b\n",
        "file_name\ttext\r\n0.png\ta cat, red\r\n1.png\tb\r\n",
        '"File Name","Caption"\r"0.png","a cat, red"\r"1.png",b\r',
        'sep=;\nfile_name;text\n0.png;"a cat, red"\n1.png;b\n',
        'file_name, text\n0.png, "a cat, red"\n1.png, b\n',
        'file_name,text\n0.png, "a cat,\nred"\n1.png,b\n',
        '\ufefffilename,TEXT,,\n\n0.png,"a cat, red",,\n,,,\n , ,\n1.png,b\n,\n,,,,,,,\n',
    ],
)
def test_tables_of_other_tools(tmp_path: Path, rows: str) -> None:
    opened = read(fill(tmp_path, *THREE, metadata__csv=rows))
    assert opened.captions == {"0.png": ["a cat, red"], "1.png": ["b"]}
    assert "captions from metadata.csv" in opened.summary and "2 captioned" in opened.summary
    assert opened.notes == ["1 images without a caption: 2.png"]


def test_commas_after_spaces_are_the_captions(tmp_path: Path) -> None:
    opened = read(fill(tmp_path, *THREE, metadata__csv='file_name, text\n0.png, "a, b"\n1.png, a cat, red\n2.png, c\n'))
    assert opened.captions == {"0.png": ["a, b"], "1.png": ["a cat, red"], "2.png": ["c"]}
    assert said(opened, "1 captions hold the delimiter outside of quotes", "line 3 of metadata.csv")


def test_a_separator_of_lines_that_is_none_of_a_table(tmp_path: Path) -> None:
    opened = read(fill(tmp_path, *THREE, metadata__csv="file_name,text\n0.png,a\x85cat\u2028sat\n1.png,b, c\n"))
    assert opened.captions == {"0.png": ["a cat sat"], "1.png": ["b, c"]} and said(opened, "line 3 of metadata.csv")


def test_what_is_not_read_of_a_table_is_told(tmp_path: Path) -> None:
    """Columns, also a second one of captions, and rows of files that are not read."""
    rows = "file_name,split,text,caption\n0.png,test,a,b\n3.bmp,train,c,d\n"
    opened = read(fill(tmp_path, *THREE, metadata__csv=rows, **{"3__bmp": b"x"}))
    assert opened.captions == {"0.png": ["b"]}
    assert said(opened, "2 columns of tables skipped: split, text") and said(opened, "1 skipped", "3.bmp", "PNG")


def test_json_lines_of_other_tools(tmp_path: Path) -> None:
    rows = '\ufeff{"Image": "0.png", "Text": "a"}\r\n\r\n{"image": "0.png", "text": "b", "Text": "x"}'
    opened = read(fill(tmp_path, *THREE, METADATA__JSONL=rows))
    assert opened.captions == {"0.png": ["a", "b"]} and "1 captioned by 2 captions" in opened.summary
    (tmp_path / "METADATA.JSONL").write_text('[{"file_name": "0.png", "text": "a"}]')
    assert re.search("line 1 is not a JSON object; write one object in each line", refused(tmp_path))


def test_paths_of_other_systems(tmp_path: Path) -> None:
    images = ("img/0.png", "img/1.JPG", "a/cafe\u0301.png", "x/A.png", "x/a.png")
    rows = ["img\\0.png,a", ".\\img\\1.jpg,b", "./A/caf\u00e9.png,c", "img\\..\\x/a.png,d"]
    opened = read(fill(tmp_path, *images, metadata__csv="\n".join(["file_name,text", *rows])))
    assert opened.captions == {"img/0.png": ["a"], "img/1.JPG": ["b"], "a/cafe\u0301.png": ["c"], "x/a.png": ["d"]}
    for name in ("X/A.PNG", "..\\x\\a.png", f"{tmp_path}/x/a.png", "C:\\x\\a.png"):  # one of several, or elsewhere
        fill(tmp_path, metadata__csv=f"file_name,text\n{name},x")
        assert re.search("names 1 files .*; .* paths relative to", refused(tmp_path))


def test_tables_in_subfolders_and_beside_text_files(tmp_path: Path) -> None:
    """Each names the files of its own folder; of two in a folder one is read; text files caption what is left."""
    opened = read(
        fill(
            tmp_path,
            *("0.png", "a/0.png", "a/1.png", "a/b/0.png"),
            metadata__jsonl=json.dumps({"file_name": "0.png", "text": "top"}),
            metadata__csv="file_name,text\n0.png,x",
            a___metadata__csv="file_name,text\n0.png,zero\nb/0.png,deep",
            a___0__txt="x",
            a___1__txt="one",
        )
    )
    want = {"0.png": ["top"], "a/0.png": ["zero"], "a/1.png": ["one"], "a/b/0.png": ["deep"]}
    assert opened.captions == want and "a/metadata.csv" in opened.summary and "4 captioned" in opened.summary
    assert said(opened, "1 skipped tables", ": metadata.csv") and said(opened, "1 skipped texts", "a/0.txt")


# Text files.


def test_text_files_are_found_however_they_are_named(tmp_path: Path) -> None:
    opened = read(
        fill(
            tmp_path,
            *("IMG.JPG", "0.jpg", "1.png", "2.png", "3.png", "3.jpg", "a.png", "A.png"),
            **{
                "IMG__TXT": "a",
                "0__jpg__txt": "b",
                "1__Caption": "c",
                "2__PNG__TXT": "d",
                "3__txt": "e",
                "a__txt": "f",
            },
            readme__txt="no caption",
            **{"4__caption": "no image"},
        )
    )
    assert opened.captions == {
        **{"IMG.JPG": ["a"], "0.jpg": ["b"], "1.png": ["c"], "2.png": ["d"], "3.png": ["e"], "3.jpg": ["e"]},
        "a.png": ["f"],
    }
    assert said(opened, "2 skipped texts", "4.caption, readme.txt") and said(opened, "1 images without", "A.png")
    (tmp_path / "0.jpg.txt").write_bytes("one\ncafé".encode("cp1252"))
    assert f"{tmp_path}/0.jpg.txt: line 2 is not UTF-8 text; save it as UTF-8" in refused(tmp_path)


def test_a_caption_of_a_shard_is_found_however_it_is_named(tmp_path: Path) -> None:
    image = encoded(plain())
    pyarrow.parquet.write_table(pyarrow.table({"image": [image], "Caption": ["a"]}), tmp_path / "a.parquet")
    assert [row.captions for row in read_rows(str(tmp_path / "a.parquet"))] == [["a"]]
    write_tar(tmp_path / "a.tar", [("0.png", image), ("0.png.txt", b"a"), ("1.JFIF", image), ("1.TXT", b"b")])
    assert [row.captions for row in read_rows(str(tmp_path / "a.tar"))] == [["a"], ["b"]]


# Splits.


@pytest.mark.parametrize(
    ("train", "held_out", "kind"),
    [
        ("train", "validation", "validation"),
        ("train", "val", "validation"),
        ("Train", "Test", "test"),
        ("training", "dev", "validation"),
        ("images/train2017", "images/val2017", "validation"),
        ("set/train/cats", "set/testing/cats", "test"),
        ("train/test tubes", "eval-images/x", "test"),
    ],
)
def test_what_a_folder_holds_out_is_held_out(tmp_path: Path, train: str, held_out: str, kind: str) -> None:
    """With a table in each split, one above both, or one in each subfolder."""
    images = [f"{train}/0.png", f"{train}/1.png", f"{held_out}/2.png"]
    fill(tmp_path, *images)
    want = ({name: [name] for name in images[:2]}, {images[2]: [images[2]]})
    for depth in range(3):
        for table in tmp_path.rglob("metadata.csv"):
            table.unlink()
        for image in images:
            folder = tmp_path.joinpath(*image.split("/")[: min(depth, image.count("/"))])
            with (folder / "metadata.csv").open("a") as file:
                file.write("" if file.tell() else "file_name,text\n")
                file.write(f"{(tmp_path / image).relative_to(folder).as_posix()},{image}\n")
        opened = read(tmp_path)
        assert (opened.train, opened.test) == want and said(opened, "held out: the 1 images", kind)
        assert "3 captioned" in opened.summary


def test_of_several_held_out_splits_one_is_used_and_no_other_is_trained_on(tmp_path: Path) -> None:
    opened = read(fill(tmp_path, "train/0.png", "train/1.png", "val/2.png", "test/3.png", "4.png"))
    assert [*opened.train] == ["train/0.png", "train/1.png"] and [*opened.test] == ["test/3.png"]
    assert said(opened, "held out", "test") and said(opened, "2 images skipped", "val/2.png", "4.png")


def test_names_that_all_say_a_split_are_splits(tmp_path: Path) -> None:
    opened = read(fill(tmp_path, "train_0.png", "train_1.png", "a/val-2.png"))
    assert [*opened.train] == ["train_0.png", "train_1.png"] and [*opened.test] == ["a/val-2.png"]
    opened = read(fill(tmp_path, "b.png"))
    assert len(opened.train) + len(opened.test) == 4 and not opened.notes


def test_a_folder_of_one_split_is_divided_and_that_is_told(tmp_path: Path) -> None:
    for number, (folder, told) in enumerate({"train": 0, "test": 1}.items()):
        opened = read(fill(tmp_path / str(number), f"{folder}/0.png", f"{folder}/1.png"))
        assert (len(opened.train), len(opened.test)) == (1, 1)
        assert len(opened.notes) == told == said(opened, "2 images", "test", "none elsewhere")


@pytest.mark.parametrize(("held_out", "kind"), [("test", "test"), ("val", "validation")])
def test_a_held_out_folder_beside_images_is_held_out(tmp_path: Path, held_out: str, kind: str) -> None:
    opened = read(fill(tmp_path, "0.png", "cats/1.png", f"{held_out}/2.png"))
    assert [*opened.train] == ["0.png", "cats/1.png"] and [*opened.test] == [f"{held_out}/2.png"]
    assert said(opened, f"held out: the 1 images of the {kind} split")


# Links, and files that are not read.


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", "z/0.png", "z/deep/1.png")
    fill(tmp_path / "other", "2.png", "3.png", "metadata.csv")
    fill(tmp_path / "other", metadata__csv="file_name,text\n2.png,two")
    for link, target in {
        **{"a": root / "z", "z/loop": root, "z/deep/up": tmp_path, "b": tmp_path / "other", "c": tmp_path / "other"},
        **{"b/back": root, "self": "self"},
    }.items():
        try:
            os.symlink(target, root / link)
        except OSError:
            pytest.skip("this system makes no links")
    opened = read(root)
    assert sorted({**opened.train, **opened.test}) == ["b/2.png", "b/3.png", "z/0.png", "z/deep/1.png"]
    assert opened.captions == {"b/2.png": ["two"]}
    assert said(opened, "5 linked folders skipped", "a", "c", "z/loop", "z/deep/up", "b/back")


def test_the_working_folder_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path, "0.png", "a/1.png"))
    assert sorted([*read(Path("."))[0], *read(Path("."))[1]]) == ["0.png", "a/1.png"]


def test_suffixes_that_are_read_and_all_others_are_counted(tmp_path: Path) -> None:
    names = ("a.jfif", "b.jpe", "c.jif", "d.apng", "e.JPG", "f.JFIF")
    others = {"a__bmp": b"", "b__tiff": b"", "c__TIFF": b"", "d__gif": b"", "e__avif": b"", "f__heic": b""}
    tables = {"metadata1000__jsonl": b"{}", "metadata__json": b"[]", "metadata__tsv": b""}
    opened = read(fill(tmp_path / "a", *names, **others, **tables, LICENSE=b"", film__mp4=b""))
    assert sorted([*opened.train, *opened.test]) == sorted(names)
    assert said(opened, "6 skipped", "not PNG, JPEG or WEBP", "1 .bmp", "2 .tiff", "1 .gif", "1 .avif", "1 .heic")
    assert said(opened, "3 skipped tables", "metadata.jsonl, metadata.csv", "metadata1000.jsonl", "metadata.json")
    assert said(opened, "2 skipped other files", "LICENSE", "1 .mp4")
    text = refused(fill(tmp_path / "b", **others))
    assert "no PNG, JPEG or WEBP image; put images there" in text and "2 .tiff" in text


def test_a_table_above_images_is_no_shard(tmp_path: Path) -> None:
    assert not is_sharded(str(fill(tmp_path, "train/cats/0.png", labels__parquet=b"")))
