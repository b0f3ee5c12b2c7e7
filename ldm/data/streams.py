"""Sets in shards, tar or parquet files of any file system: each is fetched when its turn comes, and makes room again.

The rows of all shards are counted once. A shard that is needed becomes a file in the cache folder of `datasets`, which
all processes of a machine share: encoded images, captions, or why a row can not be used.
"""

import contextlib
import itertools
import json
import math
import os
import re
import tarfile
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from filelock import FileLock, Timeout
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ldm.data.images import (
    CAPTION_COLUMNS,
    HELD_OUT,
    METADATA,
    SUFFIXES,
    Source,
    check_names,
    check_split,
    image_column,
    short_hash,
    wordings_in,
    wordings_of,
)
from ldm.data.order import Key, evenly, file_order
from ldm.data.shapes import Split
from ldm.files import disk_errors, in_place_of

if TYPE_CHECKING:
    import datasets

TARS = (".tar", ".tar.gz", ".tgz")
TEXTS = ("txt", *CAPTION_COLUMNS)  # endings of the files in a tar that hold a caption
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST = 10**6  # addresses that ranges may stand for
TEST = re.compile(r"(^|[^a-z])(test|val|valid|validation)([^a-z]|$)")  # in the name of a held-out shard
VERSION = ("ETag", "etag", "blob_id", "mtime", "created", "LastModified")  # what file systems tell of a file's content
LARGEST = 2**28  # bytes of an encoded image, and of those in memory while a shard is fetched
LONGEST = 2**20  # bytes of a text
NAMING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    b"X",
)  # read into memory
CHUNK = 64  # rows that are in memory while a shard is fetched, or fewer large ones
FETCHES = 8  # times that a shard is fetched before its file counts as unreadable
KEPT = 3  # files that are kept for each stream: its own, the next, and one that another process has not left yet
SLOTS = threading.Semaphore(4)  # files that a process fetches ahead at a time


class UnreadableShard(ValueError):
    """A whole shard that can not be read, or not be kept, which no other image can stand in for."""


class Shard(NamedTuple):
    """A file of a set, and a name for its content."""

    url: str
    key: str


class Span(NamedTuple):
    """The rows of a shard that are in a split."""

    shard: Shard
    first: int
    rows: int


class Row(NamedTuple):
    """What a shard says of one image; `error` says why it can not be used."""

    image: bytes | None
    captions: list[str]
    error: str | None


def in_shards(source: str) -> bool:
    """Whether a source names shards: an address, a pattern, a tar file, or a folder of tar or parquet files."""
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        return bool("://" in source or set(source) & set("*?") or RANGE.search(source) or source.endswith(TARS))
    names = [name for part in (folder, *filter(Path.is_dir, folder.iterdir())) for name in os.listdir(part)]
    return any(map(_is_shard, names)) and not any(name.lower().endswith(SUFFIXES) for name in names)


def open_shards(source: str, split: Split, *, streams: int) -> "Shards":
    """One split of a set in shards, of which at most 3 x `streams` are kept on this machine at a time.

    Shards that are named test or validation are held out; where there are none, the first 5 % of the rows of each.
    ValueError: no shard there, or one that can not be read.
    """
    import datasets  # slow, and other sets do not need it here

    check_split(split)
    shards = find_shards(source)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "shards" / short_hash(source)
    spans = _split(list(zip(shards, count_rows(shards, folder), strict=True)), split)
    if not spans:
        raise ValueError(
            f"data.source {source}: no row is left for the {split} split; write larger shards, or name one test"
        )
    store = Store(spans, folder, keep=KEPT * streams)
    told = f"shards: {len(shards):,} of {source}, fetched into {folder} as they are needed"
    return Shards(Rows(store, "name"), Rows(store, "image"), Rows(store, "captions"), told, spans=spans, store=store)


