"""Look at a set of images before training on it: sizes, unreadable files, duplicates, captions, a contact sheet."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from tyro.conf import Positional

from ldm import imaging
from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.data import DataConfig
from ldm.data.dataset import open_user_data
from ldm.data.inspect import inspect_dataset
from ldm.data.sources.folder import find_metadata
from ldm.text.tokenizer import Tokenizer


class CheckDataConfig(ScriptConfig):
    """Settings of data."""

    command: Positional[Literal["check"]] = "check"
    source: Positional[str] = ""
    """folder, parquet file, hub id or shards, as in data.source"""
    size: int = Field(256, ge=8)
    """side that training will want"""
    max_tokens: int = Field(77, ge=3)
    """tokens that the text tower reads, start and end among them"""
    contact_sheet: Path | None = None
    """write a contact sheet, a PNG, of the first pictures with their captions"""
    sheet_images: int = Field(48, ge=1)
    """pictures on it"""
    quarantine: Path | None = None
    """move unreadable files of a folder here; nothing is moved when left out"""
    workers: int = Field(os.cpu_count() or 1, ge=1)


def run(config: CheckDataConfig) -> int:
    """Print the report; returns how many images can not be read."""
    if not config.source:
        raise ValueError("name a folder, as in `python scripts/data.py check my_photos`")
    sources = [open_user_data(config.source, split, streams=DataConfig().shard_streams) for split in ("train", "test")]
    print(sources[0].description)
    encode = Tokenizer(config.max_tokens).encode
    report, shown = inspect_dataset(
        sources,
        lambda caption: len(encode(caption)) + 2,
        limit=config.max_tokens,
        shown=config.sheet_images,
        workers=config.workers,
    )
    print("\n".join(report.format(config.size, config.max_tokens)))
    if config.contact_sheet and shown:
        thumbs = [seen.thumb for seen in shown if seen.thumb]
        imaging.save_image(
            imaging.captioned_grid(thumbs, [seen.caption for seen in shown], columns=8), config.contact_sheet
        )
        print(f"contact sheet: {config.contact_sheet}")
    if config.quarantine:
        move(Path(config.source), config.quarantine, list(report.unreadable))
        print(f"{len(report.unreadable):,} files moved to {config.quarantine}")
        if report.unreadable and (table := find_metadata(Path(config.source))):
            print(f"{table} may name them still: take their lines out before you train")
    return len(report.unreadable)


def move(folder: Path, target: Path, names: list[str]) -> None:
    """Move files out of a folder, at the same places below `target`; ValueError when it is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: only files of a folder can be moved to a quarantine")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--quarantine {target} lies in {folder} itself: name a folder elsewhere")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, target / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(CheckDataConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        run(config)


if __name__ == "__main__":
    main()
