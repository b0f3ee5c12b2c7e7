"""Images that people have: folders, parquet files and hub data sets, found, read, decoded and cut."""

import csv
import hashlib
import io
import json
import os
import re
import reprlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ldm import keyed
from ldm.data.buckets import Sides
from ldm.data.order import Key, evenly
from ldm.data.shapes import Split

if TYPE_CHECKING:
    import datasets

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_SUFFIXES = (".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".jxl", ".jp2", ".ppm", ".dcm", ".nii", ".gz")
SIDECARS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("caption", "text", "prompt")
MAX_MEGAPIXELS = 64
HALF = re.compile("[\ud800-\udfff]")  # of a character, as a JSON escape or a file name of another encoding has
WHOLE = "whole"  # in a picture's info: its size, where it was decoded to a smaller one
HELD_OUT = 0.05  # share of the items that make the test split of a set without one

Encoded = bytes | Path
Captions = Sequence[str | list[str]]


@dataclass(frozen=True)
class Source:
    """The items of one split; images are encoded, or pictures that were drawn. All sequences are of one length."""

    names: Sequence[str]
    images: Sequence[Encoded | Image.Image]
    captions: Captions  # one wording, or several, for each item
    description: str

    def select(self, chosen: Sequence[int]) -> "Source":
        """The source with the items at the `chosen` positions alone."""
        names, captions = [self.names[i] for i in chosen], [self.captions[i] for i in chosen]
        images = self.images.select(chosen) if isinstance(self.images, Column) else [self.images[i] for i in chosen]
        return Source(names, images, captions, self.description)

    def near(self, index: int) -> range:
        """The items that stand in for one that can not be read, before any other does."""
        return range(len(self.names))

    def at_hand(self, index: int) -> bool:
        """Whether an item can be read again without fetching anything."""
        return True

    def spread(self, count: int) -> list[int]:
        """`count` items, spread over all."""
        return evenly(count, len(self.names))

    def digest(self) -> str:
        """A hash of which items there are."""
        return short_hash("\n".join(self.names))

    def expect(self, keys: Sequence[Key], seed: int) -> None:
        """Make ready for these samples, which are read next."""


class Column(Sequence[Encoded]):
    """The image column of a table, read row by row; a path in it must lie in one of the `roots`."""

    def __init__(self, rows: "datasets.Dataset", name: str, roots: Sequence[Path]) -> None:
        self.rows, self.name, self.roots = rows, name, roots

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        cell = self.rows[index][self.name]
        data, path = (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, bytes):
            return data
        if data is None and path and isinstance(path, str):
            return _confined(path, self.roots)
        raise ValueError("holds no image")

    def select(self, chosen: Sequence[int]) -> "Column":
        """The rows at the `chosen` positions."""
        return Column(self.rows.select(chosen), self.name, self.roots)


def wordings_of(entry: str | list[str]) -> list[str]:
    """The captions of one item."""
    return [entry] if isinstance(entry, str) else entry


def check_names(names: Sequence[str], where: str) -> None:
    """ValueError unless all names of files are UTF-8."""
    for name in filter(HALF.search, names):
        raise ValueError(f"{where}: the name {name!a} is not in UTF-8; rename that file")


def short_hash(text: str) -> str:
    """16 hexadecimal digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_split(split: str) -> None:
    """ValueError unless `split` is train or test."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: choose train or test")


def split_by_name(names: Sequence[str], split: Split) -> list[int]:
    """Positions of a split's items: 5 % are held out, by a hash of the name alone, so a new item moves no other.

    Few items are the exception: of two or more at least one is held out, and at least one is not.
    """
    check_split(split)
    keys = [keyed.key("held out", name) for name in names]
    held = {i for i, value in enumerate(keys) if value < HELD_OUT * 2**63}
    if len(keys) > 1:
        held = (held or {keys.index(min(keys))}) - ({keys.index(max(keys))} if len(held) == len(keys) else set())
    return [i for i in range(len(keys)) if (i in held) == (split == "test")]


def open_images(source: str, split: Split) -> Source:
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


# Folders.


def _open_folder(root: Path, split: Split) -> Source:
    has_splits = (root / "train").is_dir() and (root / "test").is_dir()
    if has_splits and metadata_of(root) is None:
        return _read_folder(root / split)
    found = _read_folder(root)
    return found.select(split_by_name(found.names, split))


