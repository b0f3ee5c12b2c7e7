"""One writer for each folder: a lock of the operating system, which ends with its process, however that ends."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from ldm.io.atomic import disk_errors
from ldm.training.distributed import on_rank0


@contextmanager
def only_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of a folder, on rank 0, for all ranks; ValueError names the process that has it."""
    file, holder = folder / ".lock", folder / ".lock-holder"
    lock = FileLock(file, timeout=0)

    def acquire() -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                other = holder.read_text() if holder.is_file() else "another process"
                raise ValueError(f"{folder} is written by {other}: wait or stop that, or use another folder") from None
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    try:
        on_rank0(accelerator, acquire)
        yield
    finally:
        if lock.is_locked:
            for path in (holder, file):
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()
            lock.release()
