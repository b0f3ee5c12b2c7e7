"""Tar files of images and captions, as webdataset has them: read from begin to end, in bounded memory."""

import itertools
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from ldm.data.sources.base import CAPTION_COLUMNS, parse_captions
from ldm.data.sources.encoded import SUFFIXES
from ldm.data.sources.shard import ShardRow, open_url

CAPTION_SUFFIXES = ("txt", *CAPTION_COLUMNS)  # of the files in a tar that hold a caption
MAX_IMAGE_BYTES = 2**28  # of a file that are read, by what it holds
MAX_TEXT_BYTES = 2**20


def count_tar_rows(url: str) -> int:
    """How many samples of a tar have an image; the file is read whole for it."""
    return sum(1 for _ in _samples(url))


def tar_rows(url: str) -> Iterator[ShardRow]:
    """The samples of a tar that have an image, in order."""
    for sample in _samples(url):
        try:
            yield ShardRow(_image(sample), parse_captions(*_caption_cell(sample)), None)
        except ValueError as error:
            yield ShardRow(None, [], str(error))


def _samples(url: str) -> Iterator[dict[str, bytes]]:
    """Each is a run of files that have the same name up to the first dot, by what follows it."""
    for _, files in itertools.groupby(_members(url), key=lambda member: _split_name(member[0])[0]):
        sample: dict[str, bytes] = {}
        for path, content in files:
            sample.setdefault(_split_name(path)[1], content)
        if _image(sample) is not None:
            yield sample


def _members(url: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of the images and captions in a tar, without links and hidden files, large ones truncated."""
    with open_url(url) as file, tarfile.open(fileobj=file, mode="r|*", bufsize=2**17) as tar:
        for member in tar:
            limit = _max_bytes(_split_name(member.name)[1])
            hidden = member.name.rpartition("/")[2].startswith((".", "__"))
            if member.isfile() and limit and not hidden and (content := tar.extractfile(member)):
                yield member.name, content.read(limit)
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all
        # Two blocks of zeros end a tar. For tarfile a damaged header, or the end of the file, does as well.
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is damaged, or cut off")


def _split_name(path: str) -> tuple[str, str]:
    """Name of the sample, and ending, of a file in a tar."""
    folder, _, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _max_bytes(ending: str) -> int:
    """The bytes that are read of a file, by its ending; 0: it is neither image nor caption."""
    if f".{ending}".endswith(SUFFIXES):
        return MAX_IMAGE_BYTES
    return MAX_TEXT_BYTES if ending in (*CAPTION_SUFFIXES, "json") else 0


def _image(sample: dict[str, bytes]) -> bytes | None:
    return next((content for ending, content in sample.items() if f".{ending}".endswith(SUFFIXES)), None)


def _caption_cell(sample: dict[str, bytes]) -> tuple[Any, str]:
    """The caption of a sample, from a text file or the JSON, and how to name that in a message."""
    try:
        for ending in CAPTION_SUFFIXES:
            if ending in sample:
                return sample[ending].decode("utf-8-sig"), "its text"
        values = json.loads(sample.get("json", b"{}"))
        return next((values[name] for name in CAPTION_COLUMNS if name in values), None), "its JSON"
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its caption is not UTF-8, or not JSON") from None
