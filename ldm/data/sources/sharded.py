"""TODO."""

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ldm.data.batch_sampler import SampleKey, evenly_spaced, file_order
from ldm.data.sources.base import (
    HELD_OUT_FRACTION,
    ImageTextSource,
    check_split,
    check_utf8_names,
    short_hash,
)
from ldm.data.sources.decode import SUFFIXES
from ldm.data.sources.folder import METADATA
from ldm.data.sources.shapes import Split
from ldm.io.atomic import disk_errors

if TYPE_CHECKING:
    pass
from ldm.data.sources.shard_cache import Shard, ShardCache, ShardColumn, ShardRange
from ldm.data.sources.webdataset import TAR_SUFFIXES, _count, _reason

RANGE_PATTERN = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARD_URLS = 10**6  # addresses that ranges may stand for
HELD_OUT_NAME = re.compile(r"(^|[^a-z])(test|val|valid|validation)([^a-z]|$)")  # in the name of a held-out shard
VERSION_KEYS = (
    "ETag",
    "etag",
    "blob_id",
    "mtime",
    "created",
    "LastModified",
)  # what file systems tell of a file's content
CACHED_SHARDS_PER_STREAM = (
    3  # files that are kept for each stream: its own, the next, and one that another process has not left yet
)


def is_sharded(source: str) -> bool:
    """Whether a source names shards: an address, a pattern, a tar file, or a folder of tar or parquet files."""
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        return bool(
            "://" in source or set(source) & set("*?") or RANGE_PATTERN.search(source) or source.endswith(TAR_SUFFIXES)
        )
    names = [name for part in (folder, *filter(Path.is_dir, folder.iterdir())) for name in os.listdir(part)]
    return any(map(_is_shard, names)) and not any(name.lower().endswith(SUFFIXES) for name in names)


def open_shards(source: str, split: Split, *, streams: int) -> "ShardedSource":
    """One split of a set in shards, of which at most 3 x `streams` are kept on this machine at a time.

    Shards that are named test or validation are held out; where there are none, the first 5 % of the rows of each.
    ValueError: no shard there, or one that can not be read.
    """
    import datasets  # slow, and other sets do not need it here

    check_split(split)
    shards = list_shards(source)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "shards" / short_hash(source)
    spans = _split(list(zip(shards, count_rows(shards, folder), strict=True)), split)
    if not spans:
        raise ValueError(
            f"data.source {source}: no row is left for the {split} split; write larger shards, or name one test"
        )
    store = ShardCache(spans, folder, keep=CACHED_SHARDS_PER_STREAM * streams)
    told = f"shards: {len(shards):,} of {source}, fetched into {folder} as they are needed"
    return ShardedSource(
        ShardColumn(store, "name"),
        ShardColumn(store, "image"),
        ShardColumn(store, "captions"),
        told,
        spans=spans,
        store=store,
    )


@dataclass(frozen=True)
class ShardedSource(ImageTextSource):
    """A source whose items lie in shards."""

    spans: Sequence[ShardRange] = ()
    store: "ShardCache" = field(kw_only=True)
    _expected: dict[int, int] = field(default_factory=dict, init=False)  # the last epoch in which a shard was needed

    def near(self, index: int) -> range:
        """The items of the same shard."""
        number = self.store.locate(index)[0]
        return range(self.store.starts[number], self.store.starts[number + 1])

    def at_hand(self, index: int) -> bool:
        """Whether its shard is on this machine."""
        return self.store.path(self.spans[self.store.locate(index)[0]].shard).exists()

    def spread(self, count: int) -> list[int]:
        """Items of at most 16 shards, which are spread over the set."""
        chosen = evenly_spaced(16, len(self.spans))
        items = [index for number in chosen for index in self.near(self.store.starts[number])]
        return [items[i] for i in evenly_spaced(count, len(items))]

    def digest(self) -> str:
        """A hash of which shards there are, and how many rows of each."""
        return short_hash(json.dumps([(Path(span.shard.url).name, *span[1:]) for span in self.spans]))

    def expect(self, keys: Iterable[SampleKey], seed: int) -> None:
        """In a loading process, begin to fetch the shards of these samples, and those that come after them."""
        if get_worker_info() is None:
            return
        for key in keys:
            number = self.store.locate(key.index)[0]
            if self._expected.get(number) != key.epoch:
                self._expected[number] = key.epoch
                order = file_order(len(self.spans), seed, key.epoch)
                here = order.index(number)
                self.store.prefetch(order[here : here + 2])


