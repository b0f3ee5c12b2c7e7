"""One writer for each folder: a lock of the operating system, which ends with its process, however that ends."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from ldm.io.atomic import disk_errors, new_folder
from ldm.training.distributed import on_rank0

LOCK_FILE = ".lock"


@contextmanager
def only_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of a folder, on rank 0, for all ranks; ValueError names the process that has it.

    The folder is made, and removed again where nothing is written to it.
    """
    file, holder = folder / LOCK_FILE, folder / ".lock-holder"
    lock = FileLock(file, timeout=0)

    def acquire() -> None:
        with disk_errors(folder):
            stack.enter_context(new_folder(folder))
            try:
                lock.acquire()
            except Timeout:
                other = holder.read_text() if holder.is_file() else "another process"
                raise ValueError(f"{folder} is written by {other}: wait or stop that, or use another folder") from None
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    with ExitStack() as stack:
        try:
            on_rank0(accelerator, acquire)
            yield
        finally:
            if lock.is_locked:
                for path in (holder, file):
                    with suppress(OSError):  # Windows removes no open file
                        path.unlink()
                lock.release()


def has_writer(folder: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    if not (folder / LOCK_FILE).is_file():
        return False
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            return False
    except Timeout:
        return True