@dataclass(frozen=True)
class Shards(Source):
    """A source whose items lie in shards."""

    spans: Sequence[Span] = ()
    store: "Store" = field(kw_only=True)
    _expected: dict[int, int] = field(default_factory=dict, init=False)  # the last epoch in which a shard was needed

    def near(self, index: int) -> range:
        """The items of the same shard."""
        number = self.store.place(index)[0]
        return range(self.store.starts[number], self.store.starts[number + 1])

    def at_hand(self, index: int) -> bool:
        """Whether its shard is on this machine."""
        return self.store.path(self.spans[self.store.place(index)[0]].shard).exists()

    def spread(self, count: int) -> list[int]:
        """Items of at most 16 shards, which are spread over the set."""
        chosen = evenly(16, len(self.spans))
        items = [index for number in chosen for index in self.near(self.store.starts[number])]
        return [items[i] for i in evenly(count, len(items))]

    def digest(self) -> str:
        """A hash of which shards there are, and how many rows of each."""
        return short_hash(json.dumps([(Path(span.shard.url).name, *span[1:]) for span in self.spans]))

    def expect(self, keys: Iterable[Key], seed: int) -> None:
        """In a loading process, begin to fetch the shards of these samples, and those that come after them."""
        if get_worker_info() is None:
            return
        for key in keys:
            number = self.store.place(key.index)[0]
            if self._expected.get(number) != key.epoch:
                self._expected[number] = key.epoch
                order = file_order(len(self.spans), seed, key.epoch)
                here = order.index(number)
                self.store.fetch_ahead(order[here : here + 2])


class Rows(Sequence[Any]):
    """One field of all rows, read when it is asked for."""

    def __init__(self, store: "Store", name: str) -> None:
        self.store, self.name = store, name

    def __len__(self) -> int:
        return self.store.starts[-1]

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        number, row = self.store.place(range(len(self))[index])
        if self.name == "name":
            return f"{self.store.spans[number].shard.url}, row {row}"
        found = self.store.rows(number)[row]
        if found.pop("checksum") != _checksum(found):
            raise UnreadableShard(self.store.forget(number))
        if self.name == "image" and found["error"]:
            raise ValueError(found["error"])
        return found[self.name]


class Store:
    """The shards that are on this machine."""

    def __init__(self, spans: Sequence[Span], folder: Path, *, keep: int) -> None:
        self.spans, self.folder, self.keep = spans, folder, keep
        self.starts = [0, *itertools.accumulate(span.rows for span in spans)]
        self._opened: dict[int, datasets.Dataset] = {}
        self._remove_unfinished()

    def place(self, index: int) -> tuple[int, int]:
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
                raise UnreadableShard(f"{shard.url} has {len(opened):,} rows now, not {first + rows:,}: start again")
            # A removed file takes room until all have closed it. (Threads may do this at once.)
            kept = {n: file for n, file in list(self._opened.items()) if self.path(self.spans[n].shard).exists()}
            self._opened = {**kept, number: opened}
        return opened

    def _open(self, shard: Shard) -> "datasets.Dataset":
        import datasets
        import pyarrow

        for _ in range(FETCHES):
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
        raise UnreadableShard(f"{shard.url} was fetched {FETCHES} times, and {path} can not be read: {reason}")

    def forget(self, number: int) -> str:
        """Remove the file of a shard, which was changed; returns what to say."""
        path = self.path(self.spans[number].shard)
        path.unlink(missing_ok=True)
        self._opened.pop(number, None)
        return f"{path} was damaged, and is removed: start again"

    def fetch_ahead(self, numbers: Sequence[int]) -> None:
        """Begin to fetch shards that will be needed; one that fails is tried again, and told of, in its turn."""
        for number in numbers:
            if not self.path(self.spans[number].shard).exists():
                threading.Thread(target=self._try, args=[self.spans[number].shard], daemon=True).start()

    def _try(self, shard: Shard) -> None:
        with SLOTS, contextlib.suppress(ValueError):
            self._fetch(shard)

    def _fetch(self, shard: Shard) -> Path:
        path = self.path(shard)
        try:
            with disk_errors(path), self._lock(shard.key):  # one process fetches it for all
                if not path.is_file():
                    with in_place_of(path) as beside:
                        write_rows(beside, read_rows(shard.url))
                    self._make_room()
        except ValueError as error:  # no image is to blame for a full disk
            raise UnreadableShard(str(error)) from None
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

    def _make_room(self) -> None:
        """Remove the files that were not used for the longest time. Who has one open can go on reading it."""
        for path in sorted(self.folder.glob("[!.]*.arrow"), key=_last_use)[: -self.keep]:
            path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process made room meanwhile
        return 0


# Which shards there are.


