"""Look at a set of images before training on it: sizes, unreadable files, duplicates, captions, a contact sheet."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from tyro.conf import Positional

from ldm import pictures
from ldm.config import ScriptConfig, errors_for_people, parse
from ldm.data import DataConfig, open_files
from ldm.data.check import check
from ldm.data.images import metadata_of
from ldm.text.encoder import make_tokenizer


class Data(ScriptConfig):
    """Settings of data."""

    command: Positional[Literal["check"]] = "check"
    source: Positional[str] = ""
    """folder, parquet file, hub id or shards, as in data.source"""
    size: int = Field(256, ge=8)
    """side that training will want"""
    limit: int = Field(77, ge=3)
    """tokens that the text tower reads, start and end among them"""
    sheet: Path | None = None
    """write a contact sheet, a PNG, of the first pictures with their captions"""
    shown: int = Field(48, ge=1)
    """pictures on it"""
    quarantine: Path | None = None
    """move unreadable files of a folder here; nothing is moved when left out"""
    workers: int = Field(os.cpu_count() or 1, ge=1)


def run(config: Data) -> int:
    """Print the report; returns how many images can not be read."""
    if not config.source:
        raise ValueError("name a folder, as in `python scripts/data.py check my_photos`")
    sources = [open_files(config.source, split, streams=DataConfig().streams) for split in ("train", "test")]
    print(sources[0].description)
    encode = make_tokenizer(config.limit).encode_all
    report, shown = check(
        sources,
        lambda caption: len(encode(caption)) + 2,
        limit=config.limit,
        shown=config.shown,
        workers=config.workers,
    )
    print("\n".join(report.lines(config.size, config.limit)))
    if config.sheet and shown:
        thumbs = [seen.thumb for seen in shown if seen.thumb]
        pictures.save(pictures.captioned(thumbs, [seen.caption for seen in shown], columns=8), config.sheet)
        print(f"contact sheet: {config.sheet}")
    if config.quarantine:
        move(Path(config.source), config.quarantine, list(report.unreadable))
        print(f"{len(report.unreadable):,} files moved to {config.quarantine}")
        if report.unreadable and (table := metadata_of(Path(config.source))):
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
    config = parse(Data, argv, default=None, description=__doc__)
    with errors_for_people():
        run(config)


if __name__ == "__main__":
    main()