def _read_folder(root: Path) -> Source:
    found: Mapping[str, str | list[str]]
    files = _walk(root)
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        what = "holds no PNG, JPEG or WEBP image" if files else "is empty"
        raise ValueError(f"{root}: this folder {what}; put images there or choose another --data.source")
    metadata = metadata_of(root)
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
    return Source(images, paths, captions, f"images: {len(images):,} files in {root}/, {said}")


def metadata_of(root: Path) -> Path | None:
    """The table of captions in a folder, if there is one."""
    return next((root / name for name in METADATA if (root / name).is_file()), None)


def _walk(root: Path) -> list[str]:
    """Relative paths of all files below `root`, in order, without hidden ones."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    check_names(found, str(root))
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
        name = _inside(row.get("file_name"), path)
        wordings = wordings_in(row.get(column), f"{path}: {_text(name)}")
        captions.setdefault(name, []).extend(filter(None, wordings_of(wordings)))
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


def _inside(name: Any, path: Path) -> str:
    """The normalised relative path; ValueError when it is no text or leads out of the folder."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: file_name {reprlib.repr(name)} is no text; name an image's path in the folder there")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive:
        raise ValueError(
            f"{path}: file_name {_text(name)} leads out of the folder; use paths relative to {path.parent}"
        )
    return pure.as_posix()


def _confined(path: str, roots: Sequence[Path]) -> Path:
    full = (roots[0] / path).resolve()
    if not any(full.is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f"its path {path} leads out of {roots[0]}")
    return full


def wordings_in(cell: Any, where: str) -> str | list[str]:
    """The caption of a cell, or the captions of one that holds a list; ValueError for what is no text."""
    if isinstance(cell, list):
        return [text for text in (_caption(item, where) for item in cell) if text]
    return _caption(cell, where)


def _caption(value: Any, where: str) -> str:
    """A caption in one line; nothing for a missing one, which pandas writes as NaN. Numbers are text, too."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float) or HALF.search(text := _text(value)):
        raise ValueError(f"{where}: the caption {reprlib.repr(value)} is no text; write text, or a list of texts")
    return text


def _text(value: Any) -> str:
    """A value in one line."""
    return " ".join(str(value).split())


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(_text, names[:count])) + (", ..." if len(names) > count else "")


# Tables.


def _open_parquet(path: Path, split: Split) -> Source:
    import datasets  # slow, and drawn sets do not need it here

    try:
        rows = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, TypeError, LookupError):
        raise ValueError(
            f"{path}: no parquet file, a damaged one or an empty one; choose another --data.source"
        ) from None
    found = _table(rows, str(path), [path.parent])
    return found.select(split_by_name(found.names, split))


def _open_hub(name: str, split: Split) -> Source:
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = _text(error)
        raise ValueError(
            f"data.source {name}: no such folder, and the Hugging Face hub gave no data set of that name ({reason}); "
            "give --data.source an existing folder or a public hub id"
        ) from None
    if "train" not in splits:
        raise ValueError(f"data.source {name}: has no split train, only {_first(list(splits))}; choose another one")
    own = next((key for key in ("test", "validation") if key in splits), None)
    roots = [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    found = _table(splits[own if own and split == "test" else "train"], f"hub {name}", roots)
    return found if own else found.select(split_by_name(found.names, split))


def _table(rows: "datasets.Dataset", where: str, roots: Sequence[Path]) -> Source:
    """The image and caption columns of a table. Rows have no names of their own, so their number is the name."""
    import datasets

    image = image_column(rows.features, where)
    if not len(rows):
        raise ValueError(f"{where}: holds no rows; choose another --data.source")
    caption = next((name for name in CAPTION_COLUMNS if name in rows.features), None)
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    captions: Captions = [""] * len(rows)
    if caption:
        captions = [wordings_in(cell, f"{where}, row {i}") for i, cell in enumerate(_cells(rows, caption, where))]
    said = f"captions from column `{caption}`, {sum(map(bool, captions)):,} captioned" if caption else "no captions"
    names = [f"row {i}" for i in range(len(rows))]
    description = f"images: {len(rows):,} rows of {where}, column `{image}`, {said}"
    return Source(names, Column(rows.select_columns([image]), image, roots), captions, description)


def _cells(rows: "datasets.Dataset", column: str, where: str) -> list[Any]:
    """A column as it was written: what looks like an image in it is not decoded, and no path in it is followed."""
    try:
        return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    except (ValueError, OverflowError):  # times that Python has none for
        raise ValueError(f"{where}: column {column} is no text; write text, or lists of texts") from None


def image_column(features: "datasets.Features", where: str) -> str:
    """The first column of a table that holds images; ValueError when there is none."""
    import datasets

    def holds_bytes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return {"bytes", "path"} <= set(feature)
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = typed + [name for name, feature in features.items() if holds_bytes(feature)]
    if not found:
        columns = _first(list(features), 12)
        raise ValueError(f"{where}: none of the columns {columns} holds images; choose another --data.source")
    return found[0]


# Pixels.


def decode(data: Encoded, *, channels: int = 3, side: int | None = None) -> Image.Image:
    """The first frame of a PNG, JPEG or WEBP file, upright, on white, in 8 bits: mode RGB, or L for one channel.

    Give the `side` that is wanted in the end to read a large JPEG at a lower resolution, never below twice `side`.
    ValueError: not such an image, damaged, or above 64 megapixels, which is known before any pixel is decoded.
    """
    try:
        with Image.open(_file(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_MEGAPIXELS * 1e6:
                raise Image.DecompressionBombError
            whole = image.size
            if side is not None:
                image.draft(None, (2 * side, 2 * side))
            image.load()
            if image.info:  # else there is no orientation to look for
                ImageOps.exif_transpose(image, in_place=True)
            plain = _on_white(image)
            if image.size != whole:
                plain.info[WHOLE] = whole if (image.width > image.height) == (whole[0] > whole[1]) else whole[::-1]
    except Image.DecompressionBombError:
        raise ValueError(f"larger than the limit of {MAX_MEGAPIXELS} megapixels; shrink it") from None
    except Image.UnidentifiedImageError:
        raise ValueError("no PNG, JPEG or WEBP image") from None
    except Exception as error:  # damaged files raise errors of many types in Pillow's decoders
        raise ValueError(_text(error) or type(error).__name__) from None
    mode = "RGB" if channels == 3 else "L"
    return plain if plain.mode == mode else plain.convert(mode)


def _file(data: Encoded) -> io.BytesIO | Path:
    """What Pillow reads; OSError for a path to no regular file, such as a pipe, which would never end."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not stat.S_ISREG(os.stat(data).st_mode):
        raise OSError("no regular file")
    return data


