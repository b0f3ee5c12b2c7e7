"""Tables with a column of images: a parquet file or a data set of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from ldm.data.sources.base import (
    HELD_OUT_SPLITS,
    Split,
    caption_column,
    first_names,
    hash_split,
    named_split,
    one_line,
    parse_captions,
)
from ldm.data.sources.encoded import EncodedSource
from ldm.imaging import Encoded


def open_parquet(path: Path, split: Split) -> EncodedSource:
    """One split of a parquet file; ValueError: not one, damaged, empty, or without images."""
    try:
        rows = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, TypeError, LookupError):
        raise ValueError(f"{path}: not a parquet file, or damaged or empty; choose another --data.source") from None
    return _open_table(rows, str(path), [path.parent], split)


def open_hub(name: str, split: Split) -> EncodedSource:
    """One split of a data set of the hub; ValueError: not there, or without images."""
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data.source {name}: no such folder, and the Hugging Face hub gave no data set of that name "
            f"({one_line(error)}); give --data.source an existing folder or a public hub id"
        ) from None
    train, *held_out = (_find_split(list(splits), kind) for kind in ("train", *HELD_OUT_SPLITS))
    if train is None:
        raise ValueError(f"data.source {name}: no split train, only {first_names(list(splits))}; choose another one")
    own = next(filter(None, held_out), None)
    roots = [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    notes = [f"held out: the {len(splits[own]):,} rows of split {own}"] if own else []
    if others := [key for key in splits if key not in (train, own)]:
        notes.append(f"{len(others):,} splits skipped: {first_names(others)}")
    rows = splits[own if own and split == "test" else train]
    return _open_table(rows, f"hub {name}", roots, None if own else split, notes)


def _find_split(names: Sequence[str], kind: str) -> str | None:
    """The split of that name, or else the first one whose name says it."""
    return kind if kind in names else next((name for name in names if named_split(name) == kind), None)


def _open_table(
    rows: datasets.Dataset, where: str, roots: Sequence[Path], split: Split | None, notes: Sequence[str] = ()
) -> EncodedSource:
    """A split, or all, of the image and caption columns of a table. A row has no name, so its number is its name."""
    image = image_column(rows.features, where)
    if not len(rows):
        raise ValueError(f"{where}: no rows; choose another --data.source")
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    captions, origin = _caption_column(rows, where)
    names = [f"row {i}" for i in range(len(rows))]
    chosen = range(len(rows)) if split is None else hash_split(names, split)
    return EncodedSource(
        names=[names[i] for i in chosen],
        images=ImageColumn(rows.select_columns([image]).select(chosen), image, roots),
        captions=[captions[i] for i in chosen],
        description=f"images: {len(rows):,} rows of {where}, column `{image}`, {origin}",
        notes=notes,
    )


def _caption_column(rows: datasets.Dataset, where: str) -> tuple[Sequence[Sequence[str]], str]:
    """The captions of all rows, and where they come from."""
    column = caption_column(rows.features)
    if column is None:
        return [[]] * len(rows), "no captions"
    try:  # as it was written: what looks like an image in it is not decoded, and no path in it is followed
        cells = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    except (ValueError, OverflowError):  # times that Python has none for
        raise ValueError(f"{where}: column {column} is not text; write text, or lists of texts") from None
    captions = [parse_captions(cell, f"{where}, row {i}") for i, cell in enumerate(cells)]
    return captions, f"captions from column `{column}`, {sum(map(bool, captions)):,} captioned"


class ImageColumn(Sequence[Encoded]):
    """The image column of a table, read row by row; a path in it must be below one of the `roots`."""

    def __init__(self, rows: datasets.Dataset, name: str, roots: Sequence[Path]) -> None:
        self.rows, self.name, self.roots = rows, name, roots

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        cell = self.rows[index][self.name]
        data, path = (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, bytes):
            return data
        if data is not None or not path or not isinstance(path, str):
            raise ValueError("holds no image")
        full = (self.roots[0] / path).resolve()
        if not any(full.is_relative_to(root.resolve()) for root in self.roots):
            raise ValueError(f"its path {path} leads out of {self.roots[0]}")
        return full


def image_column(features: datasets.Features, where: str) -> str:
    """The first column of a table that holds images; ValueError when there is none."""

    def holds_bytes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return {"bytes", "path"} <= set(feature)
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    columns = typed + [name for name, feature in features.items() if holds_bytes(feature)]
    if not columns:
        names = first_names(list(features), 12)
        raise ValueError(f"{where}: none of the columns {names} holds images; choose another --data.source")
    return columns[0]
