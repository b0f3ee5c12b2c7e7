"""Model folders: a model.json that explains the weights beside it, and how the newest finished one is found."""

import json
from pathlib import Path
from typing import Any, TypeVar

from ldm.config import Config
from ldm.io.atomic import write_text

MODEL_FORMAT = "ldm-model-1"
Card = TypeVar("Card", bound=Config)


def write_manifest(folder: Path, kind: str, values: dict[str, Any]) -> None:
    """Write model.json, which is last to appear: a folder that has it is finished."""
    write_text(folder / "model.json", json.dumps({"format": MODEL_FORMAT, "kind": kind, **values}, indent=2))


def read_manifest(folder: Path, kind: str, card: type[Card]) -> Card:
    """What model.json says; ValueError when the folder is missing, holds something else or is of another version."""
    path = folder / "model.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model folder (it has no model.json); name RUN/model of a finished run")
    values = _values(path)
    if values.get("format") != MODEL_FORMAT or values.get("kind") != kind:
        raise ValueError(f"{folder} holds a {values.get('kind', 'foreign model')}, a {kind} is needed")
    return card.from_dict({k: v for k, v in values.items() if k not in ("format", "kind")}, source=str(path))


def read_text(path: Path) -> str:
    """A file of a model folder, or one that a person wrote; ValueError when it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: copy the folder again") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text: save it as UTF-8") from None


def latest_model(kind: str, root: Path, *, script: str) -> Path:
    """The model folder of this kind below `root` that was finished last; ValueError names the script that makes one."""
    found = []
    for path in root.glob("**/model/model.json"):
        if _values(path).get("kind") == kind:
            found.append(path)
    if not found:
        raise ValueError(f"no finished {kind} below {root}: run `{script}` first, or name one")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _values(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: copy the model folder again, or remove it") from None