def list_shards(source: str) -> list[Shard]:
    """All shards that an address, a pattern with *, ? or {000..099}, a file or a folder names, in order.

    Where there are tar files there are no other shards: a parquet file beside one tells of its rows. ValueError: none.
    """
    if "::" in source:
        raise ValueError(f"data.source {source}: files inside other files are not read; unpack them first")
    if math.prod(max(1, int(last) - int(first) + 1) for first, last in RANGE_PATTERN.findall(source)) > MAX_SHARD_URLS:
        raise ValueError(
            f"data.source {source} stands for more than {MAX_SHARD_URLS:,} addresses; write a shorter range, or *"
        )
    with ThreadPoolExecutor(16) as pool:
        try:
            found = dict(itertools.chain.from_iterable(pool.map(_listed, _addresses(source))))
        except ImportError as error:
            raise ValueError(f"data.source {source}: {error} (pip install it)") from None
        except Exception as error:  # file systems raise errors of many types
            raise ValueError(f"data.source {source} can not be listed: {_reason(error)}") from None
    urls = [url for url in found if url.lower().endswith(TAR_SUFFIXES)] or list(filter(_is_shard, found))
    if not urls:
        raise ValueError(f"data.source {source}: no tar or parquet file there; choose another --data.source")
    check_utf8_names(urls, f"data.source {source}")
    return [Shard(url, short_hash(f"{url} {_version(found[url])}")) for url in sorted(urls)]


def _addresses(source: str) -> list[str]:
    """A source with {000..099} written out."""
    bounds = RANGE_PATTERN.search(source)
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
    return f"{info.get('size', '')} {next((info[name] for name in VERSION_KEYS if info.get(name)), '')}"


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*TAR_SUFFIXES, ".parquet")) and Path(name).name not in METADATA


def _split(counted: list[tuple[Shard, int]], split: Split) -> list[ShardRange]:
    """The rows that are in a split."""
    names = [shard.url.lower().split("/") for shard, _ in counted]
    shared = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))))
    named = [any(map(HELD_OUT_NAME.search, parts[shared:])) for parts in names]
    if any(named) and not all(named):
        return [
            ShardRange(shard, 0, rows)
            for (shard, rows), test in zip(counted, named, strict=True)
            if rows and test == (split == "test")
        ]
    spans = []
    for shard, rows in counted:
        held = math.ceil(HELD_OUT_FRACTION * rows) if rows > 1 else 0
        spans.append(ShardRange(shard, 0, held) if split == "test" else ShardRange(shard, held, rows - held))
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
        known = dict(filter(None, map(_parse_count, kept)))
        missing = [shard for shard in shards if shard.key not in known]
        with ThreadPoolExecutor(16) as pool:
            counts = pool.map(_count, missing)
            bar = tqdm(missing, desc="rows of shards", unit="shard", disable=None if missing else True)
            for shard, rows in zip(bar, counts, strict=True):
                known[shard.key] = rows
                kept.write(json.dumps({"shard": shard.key, "rows": rows}) + "\n")
                kept.flush()
    return [known[shard.key] for shard in shards]


def _parse_count(line: str) -> tuple[str, int] | None:
    """What a line of the counts says; nothing for one that was cut off."""
    try:
        told = json.loads(line)
        return str(told["shard"]), int(told["rows"])
    except (ValueError, KeyError, TypeError):
        return None
