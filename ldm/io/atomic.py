"""Files that are written whole or not at all: beside, then put in place."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def disk_errors(path: Path, remedy: str = "try again") -> Iterator[None]:
    """Turn what a full or failing disk, or a folder that takes no file, raises into a ValueError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = not isinstance(error, OSError) or error.errno in (None, *DISK_FULL_ERRNOS)
        first = "free some space" if full else "name a folder that you may write to"
        raise ValueError(f"{path} could not be written ({error}): {first} and {remedy}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which then takes its place.

    ValueError when that fails, for example on a full disk; what was there before is whole.
    """
    beside = path.with_name(f".{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole, with `about` in its header."""
    with atomic_write(path) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, about)
