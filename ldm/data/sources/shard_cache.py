"""Shards on this machine: downloaded whole when they are needed, read row by row, the least recently used removed."""

import contextlib
import itertools
import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from filelock import FileLock, Timeout

from ldm.data.sources.base import ShardReadError
from ldm.data.sources.shard import ROWS_PER_BATCH, ShardRow, read_rows
from ldm.io.atomic import atomic_write, disk_errors

MAX_BATCH_BYTES = 2**28  # of images in memory while a shard is downloaded
CHECKSUM_BYTES = 4  # CRC-32, at the end of a cached file
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
        table = self.cache.open(part)
        if self.name == "image" and (error := table["error"][row].as_py()):
            raise ValueError(error)
        return table[self.name][row].as_py()


class ShardCache:
    """The shards of a split that are on this machine, for all its processes."""

    def __init__(self, ranges: Sequence[ShardRange], folder: Path, *, max_files: int) -> None:
        self.ranges, self.folder, self.max_files = ranges, folder, max_files
        self.starts = [0, *itertools.accumulate(span.rows for span in ranges)]
        self._tables: dict[int, pyarrow.Table] = {}  # of the shards that are open
        for partial in folder.glob(".*.arrow"):  # of killed processes
            with contextlib.suppress(Timeout), self._lock(partial.stem[1:], timeout=0):
                partial.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which may be removed before another process begins."""
        return {**self.__dict__, "_tables": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """Which range an item is in, and its row in the shard."""
        part = bisect_right(self.starts, index) - 1
        return part, self.ranges[part].first + index - self.starts[part]

    def path(self, part: int) -> Path:
        """Where the shard of a range is cached."""
        return self.folder / f"{self.ranges[part].content_hash}.arrow"

    def open(self, part: int) -> pyarrow.Table:
        """All rows of the shard of a range, downloaded if need be."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(part))  # it is in use
        table = self._tables.get(part)
        if table is None:
            table = self._open(part)
            # A removed file takes room until all have closed it. (Threads may do this at once.)
            cached = {n: other for n, other in list(self._tables.items()) if self.path(n).exists()}
            self._tables = {**cached, part: table}
        return table

    def _open(self, part: int) -> pyarrow.Table:
        for _ in range(2):  # another process may have removed the file meanwhile, or a full disk have cut it off
            self.download(part)
            if (table := open_rows(self.path(part))) is not None:
                return table
            self.path(part).unlink(missing_ok=True)
        raise ShardReadError(
            f"{self.ranges[part].url} was downloaded twice, and {self.path(part)} is damaged: check that disk"
        )

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
            with disk_errors(path), self._lock(content_hash):
                if not path.is_file():
                    with atomic_write(path) as partial:
                        written = write_rows(partial, read_rows(url))
                        if written < first + rows:
                            raise ValueError(f"{url} has {written:,} rows now, not {first + rows:,}: start again")
                    self._evict_lru()
        except ValueError as error:  # no image is to blame for a full disk
            raise ShardReadError(str(error)) from None

    def _lock(self, content_hash: str, *, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f".lock-{int(content_hash, 16) % 64}", timeout=timeout)

    def _evict_lru(self) -> None:
        """Remove the least recently used files. A process that has one open goes on reading; on Windows it stays."""
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another process removes some at this moment
            files = sorted(self.folder.glob("[!.]*.arrow"), key=lambda path: path.stat().st_mtime)
            for path in files[: -self.max_files]:
                path.unlink()


def write_rows(path: Path, rows: Iterator[ShardRow]) -> int:
    """Write a file that can be read row by row, arrow's stream format and its CRC-32; returns how many rows it has."""
    captions = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema({"image": pyarrow.large_binary(), "captions": captions, "error": pyarrow.string()})
    written = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _batches(rows):
            writer.write(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            written += len(batch)
    with pyarrow.memory_map(str(path)) as file:
        checksum = zlib.crc32(file.read_buffer())
    with path.open("ab") as file:
        file.write(checksum.to_bytes(CHECKSUM_BYTES, "big"))
    return written


def _batches(rows: Iterator[ShardRow]) -> Iterator[list[dict[str, Any]]]:
    """As many rows at a time as may be in memory."""
    batch, size = [], 0
    for row in rows:
        batch.append(row._asdict())
        size += len(row.image or b"")
        if len(batch) == ROWS_PER_BATCH or size > MAX_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_rows(path: Path) -> pyarrow.Table | None:
    """A file of `write_rows`, mapped into memory; None for one that is missing, or not as it was written."""
    try:
        with pyarrow.memory_map(str(path)) as file:
            content = file.read_buffer()
        rows, checksum = content.slice(0, max(0, len(content) - CHECKSUM_BYTES)), memoryview(content)[-CHECKSUM_BYTES:]
        if zlib.crc32(rows) != int.from_bytes(checksum, "big"):
            return None
        return pyarrow.ipc.open_stream(rows).read_all()
    except (OSError, pyarrow.ArrowException):
        return None
