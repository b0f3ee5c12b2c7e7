"""Atomic file writes: a temporary file in the same folder, then renamed into place."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
        first += " or close what has the file open" * isinstance(error, PermissionError)
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
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder where it is missing, also those above it; what is still empty at the end is removed again."""
    with disk_errors(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()


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
    """Write a safetensors file that others may read as any new file.

    safetensors itself writes a private one under a random name first, which stays where the process is killed: in a
    folder of its own, which the next call removes.
    """
    folder = path.with_name(f"{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        file = folder / path.name
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, metadata)
        with suppress(PermissionError):  # of a disk that has no permissions
            file.chmod(folder.stat().st_mode & 0o666)
        file.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
