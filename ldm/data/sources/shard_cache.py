"""TODO."""

import contextlib
import itertools
import json
import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from ldm.io.atomic import atomic_write, disk_errors

if TYPE_CHECKING:
    import datasets
from ldm.data.sources.webdataset import (
    MAX_IMAGE_BYTES,
    ROWS_PER_CHUNK,
    Shard,
    ShardReadError,
    ShardRow,
    _reason,
    read_rows,
)

FETCH_ATTEMPTS = 8  # times that a shard is fetched before its file counts as unreadable
PREFETCH_SLOTS = threading.Semaphore(4)  # files that a process fetches ahead at a time


class ShardRange(NamedTuple):
    """The rows of a shard that are in a split."""

    shard: Shard
    first: int
    rows: int


class ShardColumn(Sequence[Any]):
    """One field of all rows, read when it is asked for."""

    def __init__(self, store: "ShardCache", name: str) -> None:
        self.store, self.name = store, name

    def __len__(self) -> int:
        return self.store.starts[-1]

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        number, row = self.store.locate(range(len(self))[index])
        if self.name == "name":
            return f"{self.store.spans[number].shard.url}, row {row}"
        found = self.store.rows(number)[row]
        if found.pop("checksum") != _checksum(found):
            raise ShardReadError(self.store.evict(number))
        if self.name == "image" and found["error"]:
            raise ValueError(found["error"])
        return found[self.name]


class ShardCache:
    """The shards that are on this machine."""

    def __init__(self, spans: Sequence[ShardRange], folder: Path, *, keep: int) -> None:
        self.spans, self.folder, self.keep = spans, folder, keep
        self.starts = [0, *itertools.accumulate(span.rows for span in spans)]
        self._opened: dict[int, datasets.Dataset] = {}
        self._remove_unfinished()

    def locate(self, index: int) -> tuple[int, int]:
        """The number of an item's span, and its row in the shard."""
        number = bisect_right(self.starts, index) - 1
        return number, self.spans[number].first + index - self.starts[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without the files that are open, which may be gone when another process begins."""
        return {**self.__dict__, "_opened": {}}

    def rows(self, number: int) -> "datasets.Dataset":
        """The rows of a shard, fetched if need be."""
        shard, first, rows = self.spans[number]
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(shard))  # it is used
        opened = self._opened.get(number)
        if opened is None:
            opened = self._open(shard)
            if len(opened) < first + rows:
                self.path(shard).unlink(missing_ok=True)
                raise ShardReadError(f"{shard.url} has {len(opened):,} rows now, not {first + rows:,}: start again")
            # A removed file takes room until all have closed it. (Threads may do this at once.)
            kept = {n: file for n, file in list(self._opened.items()) if self.path(self.spans[n].shard).exists()}
            self._opened = {**kept, number: opened}
        return opened

    def _open(self, shard: Shard) -> "datasets.Dataset":
        import datasets
        import pyarrow

        for _ in range(FETCH_ATTEMPTS):
            path = self._fetch(shard)
            try:
                opened = datasets.Dataset.from_file(str(path))
                opened.data.validate(full=True)  # without it a changed offset would be followed out of the file
                if opened.data.schema != _schema():
                    raise ValueError("it has other columns")
                return opened
            except FileNotFoundError:  # another process made room meanwhile
                reason = "it is removed at once"
            except (pyarrow.ArrowException, ValueError, OSError) as error:  # not all of it came to the disk
                reason = _reason(error)
                path.unlink(missing_ok=True)
        raise ShardReadError(f"{shard.url} was fetched {FETCH_ATTEMPTS} times, and {path} can not be read: {reason}")

    def evict(self, number: int) -> str:
        """Remove the file of a shard, which was changed; returns what to say."""
        path = self.path(self.spans[number].shard)
        path.unlink(missing_ok=True)
        self._opened.pop(number, None)
        return f"{path} was damaged, and is removed: start again"

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to fetch shards that will be needed; one that fails is tried again, and told of, in its turn."""
        for number in numbers:
            if not self.path(self.spans[number].shard).exists():
                threading.Thread(target=self._try, args=[self.spans[number].shard], daemon=True).start()

    def _try(self, shard: Shard) -> None:
        with PREFETCH_SLOTS, contextlib.suppress(ValueError):
            self._fetch(shard)

    def _fetch(self, shard: Shard) -> Path:
        path = self.path(shard)
        try:
            with disk_errors(path), self._lock(shard.key):  # one process fetches it for all
                if not path.is_file():
                    with atomic_write(path) as beside:
                        write_rows(beside, read_rows(shard.url))
                    self._evict_lru()
        except ValueError as error:  # no image is to blame for a full disk
            raise ShardReadError(str(error)) from None
        return path

    def _lock(self, key: str, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f".lock-{int(key, 16) % 64}", timeout=timeout)

    def _remove_unfinished(self) -> None:
        """Remove what processes left that were killed."""
        for beside in self.folder.glob(".*.arrow"):
            with contextlib.suppress(Timeout), self._lock(beside.stem[1:], timeout=0):
                beside.unlink(missing_ok=True)

    def path(self, shard: Shard) -> Path:
        """Where a shard is kept."""
        return self.folder / f"{shard.key}.arrow"

    def _evict_lru(self) -> None:
        """Remove the files that were not used for the longest time. Who has one open can go on reading it."""
        for path in sorted(self.folder.glob("[!.]*.arrow"), key=_last_use)[: -self.keep]:
            path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process made room meanwhile
        return 0


def write_rows(path: Path, rows: Iterable[ShardRow]) -> None:
    """Write a file that can be read row by row."""
    import pyarrow

    schema = _schema()
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for chunk in _chunks(rows):
            told = [{**row._asdict(), "checksum": _checksum(row._asdict())} for row in chunk]
            writer.write(pyarrow.RecordBatch.from_pylist(told, schema=schema))


def _checksum(row: dict[str, Any]) -> int:
    """CRC-32 of what is kept of a row."""
    return zlib.crc32(json.dumps([row["captions"], row["error"]]).encode(), zlib.crc32(row["image"] or b""))


def _schema() -> Any:
    import pyarrow

    captions = pyarrow.list_(pyarrow.string())
    columns = {"image": pyarrow.large_binary(), "captions": captions, "error": pyarrow.string()}
    return pyarrow.schema({**columns, "checksum": pyarrow.uint32()})


def _chunks(rows: Iterable[ShardRow]) -> Iterator[list[ShardRow]]:
    """As many rows as may be in memory."""
    chunk: list[ShardRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == ROWS_PER_CHUNK or sum(len(row.image or b"") for row in chunk) > MAX_IMAGE_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
