"""A folder of images, as `imagefolder` of `datasets` has them; and what else is local."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from ldm.data.sources.base import (
    HELD_OUT_FRACTION,
    HELD_OUT_SPLITS,
    Split,
    check_split,
    first_names,
    hash_split,
    named_split,
)
from ldm.data.sources.captions import METADATA_FILES, SIDECAR_SUFFIXES, find_tables, read_captions
from ldm.data.sources.encoded import SUFFIXES, EncodedSource
from ldm.data.sources.table import open_hub, open_parquet

OTHER_IMAGE_SUFFIXES = (
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".svg", ".psd", ".exr", ".hdr", ".dds", ".qoi", ".pcx"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".dcm", ".nii", ".nii.gz"),
)
TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".xls", ".ods")
SKIPPED = {  # what files that are not read are, by their suffixes
    OTHER_IMAGE_SUFFIXES: "that are not PNG, JPEG or WEBP",
    SIDECAR_SUFFIXES: "texts that belong to no image without a caption",
    TABLE_SUFFIXES: f"tables that are not named {', '.join(METADATA_FILES)}, or stand beside one that is",
    ("",): "other files",
}


def open_images(source: str, split: Split) -> EncodedSource:
    """One split of a folder, a parquet file or a hub data set. ValueError: no image, captions of missing files."""
    path = Path(os.path.expanduser(source))  # which leaves an unknown user as it is
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return open_parquet(path, split)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return open_hub(source, split)
    raise ValueError(
        f"data.source {source}: no such folder or parquet file; "
        "give --data.source an existing one, a hub id org/name, or shapes, pairs or emoji"
    )


def find_metadata(root: Path) -> Path | None:
    """The table of captions in a folder, if there is one."""
    return next((root / name for name in find_tables([path.name for path in root.iterdir() if path.is_file()])), None)


def _open_folder(root: Path, split: Split) -> EncodedSource:
    """One split of the images below a folder."""
    check_split(split)
    files, loops = list_files(root)
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        content = "holds no PNG, JPEG or WEBP image" if files else "is empty"
        found = f"; it holds {_count_suffixes(files)}" if files else ""
        raise ValueError(f"{root}: this folder {content}; put images there or choose another --data.source{found}")
    captions = read_captions(root, files, images)
    names, notes = _choose_split(images, split)
    notes += captions.notes
    without = [name for name in images if not captions.by_image.get(name)]
    described = "no captions"
    if captions.origin:
        count, total = len(images) - len(without), sum(map(len, captions.by_image.values()))
        described = f"captions from {captions.origin}, {count:,} captioned"
        described += f" by {total:,} captions" if total > count else ""
        notes += [f"{len(without):,} images without a caption: {first_names(without)}"] if without else []
    if loops:
        notes.append(f"{len(loops):,} linked folders skipped, whose images are read already: {first_names(loops)}")
    notes += _describe_skipped(sorted(set(files) - set(images) - captions.files))
    return EncodedSource(
        names=names,
        images=[root / name for name in names],
        captions=[captions.by_image.get(name, []) for name in names],
        description=f"images: {len(images):,} files in {root}/, {described}",
        notes=notes,
    )


# Files.


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """Relative paths of all files below `root`, in order, without hidden ones; and linked folders left out.

    A linked folder is followed where it leads to no folder that is read already, and to none that holds it.
    """
    files, loops, seen = [], [], set[str]()
    trees = [str(root)]
    for tree in trees:  # which grows: the folders of a tree come before those that are linked from it
        real = os.path.realpath(tree)
        holds_link = Path(os.path.realpath(os.path.dirname(tree))).is_relative_to(real)
        if seen and (real in seen or holds_link):
            loops.append(os.path.relpath(tree, root))
            continue
        for folder, folders, names in os.walk(tree, onerror=_refuse):
            real, relative = os.path.realpath(folder), Path(folder).relative_to(root)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [(relative / name).as_posix() for name in names if not name.startswith(".")]
            trees += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
    return sorted(files), loops


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: this folder cannot be read ({error.strerror}); change its permissions")


def _describe_skipped(files: Sequence[str]) -> Iterator[str]:
    """A line for each kind of files that are not read."""
    kinds = defaultdict[str, list[str]](list)
    for name in files:
        kinds[next(why for suffixes, why in SKIPPED.items() if name.lower().endswith(suffixes))].append(name)
    for why, names in kinds.items():
        yield f"{len(names):,} skipped {why}: {first_names(names, 3)} ({_count_suffixes(names)})"


def _count_suffixes(names: Iterable[str]) -> str:
    """How many files there are of each suffix."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "without a suffix" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(12))


# Splits.


def _choose_split(images: Sequence[str], split: Split) -> tuple[list[str], list[str]]:
    """The images of a split, and what to say of it: the folder's own splits, or else a part that is held out."""
    own, notes = own_splits(images)
    return own[split] if own else [images[i] for i in hash_split(images, split)], notes


def own_splits(images: Sequence[str]) -> tuple[dict[Split, list[str]], list[str]]:
    """The images of both splits where a folder has them, else none; and what to say of it."""
    parts = _named_parts(images)
    own = next((kind for kind in HELD_OUT_SPLITS if kind in parts), None)
    trained = next((kind for kind in ("train", None) if kind in parts), "")  # a held-out folder may stand beside images
    if own and trained != "":
        notes = [f"held out: the {len(parts[own]):,} images of the {own} split of this folder"]
        others = sorted(name for kind, names in parts.items() if kind not in (trained, own) for name in names)
        notes += [f"{len(others):,} images skipped, in neither split: {first_names(others)}"] if others else []
        return {"train": parts[trained], "test": parts[own]}, notes
    notes = []
    if own:
        notes.append(
            f"{len(parts[own]):,} images are in folders named for a {own} split, but none elsewhere to train on: "
            f"{HELD_OUT_FRACTION:.0%} of all are held out"
        )
    return {}, notes


def _named_parts(images: Sequence[str]) -> dict[str | None, list[str]]:
    """Images by the split that the outermost of their folders says, if one does; or that all of their names say."""
    by_folder, by_name = (defaultdict[str | None, list[str]](list) for _ in range(2))
    for name in images:
        *folders, file = name.split("/")
        by_folder[next(filter(None, map(named_split, folders)), None)].append(name)
        by_name[named_split(file)].append(name)
    names_say = set(by_folder) == {None} and "train" in by_name and None not in by_name
    return by_name if names_say else by_folder
