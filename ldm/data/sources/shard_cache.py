"""Shards on this machine: downloaded whole when they are needed, read row by row, the least recently used removed."""

import contextlib
import itertools
import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from ldm.data.sources.shard import Shard, ShardReadError, ShardRow, is_tar, shard_errors
from ldm.data.sources.table import parquet_rows
from ldm.data.sources.webdataset import tar_rows
from ldm.io.atomic import atomic_write, disk_errors

if TYPE_CHECKING:
    import pyarrow

PREFETCH_SLOTS = threading.Semaphore(4)  # files that a process downloads ahead at a time
ROWS_PER_CHUNK = 64  # rows that are in memory while a shard is downloaded, or fewer large ones:
MAX_CHUNK_BYTES = 2**28
CHECKSUM_BYTES = 4  # CRC-32, at the end of a cached file


class ShardRange(NamedTuple):
    """The rows of a shard that are in a split."""

    shard: Shard
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
            return f"{self.cache.ranges[part].shard.url}, row {row}"
        table = self.cache.open(part)
        if self.name == "image" and (error := table["error"][row].as_py()):
            raise ValueError(error)
        return table[self.name][row].as_py()


class ShardCache:
    """The shards of a split that are on this machine, for all its processes."""

    def __init__(self, ranges: Sequence[ShardRange], folder: Path, *, max_files: int) -> None:
        self.ranges, self.folder, self.max_files = ranges, folder, max_files
        self.starts = [0, *itertools.accumulate(span.rows for span in ranges)]
        self._opened: dict[int, pyarrow.Table] = {}
        self._remove_unfinished()

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which may be removed before another process begins."""
        return {**self.__dict__, "_opened": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """Which range an item is in, and its row in the shard."""
        part = bisect_right(self.starts, index) - 1
        return part, self.ranges[part].first + index - self.starts[part]

    def path(self, shard: Shard) -> Path:
        """Where a shard is cached."""
        return self.folder / f"{shard.content_hash}.arrow"

    def open(self, part: int) -> "pyarrow.Table":
        """All rows of the shard of a range, downloaded if need be."""
        shard, first, rows = self.ranges[part]
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(shard))  # it is in use
        table = self._opened.get(part)
        if table is None:
            table = self._open(shard)
            if len(table) < first + rows:
                self.path(shard).unlink(missing_ok=True)
                raise ShardReadError(f"{shard.url} has {len(table):,} rows now, not {first + rows:,}: start again")
            # A removed file takes room until all have closed it. (Threads may do this at once.)
            cached = {n: other for n, other in list(self._opened.items()) if self.path(self.ranges[n].shard).exists()}
            self._opened = {**cached, part: table}
        return table

    def prefetch(self, parts: Sequence[int]) -> None:
        """Begin to download shards that are needed soon; one that fails is tried again in its turn."""
        for part in parts:
            if not self.path(self.ranges[part].shard).exists():
                threading.Thread(target=self._try_download, args=[self.ranges[part].shard], daemon=True).start()

    def _try_download(self, shard: Shard) -> None:
        with PREFETCH_SLOTS, contextlib.suppress(ValueError):
            self._download(shard)

    def _open(self, shard: Shard) -> "pyarrow.Table":
        for _ in range(2):  # another process may have removed the file meanwhile, or a full disk have cut it off
            path = self._download(shard)
            table = open_rows(path)
            if table is not None:
                return table
            path.unlink(missing_ok=True)
        raise ShardReadError(f"{shard.url} was downloaded twice, and {path} is damaged: check that disk")

    def _download(self, shard: Shard) -> Path:
        path = self.path(shard)
        try:
            with disk_errors(path), self._lock(shard.content_hash):  # one process does it for all
                if not path.is_file():
                    with atomic_write(path) as partial:
                        write_rows(partial, read_rows(shard.url))
                    self._evict_lru()
        except ValueError as error:  # no image is to blame for a full disk
            raise ShardReadError(str(error)) from None
        return path

    def _lock(self, content_hash: str, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f".lock-{int(content_hash, 16) % 64}", timeout=timeout)

    def _remove_unfinished(self) -> None:
        """Remove what killed processes left."""
        for partial in self.folder.glob(".*.arrow"):
            with contextlib.suppress(Timeout), self._lock(partial.stem[1:], timeout=0):
                partial.unlink(missing_ok=True)

    def _evict_lru(self) -> None:
        """Remove the least recently used files. A process that has one open can go on reading it."""
        for path in sorted(self.folder.glob("[!.]*.arrow"), key=_last_use)[: -self.max_files]:
            path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0


def read_rows(url: str) -> Iterator[ShardRow]:
    """The rows of a shard, from begin to end. ShardReadError when it cannot be read, or is cut off."""
    with shard_errors(url):
        yield from tar_rows(url) if is_tar(url) else parquet_rows(url)


def write_rows(path: Path, rows: Iterable[ShardRow]) -> None:
    """Write a file that can be read row by row: arrow's stream format, and its checksum."""
    import pyarrow

    captions = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema({"image": pyarrow.large_binary(), "captions": captions, "error": pyarrow.string()})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for chunk in _chunks(rows):
            writer.write(pyarrow.RecordBatch.from_pylist([row._asdict() for row in chunk], schema=schema))
    with pyarrow.memory_map(str(path)) as file:
        checksum = zlib.crc32(file.read_buffer())
    with path.open("ab") as file:
        file.write(checksum.to_bytes(CHECKSUM_BYTES, "big"))


def open_rows(path: Path) -> "pyarrow.Table | None":
    """The rows of a cached shard, mapped into memory; None for a file that is missing, or not as it was written."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            content = file.read_buffer()
        rows, checksum = content.slice(0, max(0, len(content) - CHECKSUM_BYTES)), memoryview(content)[-CHECKSUM_BYTES:]
        if zlib.crc32(rows) != int.from_bytes(checksum, "big"):
            return None
        return pyarrow.ipc.open_stream(rows).read_all()
    except (OSError, pyarrow.ArrowException):
        return None


def _chunks(rows: Iterable[ShardRow]) -> Iterator[list[ShardRow]]:
    """As many rows at a time as may be in memory."""
    chunk: list[ShardRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.image or b"")
        if len(chunk) == ROWS_PER_CHUNK or size > MAX_CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
