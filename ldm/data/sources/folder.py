"""A folder of images, with captions in a table, in text files of the same names, or without; and what else is local."""

import csv
import io
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet

from ldm.data.sources.base import CAPTION_COLUMNS, Split, first_names, hash_split, one_line, parse_captions
from ldm.data.sources.encoded import SUFFIXES, EncodedSource
from ldm.data.sources.table import open_hub, open_parquet

OTHER_SUFFIXES = (".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".jxl", ".jp2", ".ppm", ".dcm", ".nii", ".gz")
SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_images(source: str, split: Split) -> EncodedSource:
    """One split of a folder, a parquet file or a hub data set. ValueError: no image, captions of missing files."""
    path = Path(os.path.expanduser(source))  # which leaves an unknown user as it is
    if path.is_dir():
        has_splits = (path / "train").is_dir() and (path / "test").is_dir() and find_metadata(path) is None
        return _open_folder(path / split, None) if has_splits else _open_folder(path, split)
    if path.is_file() and path.suffix == ".parquet":
        return open_parquet(path, split)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return open_hub(source, split)
    raise ValueError(
        f"data.source {source}: no such folder or parquet file; "
        "give --data.source an existing one, a hub id org/name, or shapes, pairs or emoji"
    )


def find_metadata(root: Path) -> Path | None:
    """The table of captions in a folder, if there is one."""
    return next((root / name for name in METADATA_FILES if (root / name).is_file()), None)


def _open_folder(root: Path, split: Split | None) -> EncodedSource:
    """A split, or all, of the images below a folder."""
    files = _list_files(root)
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        content = "holds no PNG, JPEG or WEBP image" if files else "is empty"
        raise ValueError(f"{root}: this folder {content}; put images there or choose another --data.source")
    table = find_metadata(root)
    captions, origin = _table_captions(table, images) if table else _sidecar_captions(root, images, set(files))
    described = f"captions from {origin}, {sum(map(bool, captions.values())):,} captioned" if origin else "no captions"
    others = [name for name in files if name.lower().endswith(OTHER_SUFFIXES)]
    if others:
        described += f", {len(others):,} skipped that are not PNG, JPEG or WEBP: {first_names(others, 3)}"
    names = images if split is None else [images[i] for i in hash_split(images, split)]
    return EncodedSource(
        names=names,
        images=[root / name for name in names],
        captions=[captions.get(name, []) for name in names],
        description=f"images: {len(images):,} files in {root}/, {described}",
    )


def _list_files(root: Path) -> list[str]:
    """Relative paths of all files below `root`, in order, without hidden ones."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _sidecar_captions(root: Path, images: list[str], files: set[str]) -> tuple[dict[str, list[str]], str]:
    """Captions by the name of their image, from text files of the same names, and their kinds."""
    captions, used = {}, set()
    for name in images:
        stem = name.rsplit(".", 1)[0]
        suffix = next((suffix for suffix in SIDECAR_SUFFIXES if stem + suffix in files), None)
        if suffix:
            captions[name] = parse_captions(_read_text(root / (stem + suffix)), name)
            used.add(f"*{suffix}")
    return captions, " and ".join(sorted(used))


def _table_captions(path: Path, images: list[str]) -> tuple[dict[str, list[str]], str]:
    """Captions by the name of their image, and where they come from. An image that is listed twice has two."""
    rows = _read_table(path)
    columns = {column for row in rows for column in row}
    if "file_name" not in columns:
        raise ValueError(f"{path}: no column file_name, or no row; write each image's path in the folder there")
    column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"{path}: no caption column; call it caption, text or prompt")
    captions: dict[str, list[str]] = {}
    for row in rows:
        name = PurePosixPath(str(row.get("file_name"))).as_posix()
        captions.setdefault(name, []).extend(parse_captions(row.get(column), f"{path}: {one_line(name)}"))
    missing = sorted(set(captions) - set(images))
    if missing:
        raise ValueError(
            f"{path} names {len(missing):,} files that are not there as PNG, JPEG or WEBP: {first_names(missing)}; "
            f"add them, remove their lines, or write paths relative to {path.parent}"
        )
    return captions, f"{path.name} column `{column}`"


def _read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        lines = enumerate(_read_text(path).split("\n"), 1)
        return [_parse_row(line, f"{path}: line {number}") for number, line in lines if line.strip()]
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
        try:
            return list(rows)
        except csv.Error as error:
            where = f"{path}: line {rows.reader.line_num}"
            raise ValueError(f"{where} is not CSV ({error}); is a quote left open there?") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
        raise ValueError(f"{path}: not a parquet file, or a damaged one; write it again or remove it") from None


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object; write one object in each line")
    return row


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save it as UTF-8") from None
