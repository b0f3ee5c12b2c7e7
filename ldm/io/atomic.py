"""Atomic file writes: a temporary file in the same folder, then renamed into place."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
        first += " or close what has the file open" * isinstance(error, PermissionError)
        raise ValueError(f"{path} could not be written ({error}): {first} and {remedy}") from None


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
        tmp_path.write_text(text, encoding="utf-8", newline="\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with `metadata` in its header."""
    with atomic_write(path) as tmp_path:
        save_tensors(tmp_path, tensors, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as any new file; safetensors itself makes a private one."""
    path.unlink(missing_ok=True)  # a private one of a run that was killed
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    if path.stat().st_mode != mode:
        path.chmod(mode)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk; systems that cannot open a folder flush it themselves."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes none opened for reading
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