def _on_white(image: Image.Image) -> Image.Image:
    """Without transparency, and 16-bit grey scaled (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.float32)
        clear = image.info.get("transparency")  # a value that means white
        grey = np.where(grey == clear, 65535, grey) if isinstance(clear, int) else grey
        return Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def shape_of(data: Encoded | Image.Image) -> Sides:
    """Height and width of an upright image, from the head of its file; a square for a file that can not be read."""
    if isinstance(data, Image.Image):
        return data.height, data.width
    try:
        with Image.open(_file(data), formats=FORMATS) as image:
            told = image.getexif() if "exif" in image.info else {}  # else a PNG would be decoded to look for it
            turned = told.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # damaged files raise errors of many types in Pillow's decoders; `decode` tells which
        return 1, 1


class Cut(NamedTuple):
    """The largest rectangle of some shape in an image, in its pixels."""

    left: int
    top: int
    width: float
    height: float


def cut_of(image: Image.Image, sides: Sides, offset: int | None = None) -> Cut:
    """Where the cut lies that has the shape of `sides` (height, width).

    It is the centre one, or begins at `offset` of the side that is too long (any number, modulo the places there are).
    """
    height, width = sides
    wide = image.width * height > image.height * width
    across = image.height * width / height if wide else image.width
    down = image.height if wide else image.width * height / width
    slack = int(image.width - across if wide else image.height - down)
    start = slack // 2 if offset is None else offset % (slack + 1)
    return Cut(start if wide else 0, 0 if wide else start, across, down)


def to_tensor(image: Image.Image, sides: Sides, cut: Cut | None = None) -> Tensor:
    """The cut (the centre one), made as large as `sides` with antialiasing: (c, height, width), float32 in [-1, 1]."""
    height, width = sides
    if image.size != (width, height):
        left, top, across, down = cut or cut_of(image, sides)
        box = (left, top, left + across, top + down)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(image).reshape(height, width, -1)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(127.5).sub_(1)
