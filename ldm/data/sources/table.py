"""TODO."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.data.sources.shapes import Split

if TYPE_CHECKING:
    import datasets
from ldm.data.sources.base import (
    CAPTION_COLUMNS,
    Captions,
    ImageColumn,
    ImageTextSource,
    _first,
    _text,
    hash_split,
    parse_captions,
)


def _open_parquet(path: Path, split: Split) -> ImageTextSource:
    import datasets  # slow, and drawn sets do not need it here

    try:
        rows = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, TypeError, LookupError):
        raise ValueError(
            f"{path}: no parquet file, a damaged one or an empty one; choose another --data.source"
        ) from None
    found = _table(rows, str(path), [path.parent])
    return found.select(hash_split(found.names, split))


def _open_hub(name: str, split: Split) -> ImageTextSource:
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
    return found if own else found.select(hash_split(found.names, split))


def _table(rows: "datasets.Dataset", where: str, roots: Sequence[Path]) -> ImageTextSource:
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
        captions = [parse_captions(cell, f"{where}, row {i}") for i, cell in enumerate(_cells(rows, caption, where))]
    said = f"captions from column `{caption}`, {sum(map(bool, captions)):,} captioned" if caption else "no captions"
    names = [f"row {i}" for i in range(len(rows))]
    description = f"images: {len(rows):,} rows of {where}, column `{image}`, {said}"
    return ImageTextSource(names, ImageColumn(rows.select_columns([image]), image, roots), captions, description)


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