def find_shards(source: str) -> list[Shard]:
    """All shards that an address, a pattern with *, ? or {000..099}, a file or a folder names, in order.

    Where there are tar files there are no other shards: a parquet file beside one tells of its rows. ValueError: none.
    """
    if "::" in source:
        raise ValueError(f"data.source {source}: files inside other files are not read; unpack them first")
    if math.prod(max(1, int(last) - int(first) + 1) for first, last in RANGE.findall(source)) > MOST:
        raise ValueError(f"data.source {source} stands for more than {MOST:,} addresses; write a shorter range, or *")
    with ThreadPoolExecutor(16) as pool:
        try:
            found = dict(itertools.chain.from_iterable(pool.map(_listed, _addresses(source))))
        except ImportError as error:
            raise ValueError(f"data.source {source}: {error} (pip install it)") from None
        except Exception as error:  # file systems raise errors of many types
            raise ValueError(f"data.source {source} can not be listed: {_reason(error)}") from None
    urls = [url for url in found if url.lower().endswith(TARS)] or list(filter(_is_shard, found))
    if not urls:
        raise ValueError(f"data.source {source}: no tar or parquet file there; choose another --data.source")
    check_names(urls, f"data.source {source}")
    return [Shard(url, short_hash(f"{url} {_version(found[url])}")) for url in sorted(urls)]


def _addresses(source: str) -> list[str]:
    """A source with {000..099} written out."""
    bounds = RANGE.search(source)
    if not bounds:
        return [source]
    first, last = bounds.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [other for number in numbers for other in _addresses(source.replace(bounds[0], number, 1))]


def _listed(address: str) -> list[tuple[str, dict[str, Any]]]:
    """The files at an address, with what their file system tells of each."""
    import fsspec

    system, path = fsspec.core.url_to_fs(os.path.expanduser(address))
    if set(path) & set("*?"):
        found = system.glob(path, detail=True)
    elif system.isdir(path):
        found = system.find(path, detail=True)
    else:
        found = {path: system.info(path)}
    local = "://" not in address
    return [(name if local else system.unstrip_protocol(name), info) for name, info in found.items()]


def _version(info: dict[str, Any]) -> str:
    return f"{info.get('size', '')} {next((info[name] for name in VERSION if info.get(name)), '')}"


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*TARS, ".parquet")) and Path(name).name not in METADATA


def _split(counted: list[tuple[Shard, int]], split: Split) -> list[Span]:
    """The rows that are in a split."""
    names = [shard.url.lower().split("/") for shard, _ in counted]
    shared = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))))
    named = [any(map(TEST.search, parts[shared:])) for parts in names]
    if any(named) and not all(named):
        return [
            Span(shard, 0, rows)
            for (shard, rows), test in zip(counted, named, strict=True)
            if rows and test == (split == "test")
        ]
    spans = []
    for shard, rows in counted:
        held = math.ceil(HELD_OUT * rows) if rows > 1 else 0
        spans.append(Span(shard, 0, held) if split == "test" else Span(shard, held, rows - held))
    return [span for span in spans if span.rows]


def count_rows(shards: Sequence[Shard], folder: Path) -> list[int]:
    """The rows of each shard; what was counted once is kept in `folder`. A tar file must be read whole for it.

    UnreadableShard: one that can not be read, or is cut off.
    """
    path = folder / "rows.jsonl"
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(path))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(folder / ".lock-rows"))
        kept = stack.enter_context(open(path, "a+", encoding="utf-8"))
        kept.seek(0)
        known = dict(filter(None, map(_counted, kept)))
        missing = [shard for shard in shards if shard.key not in known]
        with ThreadPoolExecutor(16) as pool:
            counts = pool.map(_count, missing)
            bar = tqdm(missing, desc="rows of shards", unit="shard", disable=None if missing else True)
            for shard, rows in zip(bar, counts, strict=True):
                known[shard.key] = rows
                kept.write(json.dumps({"shard": shard.key, "rows": rows}) + "\n")
                kept.flush()
    return [known[shard.key] for shard in shards]


def _counted(line: str) -> tuple[str, int] | None:
    """What a line of the counts says; nothing for one that was cut off."""
    try:
        told = json.loads(line)
        return str(told["shard"]), int(told["rows"])
    except (ValueError, KeyError, TypeError):
        return None


# What is in them.


