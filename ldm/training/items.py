"""Which samples a run is trained on: a checkpoint is resumed on the same ones, wherever they are stored."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.io.atomic import write_text

ITEMS_FILE = "items.json"  # in the folder of a run, where the samples have names
MAX_NAMED = 3
REMEDY = "resume with the same ones, or train on these in another --run"


def write_items(run: Path, names: Sequence[str]) -> None:
    """Note the names of the samples, to tell later which were added."""
    if names:
        write_text(run / ITEMS_FILE, json.dumps(list(names)))


def check_items(path: Path, progress: dict[str, Any], fingerprint: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError where the checkpoint at `path` was trained on other samples: how many were added, and removed."""
    saved, own = progress["fingerprint"].get("data", {}), fingerprint["data"]
    if saved.get("items", own.get("items")) != own.get("items"):
        raise ValueError(f"{path} was trained on other images: {_changes(path.parent.parent / ITEMS_FILE, names)}")
    if saved.get("content", own.get("content")) != own.get("content"):
        raise ValueError(f"{path} was trained on other images of the same names: {REMEDY}")


def _changes(file: Path, names: Sequence[str]) -> str:
    """What was added and removed since `file` was written, and what to do."""
    try:
        before = set(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return REMEDY
    added, removed = sorted(set(names) - before), sorted(before - set(names))
    if added and not removed:
        return f"{_count(added, 'added')}, none removed; move them away to resume, or train on all in another --run"
    return f"{_count(added, 'added')}, {_count(removed, 'removed')}; {REMEDY}"


def _count(names: Sequence[str], what: str) -> str:
    """How many they are, with the first of them."""
    first = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return f"{len(names):,} {what}" + (f" ({first})" if names else "")
