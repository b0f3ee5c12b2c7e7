"""Atomic file writes: a temporary file in the same folder, then renamed into place."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def disk_errors(path: Path, remedy: str = "try again") -> Iterator[None]:
    """Turn the errors of a full or failing disk, or of a folder that is not writable, into a ValueError with `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = not isinstance(error, OSError) or error.errno in (None, *DISK_FULL_ERRNOS)
        first = "free some space" if full else "pass a writable folder"
        raise ValueError(f"{path} could not be written ({error}): {first} and {remedy}") from None


def check_folder(folder: Path, flag: str) -> None:
    """Make a folder to write to; ValueError names the flag when that fails, before any work is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if os.path.isfile(path)), None)
        reason = f"{file} is a file" if file else f"{folder} cannot be written ({error.strerror})"
        raise ValueError(f"{flag} {reason}: pass a folder that can be written") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which then replaces `path`; ValueError when it fails, with `path` unchanged."""
    tmp_path = path.with_name(f".{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp_path
            tmp_path.replace(path)
        finally:
            tmp_path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with `metadata` in its header."""
    with atomic_write(path) as tmp_path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, tmp_path, metadata)
