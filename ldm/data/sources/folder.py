"""A folder of images, with captions in a table, in text files of the same names, or without; and what else is local."""

import csv
import io
import json
import os
import re
import reprlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ldm.data.sources.base import (
    CAPTION_COLUMNS,
    Split,
    check_split,
    check_utf8_names,
    first_names,
    hash_split,
    one_line,
    parse_captions,
)
from ldm.data.sources.encoded import SUFFIXES, EncodedSource
from ldm.data.sources.table import open_hub, open_parquet

OTHER_SUFFIXES = (".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".jxl", ".jp2", ".ppm", ".dcm", ".nii", ".gz")
SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_images(source: str, split: Split) -> EncodedSource:
    """One split of a folder, a parquet file or a hub data set.

    ValueError: nothing there, no image, captions of missing files or of files outside of the folder, an unknown split.
    """
    check_split(split)
    path = Path(os.path.expanduser(source))  # which leaves an unknown user as it is
    if path.is_dir():
        return _open_folder(path, split)
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


def _open_folder(root: Path, split: Split) -> EncodedSource:
    has_splits = (root / "train").is_dir() and (root / "test").is_dir()
    if has_splits and find_metadata(root) is None:
        return _read_folder(root / split, None)
    return _read_folder(root, split)


def _read_folder(root: Path, split: Split | None) -> EncodedSource:
    """A split, or all, of the images below a folder."""
    files = _list_files(root)
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        content = "holds no PNG, JPEG or WEBP image" if files else "is empty"
        raise ValueError(f"{root}: this folder {content}; put images there or choose another --data.source")
    captions, origin = _read_captions(root, images, set(files))
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
    check_utf8_names(names, str(root))
    return sorted(names)


def _read_captions(root: Path, images: list[str], files: set[str]) -> tuple[dict[str, list[str]], str]:
    """Captions by the name of their image, and where they come from."""
    table = find_metadata(root)
    return _table_captions(table, set(images)) if table else _sidecar_captions(root, images, files)


def _sidecar_captions(root: Path, images: list[str], files: set[str]) -> tuple[dict[str, list[str]], str]:
    captions, used = {}, set()
    for name in images:
        stem = name.rsplit(".", 1)[0]
        suffix = next((suffix for suffix in SIDECAR_SUFFIXES if stem + suffix in files), None)
        if suffix:
            captions[name] = parse_captions(_read_text(root / (stem + suffix)), name)
            used.add(f"*{suffix}")
    return captions, " and ".join(sorted(used))


def _table_captions(path: Path, images: set[str]) -> tuple[dict[str, list[str]], str]:
    """An image that is listed twice has two captions."""
    rows = _read_table(path)
    columns = {column for row in rows for column in row}
    if "file_name" not in columns:
        raise ValueError(f"{path}: no column file_name, or no row; write each image's path in the folder there")
    column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"{path}: no caption column; call it caption, text or prompt")
    captions: dict[str, list[str]] = {}
    for row in rows:
        name = _safe_relative_path(row.get("file_name"), path)
        captions.setdefault(name, []).extend(parse_captions(row.get(column), f"{path}: {one_line(name)}"))
    missing = sorted(set(captions) - images)
    if missing:
        raise ValueError(
            f"{path} names {len(missing):,} files that are not there as PNG, JPEG or WEBP: {first_names(missing)}; "
            "add them or remove their lines"
        )
    return captions, f"{path.name} column `{column}`"


def _read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    return _read_csv(path, text) if path.suffix == ".csv" else _read_jsonl(path, text)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet  # slow, and few need it

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
        raise ValueError(f"{path}: not a parquet file, or a damaged one; write it again or remove it") from None


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        return list(rows)
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {rows.reader.line_num} is not CSV ({error}); is a quote left open there?"
        ) from None


def _read_jsonl(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is not a JSON object; write one object in each line")
            rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def _safe_relative_path(name: Any, table: Path) -> str:
    """The normalised relative path; ValueError when it is not text or leads out of the folder."""
    if not isinstance(name, str):
        raise ValueError(
            f"{table}: file_name {reprlib.repr(name)} is not text; write an image's path in the folder there"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
        raise ValueError(
            f"{table}: file_name {one_line(name)} leads out of the folder; use paths relative to {table.parent}"
        )
    return path.as_posix()
