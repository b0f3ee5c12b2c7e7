"""Captions of the images of a folder: in tables, or in text files that are named like an image."""

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any, NamedTuple

import pyarrow.parquet

from ldm.data.sources.base import CAPTION_COLUMNS, first_names, one_line, parse_captions

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of several in a folder the first is read
FILE_COLUMNS = ("file_name", "filename", "image", "file")  # the paths of images; as all columns in any case
SIDECAR_SUFFIXES = (".txt", ".caption")
DELIMITERS = ",;\t|"
SEPARATOR_LINE = re.compile(r"sep=.\s*$")


class FolderCaptions(NamedTuple):
    """The captions of the images of a folder."""

    by_image: dict[str, list[str]]
    files: set[str]  # that were read
    origin: str  # which these are, in words
    notes: list[str]  # on what was not as it should be


def read_captions(root: Path, files: Sequence[str], images: Sequence[str]) -> FolderCaptions:
    """Captions from a table in each folder, and from text files for images that have none there; paths are relative.

    ValueError: a file that cannot be read, or a table that names files that are no images of this folder.
    """
    paths, captions = PathIndex(images), defaultdict[str, list[str]](list)
    tables = find_tables(files)
    others = PathIndex(set(files) - paths.names)
    columns, joined, unread = [], [], list[str]()
    for table in tables:
        added = _add_table(root / table, PurePosixPath(table).parent, paths, others, captions)
        columns.append(f"{table} column `{added.column}`")
        joined += [f"line {line} of {table}" for line in added.joined]
        unread += [name for name in added.unread if name not in unread]
    sidecars = find_sidecars([name for name in images if not captions.get(name)], files)
    for name, text in sidecars.items():
        captions[name] = parse_captions(read_text(root / text), name)
    origins = columns if len(columns) < 3 else [columns[0], f"{len(columns) - 1:,} more tables"]
    notes = []
    if joined:
        notes.append(
            f"{len(joined):,} captions hold the delimiter outside of quotes and are read up to the end of their line, "
            f"as in {joined[0]}; put them in quotes to be sure"
        )
    if unread:
        notes.append(f"{len(unread):,} columns of tables skipped: {first_names(unread)}")
    kinds = sorted({f"*{PurePosixPath(text).suffix.lower()}" for text in sidecars.values()})
    return FolderCaptions(captions, {*tables, *sidecars.values()}, " and ".join([*origins, *kinds]), notes)


class PathIndex:
    """Paths of files: each is found as it is written, or where only case, slashes or the form of accents differ."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def find(self, path: str, folder: PurePosixPath) -> str | None:
        """The file at a path in a folder; None when there is none, or several to choose from."""
        names = str(folder / path), normpath(folder / path.strip().replace("\\", "/"))
        if exact := next(filter(self.names.__contains__, names), None):
            return exact
        similar = self._similar.get(_simplify(names[-1]), [])
        return similar[0] if len(similar) == 1 else None

    @cached_property
    def _similar(self) -> dict[str, list[str]]:
        similar = defaultdict(list)
        for name in self.names:
            similar[_simplify(name)].append(name)
        return similar


def _simplify(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


# Text files.


def find_sidecars(images: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """The text file of each image that has one: `a.png.txt` or `a.txt` of `a.png`; those in another case come last."""
    texts = {name: name for name in files if name.lower().endswith(SIDECAR_SUFFIXES)}
    found = _match_names(images, texts)
    similar = {_simplify(name): name for name in sorted(set(texts) - set(found.values()))}
    return found | _match_names([name for name in images if name not in found], similar, _simplify)


def _match_names(images: Sequence[str], texts: dict[str, str], key: Callable[[str], str] = str) -> dict[str, str]:
    matches = {}
    for image in images if texts else ():
        names = [key(stem + suffix) for stem in (image, image.rsplit(".", 1)[0]) for suffix in SIDECAR_SUFFIXES]
        if text := next(filter(None, map(texts.get, names)), None):
            matches[image] = text
    return matches


# Tables.


def find_tables(files: Sequence[str]) -> list[str]:
    """The table of each folder that has one."""
    tables: dict[PurePosixPath, str] = {}
    for kind in METADATA_FILES:
        for name in files:
            path = PurePosixPath(name)
            if path.name.lower() == kind:
                tables.setdefault(path.parent, name)
    return sorted(tables.values())


class AddedTable(NamedTuple):
    """What was read of a table."""

    column: str  # of the captions
    joined: list[int]  # lines: see `_read_csv`
    unread: list[str]  # columns


def _add_table(
    path: Path, folder: PurePosixPath, images: PathIndex, others: PathIndex, captions: dict[str, list[str]]
) -> AddedTable:
    """Add the captions of a table in a folder; an image that is listed twice has two.

    Rows of `others`, which are files that are not read, are passed over.
    """
    rows, joined = read_rows(path)
    columns = {column for row in rows for column in row}
    image = next((name for name in FILE_COLUMNS if name in columns), None)
    if image is None:
        found = f"columns {first_names(sorted(columns))}" if columns else "nothing"
        raise ValueError(
            f"{path}: no column file_name, or no row, but {found}; write each image's path in the folder there"
        )
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if caption is None:
        raise ValueError(f"{path}: no caption column; call it caption, text or prompt")
    missing = set()
    for row in rows:
        name = str(row.get(image) or "")
        texts = parse_captions(row.get(caption), f"{path}: {one_line(name)}")
        if found_name := images.find(name, folder):
            captions[found_name] += texts
        elif not others.find(name, folder):
            missing.add(name.strip() or "(no path)")
    if missing:
        raise ValueError(
            f"{path} names {len(missing):,} files that are not there as PNG, JPEG or WEBP: "
            f"{first_names(sorted(missing))}; add them, remove their lines, or write paths relative to {path.parent}"
        )
    return AddedTable(caption, joined, sorted(columns - {image, caption, ""}))


@cache
def _column(name: str) -> str:
    """The name of a column in lower case, with underscores."""
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a table, with columns in lower case; and the lines that `_read_csv` repaired."""
    rows, joined = _read_table(path)
    rows = [{_column(name): row[name] for name in sorted(row, key=lambda name: name == _column(name))} for row in rows]
    return rows, joined


