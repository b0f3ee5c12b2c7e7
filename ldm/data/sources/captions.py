"""Captions as they stand in files and tables, and names for messages."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

CAPTION_COLUMNS = ("caption", "text", "prompt")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # not a character: from a JSON escape, or a file name that is not UTF-8
Captions = Sequence[str | list[str]]  # one, or several, for each item


def as_caption_list(entry: str | list[str]) -> list[str]:
    """The captions of one item."""
    return [entry] if isinstance(entry, str) else entry


def parse_captions(cell: Any, where: str) -> str | list[str]:
    """The caption of a cell, or the captions of one that holds a list; ValueError for what is not text."""
    if isinstance(cell, list):
        return [text for text in (_parse_caption(item, where) for item in cell) if text]
    return _parse_caption(cell, where)


def _parse_caption(value: Any, where: str) -> str:
    """A caption on one line; "" for a missing one, which pandas writes as NaN. Numbers are text, too."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float) or LONE_SURROGATE.search(text := one_line(value)):
        raise ValueError(f"{where}: the caption {reprlib.repr(value)} is not text; write text, or a list of texts")
    return text


def one_line(value: Any) -> str:
    """A value as text on one line."""
    return " ".join(str(value).split())


def first_names(names: Sequence[str], count: int = 5) -> str:
    """The first of some names, for a message."""
    return ", ".join(map(one_line, names[:count])) + (", ..." if len(names) > count else "")


def check_utf8_names(names: Sequence[str], where: str) -> None:
    """ValueError unless all names of files are UTF-8."""
    for name in filter(LONE_SURROGATE.search, names):
        raise ValueError(f"{where}: the name {name!a} is not UTF-8; rename that file")
