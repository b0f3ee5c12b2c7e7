"""Moving images out of a folder, with their captions: the lines of a table, and the text files beside them."""

import codecs
import csv
import io
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from ldm.data.sources.base import first_names, one_line
from ldm.data.sources.encoded import SUFFIXES
from ldm.data.sources.folder import SIDECAR_SUFFIXES, find_metadata
from ldm.data.sources.sharded import is_sharded
from ldm.io.atomic import atomic_write

DELIMITERS = ",;\t"
ENCODINGS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def check_quarantine(folder: Path, target: Path) -> None:
    """ValueError unless files of `folder` can be moved to `target`."""
    if not folder.is_dir() or is_sharded(str(folder)):
        raise ValueError(f"--quarantine: {folder} is not a folder of images, and nothing else can be moved")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--quarantine {target} is inside of {folder}: pass a folder elsewhere")


def quarantine(folder: Path, target: Path, images: Collection[Path]) -> Iterator[str]:
    """Move images, with their captions, to the same relative paths below `target`; yields what was moved.

    ValueError, before anything is moved: a file of the same name is there.
    """
    texts = [text for image in images for text in _sidecars(image)]
    parents = {parent for image in images for parent in image.parents if parent.is_relative_to(folder)}
    tables = sorted(table for parent in parents if (table := find_metadata(parent)))
    parts = {table: part for table in tables if (part := _divide_table(table, images)).rows}
    moves = {path: target / path.relative_to(folder) for path in (*images, *texts, *parts)}
    if taken := [str(path) for path in moves.values() if os.path.lexists(path)]:
        raise ValueError(f"--quarantine: {first_names(taken)} exists already: pass another folder")
    for table, part in parts.items():  # first, so that no table ever names an image that is gone
        for path, content in ((moves[table], part.moved), (table, part.kept)):
            with atomic_write(path) as partial:
                partial.write_bytes(content)
    for path in (*images, *texts):
        moves[path].parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, moves[path])
    yield f"{len(images):,} images and {len(texts):,} texts moved to {target}"
    yield from (f"{part.rows:,} rows of {table} moved to {moves[table]}" for table, part in parts.items())


def _sidecars(image: Path) -> list[Path]:
    """The text files that belong to an image, and to no other one of the same stem."""
    others = (image.with_suffix(suffix) for suffix in SUFFIXES if suffix != image.suffix.lower())
    shared = any(other.exists() for other in others)
    stems = [image.name] if shared else [image.name, image.stem]
    suffixes = [case for suffix in SIDECAR_SUFFIXES for case in (suffix, suffix.upper())]
    paths = (image.with_name(stem + suffix) for stem in stems for suffix in suffixes)
    return [path for path in paths if path.is_file()]


class DividedTable(NamedTuple):
    """The content of a table without some rows, that of a table of these alone, and their number."""

    kept: bytes
    moved: bytes
    rows: int


def _divide_table(table: Path, images: Iterable[Path]) -> DividedTable:
    """Take the rows that name an image out of a table; ValueError when it cannot be read."""
    names = {image.relative_to(table.parent).as_posix() for image in images if image.is_relative_to(table.parent)}
    try:
        return (_divide_parquet if table.suffix == ".parquet" else _divide_text)(table, names)
    except (ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise ValueError(f"{table} cannot be read ({one_line(error)}): repair or remove it") from None


def _divide_parquet(table: Path, names: Collection[str]) -> DividedTable:
    rows, kept, moved = pyarrow.parquet.read_table(table), io.BytesIO(), io.BytesIO()
    is_moved = [_names_one_of(names, row.values()) for row in rows.to_pylist()]
    pyarrow.parquet.write_table(rows.filter([not out for out in is_moved]), kept)
    pyarrow.parquet.write_table(rows.filter(is_moved), moved)
    return DividedTable(kept.getvalue(), moved.getvalue(), sum(is_moved))


def _divide_text(table: Path, names: Collection[str]) -> DividedTable:
    """Of CSV or JSONL; every row stays as it is, to the byte, in any encoding that extends ASCII, and in UTF-16."""
    content = table.read_bytes()
    mark = next(filter(content.startswith, ENCODINGS), b"")
    encoding = ENCODINGS.get(mark, "utf-8")
    lines = list(io.StringIO(content.removeprefix(mark).decode(encoding, "surrogateescape"), newline=""))
    rows = list(_json_rows(lines) if table.suffix == ".jsonl" else _csv_rows(lines))
    kept = [text for text, cells in rows if not _names_one_of(names, cells)]
    moved = [text for text, cells in rows if _names_one_of(names, cells)]
    header = [] if table.suffix == ".jsonl" else kept[:1]
    contents = [mark + "".join(part).encode(encoding, "surrogateescape") for part in (kept, header + moved)]
    return DividedTable(contents[0], contents[1], len(moved))


def _json_rows(lines: list[str]) -> Iterator[tuple[str, Iterable[Any]]]:
    """The text of each row, and its cells."""
    return ((line, json.loads(line).values() if line.strip() else ()) for line in lines)


def _csv_rows(lines: list[str]) -> Iterator[tuple[str, Iterable[Any]]]:
    """The same, the header first; a row may have several lines."""
    reader, start = csv.reader(lines, delimiter=max(DELIMITERS, key="".join(lines[:1]).count)), 0
    for cells in reader:
        yield "".join(lines[start : reader.line_num]), cells
        start = reader.line_num


def _names_one_of(names: Collection[str], cells: Iterable[Any]) -> bool:
    """Whether a cell of a row is a path, of any system, in `names`."""
    paths = [path for cell in cells if isinstance(cell, str) for path in (cell, cell.replace("\\", "/"))]
    return any(PurePosixPath(path).as_posix() in names for path in paths)