def _count(shard: Shard) -> int:
    with _readable(shard.url):
        if shard.url.lower().endswith(TARS):
            return sum(1 for _ in _samples(shard.url))
        import pyarrow.parquet

        with _opened(shard.url) as file:
            told = pyarrow.parquet.read_metadata(file)
        groups = [told.row_group(i).num_rows for i in range(told.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != told.num_rows:
            raise ValueError("its counts of rows are damaged")
        return told.num_rows


def read_rows(url: str) -> Iterator[Row]:
    """The rows of a shard. UnreadableShard when it can not be read, or is cut off."""
    with _readable(url):
        yield from map(_tar_row, _samples(url)) if url.lower().endswith(TARS) else _parquet_rows(url)


@contextlib.contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except (GeneratorExit, UnreadableShard):
        raise
    except Exception as error:  # file systems and formats raise errors of many types
        raise UnreadableShard(
            f"{url} can not be read ({_reason(error)}); repair it, or take it out of --data.source"
        ) from None


class Member(tarfile.TarInfo):
    """A header in a tar; one that is damaged or missing is an error, while tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block; zeros alone end a tar."""
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise ValueError(f"it is damaged, or cut off: {error}") from None
        if found.size < 0 or (found.type in NAMING and found.size > LONGEST):
            raise ValueError(f"a header of it tells of {found.size:,} bytes")
        return found


def _samples(url: str) -> Iterator[dict[str, bytes]]:
    """The samples of a tar file that have an image.

    Each is a run of files that are named alike up to the first dot, by what follows it.
    """
    for _, files in itertools.groupby(_members(url), key=lambda member: _name(member[0])[0]):
        sample: dict[str, bytes] = {}
        for path, data in files:
            sample.setdefault(_name(path)[1], data)
        if _image_of(sample) is not None:
            yield sample


def _members(url: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of the images and captions in a tar, without hidden ones, and of large ones the begin."""
    with _opened(url) as file, tarfile.open(fileobj=file, mode="r|*", bufsize=2**17, tarinfo=Member) as tar:
        for member in tar:
            most, hidden = _most(_name(member.name)[1]), member.name.rpartition("/")[2].startswith((".", "__"))
            if member.isfile() and most and not hidden and (content := tar.extractfile(member)):
                yield member.name, content.read(most)
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all


def _name(path: str) -> tuple[str, str]:
    """Name of the sample, and ending, of a file in a tar."""
    folder, _, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _most(ending: str) -> int:
    """The bytes that are read of a file, by its ending; 0: it is neither image nor caption."""
    if f".{ending}".endswith(SUFFIXES):
        return LARGEST
    return LONGEST if ending in (*TEXTS, "json") else 0


def _image_of(sample: dict[str, bytes]) -> bytes | None:
    return next((data for ending, data in sample.items() if f".{ending}".endswith(SUFFIXES)), None)


def _tar_row(sample: dict[str, bytes]) -> Row:
    image = _image_of(sample)
    try:
        return Row(image, _tar_captions(sample), None)
    except ValueError as error:
        return Row(None, [], str(error))


def _tar_captions(sample: dict[str, bytes]) -> list[str]:
    try:
        for ending in TEXTS:
            if ending in sample:
                return _captions(sample[ending].decode("utf-8-sig"), "its text")
        told = json.loads(sample.get("json", b"{}"))
        found = next((told[name] for name in CAPTION_COLUMNS if name in told), None)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its caption is not UTF-8, or no JSON") from None
    return _captions(found, "its JSON")


def _captions(cell: Any, where: str) -> list[str]:
    return list(filter(None, wordings_of(wordings_in(cell, where))))


def _parquet_rows(url: str) -> Iterator[Row]:
    import datasets
    import pyarrow.parquet

    with _opened(url) as file:
        table = pyarrow.parquet.ParquetFile(file)
        schema, features = table.schema_arrow, datasets.Features()
        for column in schema:
            with contextlib.suppress(ValueError, NotImplementedError):  # a type that it has no name for: no image
                features |= datasets.Features.from_arrow_schema(pyarrow.schema([column], metadata=schema.metadata))
        image = image_column(features, url)
        caption = next((name for name in CAPTION_COLUMNS if name in features), None)
        columns = [image, *([caption] if caption else [])]
        for batch in table.iter_batches(CHUNK, columns=columns):
            for number in range(batch.num_rows):
                yield _parquet_row(*(batch[name][number] for name in columns))


def _parquet_row(cell: Any, *caption: Any) -> Row:
    """A row from cells of arrow."""
    try:
        data = cell.as_py()
        data = data["bytes"] if isinstance(data, dict) else data  # no path that a stranger wrote is followed
        if not isinstance(data, bytes):
            raise ValueError("holds no image")
        return Row(data, _captions(caption[0].as_py() if caption else None, "its row"), None)
    except UnicodeDecodeError:
        return Row(None, [], "its caption is not UTF-8")
    except (ValueError, OverflowError) as error:
        return Row(None, [], str(error))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
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


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """As many rows as may be in memory."""
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK or sum(len(row.image or b"") for row in chunk) > LARGEST:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _opened(url: str) -> Any:
    from datasets.utils.file_utils import xopen  # fsspec's open, which tries again where the network fails

    through = url.startswith(("http", "hf:")) and url.lower().endswith(TARS)
    return xopen(url, "rb", **({"block_size": 0} if through else {}))  # 0: in one request from begin to end


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
