"""Shards on this machine: downloaded whole when they are needed, read row by row, the least recently used removed."""

import contextlib
import itertools
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from filelock import FileLock

from ldm.data.sources.shard import ROWS_PER_BATCH, ShardReadError, ShardRow, read_rows
from ldm.io.atomic import atomic_write, disk_errors

PREFETCH_SLOTS = threading.Semaphore(4)  # files that a process downloads ahead at a time


class ShardRange(NamedTuple):
    """The rows of a shard that are in a split."""

    url: str
    content_hash: str
    first: int
    rows: int


class ShardColumn(Sequence[Any]):
    """One field of all rows, read on access."""

    def __init__(self, cache: "ShardCache", name: str) -> None:
        self.cache, self.name = cache, name

    def __len__(self) -> int:
        return self.cache.starts[-1]

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        part, row = self.cache.locate(range(len(self))[index])
        if self.name == "name":
            return f"{self.cache.ranges[part].url}, row {row}"
        batch = self.cache.open(part).get_batch(row // ROWS_PER_BATCH)
        if self.name == "image" and (error := batch["error"][row % ROWS_PER_BATCH].as_py()):
            raise ValueError(error)
        return batch[self.name][row % ROWS_PER_BATCH].as_py()


class ShardCache:
    """The shards of a split that are on this machine, for all its processes."""

    def __init__(self, ranges: Sequence[ShardRange], folder: Path, *, max_files: int) -> None:
        self.ranges, self.folder, self.max_files = ranges, folder, max_files
        self.starts = [0, *itertools.accumulate(span.rows for span in ranges)]

    def locate(self, index: int) -> tuple[int, int]:
        """Which range an item is in, and its row in the shard."""
        part = bisect_right(self.starts, index) - 1
        return part, self.ranges[part].first + index - self.starts[part]

    def path(self, part: int) -> Path:
        """Where the shard of a range is cached."""
        return self.folder / f"{self.ranges[part].content_hash}.arrow"

    def open(self, part: int) -> pyarrow.ipc.RecordBatchFileReader:
        """All rows of the shard of a range, downloaded if need be; not to be kept, as a removed file takes room."""
        path = self.path(part)
        try:
            os.utime(path)  # it is in use
            return open_rows(path)
        except (OSError, ValueError):  # it is not there, or a full disk has cut it off
            path.unlink(missing_ok=True)
            self.download(part)
            return open_rows(path)

    def prefetch(self, parts: Sequence[int]) -> None:
        """Begin to download shards that are needed soon; one that fails is tried again in its turn."""
        for part in parts:
            if not self.path(part).exists():
                threading.Thread(target=self._try_download, args=[part], daemon=True).start()

    def _try_download(self, part: int) -> None:
        with PREFETCH_SLOTS, contextlib.suppress(ShardReadError):
            self.download(part)

    def download(self, part: int) -> None:
        """Cache the shard of a range, unless it is there; one process does it for all."""
        (url, content_hash, first, rows), path = self.ranges[part], self.path(part)
        try:
            with disk_errors(path), FileLock(self.folder / f".lock-{int(content_hash, 16) % 64}"):
                if not path.is_file():
                    with atomic_write(path) as partial:
                        written = write_rows(partial, read_rows(url))
                        if written < first + rows:
                            raise ValueError(f"{url} has {written:,} rows now, not {first + rows:,}: start again")
                    self._evict_lru()
        except ValueError as error:  # no image is to blame for a full disk
            raise ShardReadError(str(error)) from None

    def _evict_lru(self) -> None:
        """Remove the least recently used files. A process that has one open can go on reading it."""
        with contextlib.suppress(FileNotFoundError):  # another process removes some at this moment
            files = sorted(self.folder.glob("[!.]*.arrow"), key=lambda path: path.stat().st_mtime)
            for path in files[: -self.max_files]:
                path.unlink()


def write_rows(path: Path, rows: Iterator[ShardRow]) -> int:
    """Write a file that can be read row by row, in arrow's IPC format; returns how many rows there are."""
    captions = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema({"image": pyarrow.large_binary(), "captions": captions, "error": pyarrow.string()})
    written = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        while batch := [row._asdict() for row in itertools.islice(rows, ROWS_PER_BATCH)]:
            writer.write(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            written += len(batch)
    return written


def open_rows(path: Path) -> pyarrow.ipc.RecordBatchFileReader:
    """A file of `write_rows`, mapped into memory. OSError or ValueError: it is missing, or cut off."""
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