def _read_table(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        return [_parse_row(line, f"{path}: line {number}") for number, line in lines if line.strip()], []
    try:
        return pyarrow.parquet.read_table(path).to_pylist(), []
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
        raise ValueError(f"{path}: not a parquet file, or a damaged one; write it again or remove it") from None


def _read_csv(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that are not empty; and the lines where delimiters outside of quotes were taken as the caption's.

    ValueError: not CSV, or such a line in a table where not only the caption can be meant.
    """
    lines = list(io.StringIO(read_text(path)))
    dialect, before = find_dialect(lines)
    line, header = before + 1, list[str]()
    rows, joined = [], []
    try:
        for cells in (reader := csv.reader(lines[before:], dialect)):
            while len(cells) > len(header) and not cells[-1].strip():
                cells.pop()
            if header and len(cells) > len(header):
                cells = _join_caption(cells, header, dialect, f"{path}: line {line}")
                joined.append(line)
            if header and any(map(str.strip, cells)):
                rows.append(dict(zip(header, cells, strict=False)))
            header, line = header or _check_header(cells, path), before + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line} is not CSV ({error}); is a quote left open there?") from None
    return rows, joined


def _check_header(cells: list[str], path: Path) -> list[str]:
    """The names of the columns; ValueError: two are the same."""
    names = list(filter(None, map(_column, cells)))
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several columns are called {first_names(double)}; rename or remove all but one")
    return cells


def _join_caption(cells: list[str], header: list[str], dialect: type[csv.Dialect], where: str) -> list[str]:
    """The two cells of a line that has more: all but the path are the caption. ValueError where they may not be."""
    delimiter = dialect.delimiter
    if len(header) != 2 or _column(header[1]) not in CAPTION_COLUMNS:
        raise ValueError(
            f"{where} has {len(cells)} columns, the header {len(header)}; "
            f"write captions that hold a `{delimiter}` in quotes"
        )
    return [cells[0], (delimiter + " " * dialect.skipinitialspace).join(cells[1:])]


def find_dialect(lines: Sequence[str]) -> tuple[type[csv.Dialect], int]:
    """How a table is written, and the number of lines before its header: empty ones, and `sep=;`, as Excel writes."""
    before = next((i for i, line in enumerate(lines) if line.strip() and not SEPARATOR_LINE.match(line)), 0)
    header = lines[before] if lines else ""

    def known_columns(mark: str) -> int:
        columns = {_column(name) for name in next(csv.reader([header], delimiter=mark, skipinitialspace=True), [])}
        return len(columns & {*FILE_COLUMNS}) + len(columns & {*CAPTION_COLUMNS})

    mark = max(DELIMITERS, key=known_columns)
    second_quoted = re.compile(rf'[^"{re.escape(mark)}]*{re.escape(mark)} +"')

    class Found(csv.excel):
        delimiter, strict = mark, True
        skipinitialspace = f"{mark} " in header or any(map(second_quoted.match, lines))

    return Found, before


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object; write one object in each line")
    return row


def read_text(path: Path) -> str:
    """UTF-8; ValueError: another encoding, with the line where that shows."""
    data = path.read_bytes()
    halves = data[::2], data[1::2]
    if len(data) >= 8 and any(all(halves[i]) and not any(halves[1 - i]) for i in (0, 1)):  # valid UTF-8, full of NUL
        raise ValueError(f"{path}: line 1 is UTF-16, not UTF-8 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 text; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
