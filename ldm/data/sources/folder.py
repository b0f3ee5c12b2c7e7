"""TODO."""

import csv
import io
import json
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ldm.data.sources.shapes import Split

if TYPE_CHECKING:
    pass
from ldm.data.sources.base import (
    CAPTION_COLUMNS,
    ImageTextSource,
    _first,
    _text,
    as_caption_list,
    check_split,
    check_utf8_names,
    hash_split,
    parse_captions,
)
from ldm.data.sources.decode import SUFFIXES
from ldm.data.sources.table import _open_hub, _open_parquet

OTHER_SUFFIXES = (".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".jxl", ".jp2", ".ppm", ".dcm", ".nii", ".gz")
SIDECARS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_images(source: str, split: Split) -> ImageTextSource:
    """One split of a folder, a parquet file or a hub data set.

    ValueError: nothing there, no image, captions that point nowhere or out of the folder, an unknown split.
    """
    check_split(split)
    path = Path(os.path.expanduser(source))  # which leaves a user that is not known as it is
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file() and path.suffix == ".parquet":
        return _open_parquet(path, split)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return _open_hub(source, split)
    raise ValueError(
        f"data.source {source}: no such folder or parquet file; "
        "give --data.source an existing one, a hub id org/name, or shapes, pairs or emoji"
    )


def _open_folder(root: Path, split: Split) -> ImageTextSource:
    has_splits = (root / "train").is_dir() and (root / "test").is_dir()
    if has_splits and find_metadata(root) is None:
        return _read_folder(root / split)
    found = _read_folder(root)
    return found.select(hash_split(found.names, split))


def _read_folder(root: Path) -> ImageTextSource:
    found: Mapping[str, str | list[str]]
    files = _walk(root)
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        what = "holds no PNG, JPEG or WEBP image" if files else "is empty"
        raise ValueError(f"{root}: this folder {what}; put images there or choose another --data.source")
    metadata = find_metadata(root)
    if metadata:
        found, origin = _metadata_captions(metadata, set(images))
    else:
        found, origin = _sidecar_captions(root, images, set(files))
    captions = [found.get(name, "") for name in images]
    said = f"captions from {origin}, {sum(map(bool, captions)):,} captioned" if origin else "no captions"
    others = [name for name in files if name.lower().endswith(OTHER_SUFFIXES)]
    if others:
        said += f", {len(others):,} left out that are no PNG, JPEG or WEBP: {_first(others, 3)}"
    paths = [root / name for name in images]
    return ImageTextSource(images, paths, captions, f"images: {len(images):,} files in {root}/, {said}")


def find_metadata(root: Path) -> Path | None:
    """The table of captions in a folder, if there is one."""
    return next((root / name for name in METADATA if (root / name).is_file()), None)


def _walk(root: Path) -> list[str]:
    """Relative paths of all files below `root`, in order, without hidden ones."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    check_utf8_names(found, str(root))
    return sorted(found)


def _sidecar_captions(root: Path, images: list[str], files: set[str]) -> tuple[dict[str, str], str]:
    captions, used = {}, set()
    for name in images:
        stem = name.rsplit(".", 1)[0]
        suffix = next((suffix for suffix in SIDECARS if stem + suffix in files), None)
        if suffix:
            captions[name] = _text(_read_text(root / (stem + suffix)))
            used.add(f"*{suffix}")
    return captions, " and ".join(sorted(used))


def _metadata_captions(path: Path, images: set[str]) -> tuple[dict[str, list[str]], str]:
    """Captions by file name; a file that is listed twice has two."""
    rows = _read_metadata(path)
    columns = {column for row in rows for column in row}
    if "file_name" not in columns:
        raise ValueError(f"{path}: there is no column file_name, or no row; name each image's path in the folder there")
    column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"{path}: there is no caption column; call it caption, text or prompt")
    captions: dict[str, list[str]] = {}
    for row in rows:
        name = _safe_relative_path(row.get("file_name"), path)
        wordings = parse_captions(row.get(column), f"{path}: {_text(name)}")
        captions.setdefault(name, []).extend(filter(None, as_caption_list(wordings)))
    missing = sorted(set(captions) - images)
    if missing:
        raise ValueError(
            f"{path} names {len(missing):,} files that are not there as PNG, JPEG or WEBP: {_first(missing)}; "
            "add them or take their lines out"
        )
    return captions, f"{path.name} column `{column}`"


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet  # slow, and few need it

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
            raise ValueError(f"{path}: no parquet file, or a damaged one; write it again or take it out") from None
    text = _read_text(path)
    if path.suffix == ".csv":
        return _read_csv(path, text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is no JSON object; write one object in each line")
            rows.append(row)
    return rows


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        return list(rows)
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {rows.reader.line_num} is no CSV ({error}); is a quote left open there?"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def _safe_relative_path(name: Any, path: Path) -> str:
    """The normalised relative path; ValueError when it is no text or leads out of the folder."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: file_name {reprlib.repr(name)} is no text; name an image's path in the folder there")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive:
        raise ValueError(
            f"{path}: file_name {_text(name)} leads out of the folder; use paths relative to {path.parent}"
        )
    return pure.as_posix()
