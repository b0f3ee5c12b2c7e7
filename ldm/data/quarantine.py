"""Moving images out of a folder, with their captions: the rows of tables, and the text files beside them."""

import csv
import io
import json
import os
import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet

from ldm.data.sources.base import first_names, one_line
from ldm.data.sources.captions import SIDECAR_SUFFIXES, PathIndex, find_dialect
from ldm.data.sources.encoded import SUFFIXES
from ldm.data.sources.folder import find_metadata
from ldm.data.sources.sharded import is_sharded
from ldm.io.atomic import atomic_write, check_folder

Cells = Iterable[Any]  # of a row


def check_quarantine(folder: Path, target: Path) -> None:
    """ValueError unless files of `folder` can be moved to `target`."""
    if not folder.is_dir() or is_sharded(str(folder)):
        raise ValueError(f"--quarantine: {folder} is not a folder of images, and nothing else can be moved")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--quarantine {target} is inside of {folder}: pass a folder elsewhere")
    check_folder(target, "--quarantine")


def quarantine(folder: Path, target: Path, bad: Collection[str], images: Iterable[str]) -> Iterator[str]:
    """Move the bad ones of all images, with their captions, to the same paths below `target`; yields what was moved.

    Images are paths below `folder`. ValueError, before anything is moved: a file of the same name is there.
    """
    files = [folder / name for name in bad]
    texts = [text for file in files for text in _sidecars(file)]
    parents = {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}
    is_bad = partial(_names_one_of, frozenset(bad), PathIndex(images))
    parts: dict[Path, DividedTable] = {}
    for table in sorted(filter(None, map(find_metadata, parents))):
        part = _divide_table(table, partial(is_bad, PurePosixPath(table.parent.relative_to(folder).as_posix())))
        if part.rows:
            parts[table] = part
    moves = {path: target / path.relative_to(folder) for path in (*files, *texts, *parts)}
    if taken := [str(path) for path in moves.values() if os.path.lexists(path)]:
        raise ValueError(f"--quarantine: {first_names(taken)} exists already: pass another folder")
    for table, part in parts.items():  # first, so that no table ever names an image that is gone
        for path, content in ((moves[table], part.moved), (table, part.kept)):
            if content:
                with atomic_write(path) as tmp_path:
                    tmp_path.write_bytes(content)
            else:
                path.unlink()
    for path in (*files, *texts):
        moves[path].parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, moves[path])
    yield f"{len(files):,} images and {len(texts):,} texts moved to {target}"
    yield from (f"{part.rows:,} rows of {table} moved to {moves[table]}" for table, part in parts.items())


def _sidecars(image: Path) -> list[Path]:
    """The text files that belong to an image, and to no other one of the same stem."""
    others = (image.with_suffix(suffix) for suffix in SUFFIXES if suffix != image.suffix.lower())
    stems = [image.name] if any(other.exists() for other in others) else [image.name, image.stem]
    suffixes = [case for suffix in SIDECAR_SUFFIXES for case in (suffix, suffix.upper())]
    paths = (image.with_name(stem + suffix) for stem in stems for suffix in suffixes)
    return [path for path in paths if path.is_file()]


def _names_one_of(names: Collection[str], images: PathIndex, folder: PurePosixPath, cells: Cells) -> bool:
    """Whether a cell of a row of a table in `folder` is read as the path of one of some images."""
    return any(images.find(cell, folder) in names for cell in cells if isinstance(cell, str))


# Tables.


class DividedTable(NamedTuple):
    """The content of a table without some rows, that of a table of these alone, and their number."""

    kept: bytes  # none where no row is left
    moved: bytes
    rows: int


def _divide_table(table: Path, moves: Callable[[Cells], bool]) -> DividedTable:
    """Take out the rows that `moves` says; ValueError: the table cannot be read."""
    try:
        return (_divide_parquet if table.suffix.lower() == ".parquet" else _divide_text)(table, moves)
    except (ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise ValueError(f"{table} cannot be read ({one_line(error)}): repair or remove it") from None


def _divide_parquet(table: Path, moves: Callable[[Cells], bool]) -> DividedTable:
    rows, kept, moved = pyarrow.parquet.read_table(table), io.BytesIO(), io.BytesIO()
    is_moved = [moves(row.values()) for row in rows.to_pylist()]
    pyarrow.parquet.write_table(rows.filter([not out for out in is_moved]), kept)
    pyarrow.parquet.write_table(rows.filter(is_moved), moved)
    return DividedTable(b"" if all(is_moved) else kept.getvalue(), moved.getvalue(), sum(is_moved))


def _divide_text(table: Path, moves: Callable[[Cells], bool]) -> DividedTable:
    """Of CSV or JSONL, in UTF-8; each row stays as it is, to the byte."""
    content, is_csv = table.read_bytes(), table.suffix.lower() == ".csv"
    mark = BOM_UTF8 if content.startswith(BOM_UTF8) else b""
    lines = list(io.StringIO(content.removeprefix(mark).decode(), newline=""))
    dialect, before = find_dialect(lines) if is_csv else (csv.excel, -1)
    start = before + 1
    header = "".join(lines[:start])
    rows = _csv_rows(lines[start:], dialect) if is_csv else _json_rows(lines)
    kept, moved, left = [header], [header], False
    for text, cells in rows:
        is_moved = moves(cells)
        (moved if is_moved else kept).append(text)
        left = left or (not is_moved and any(str(cell).strip() for cell in cells))
    rest = mark + "".join(kept).encode() if left else b""
    return DividedTable(rest, mark + "".join(moved).encode(), len(moved) - 1)


def _json_rows(lines: list[str]) -> Iterator[tuple[str, Cells]]:
    """The text of each row, and its cells."""
    return ((line, json.loads(line).values() if line.strip() else ()) for line in lines)


def _csv_rows(lines: list[str], dialect: type[csv.Dialect]) -> Iterator[tuple[str, Cells]]:
    """The same; a row may have several lines."""
    reader, start = csv.reader(lines, dialect), 0
    for cells in reader:
        yield "".join(lines[start : reader.line_num]), cells
        start = reader.line_num
