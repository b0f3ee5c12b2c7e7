"""Tar or parquet shards on any fsspec file system, downloaded on demand into a bounded local cache."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
from filelock import FileLock
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ldm.data.batch_sampler import SampleKey, evenly_spaced, permutation
from ldm.data.sources.base import HELD_OUT_FRACTION, HELD_OUT_SPLITS, Split, named_split, one_line, short_hash
from ldm.data.sources.captions import METADATA_FILES
from ldm.data.sources.encoded import HASHED_BYTES, SUFFIXES, EncodedSource
from ldm.data.sources.shard import TAR_SUFFIXES, count_shard_rows, first_bytes, is_tar
from ldm.data.sources.shard_cache import ShardCache, ShardColumn, ShardRange
from ldm.io.atomic import disk_errors

RANGE_PATTERN = re.compile(r"\{(\d+)\.\.(\d+)\}")
VERSION_KEYS = ("ETag", "etag", "blob_id", "mtime", "created", "LastModified")  # of a file's content, by file system
CACHED_SHARDS_PER_STREAM = 3  # its own, the next, and one that another process has not left yet
MAX_SPACED_SHARDS = 16  # from which evenly spaced items are taken
HASHED_SHARDS = 4  # for `content`
IO_THREADS = 16
MAX_SHARD_URLS = 10**6  # that ranges may stand for


@dataclass(frozen=True, kw_only=True)
class ShardedSource(EncodedSource):
    """A source whose items are in shards."""

    cache: ShardCache
    _epochs: dict[int, int] = field(default_factory=dict, init=False)  # the last one in which a range was needed

    @property
    def shard_rows(self) -> Sequence[int]:
        """How many items each shard has."""
        return [span.rows for span in self.cache.ranges]

    def fallback_candidates(self, index: int) -> range:
        """The items of the same shard."""
        part, _ = self.cache.locate(index)
        return range(self.cache.starts[part], self.cache.starts[part + 1])

    def is_local(self, index: int) -> bool:
        """Whether its shard is on this machine."""
        return self.cache.path(self.cache.locate(index)[0]).exists()

    def evenly_spaced(self, count: int) -> list[int]:
        """`count` items of at most 16 shards, which are evenly spaced themselves: so few files are downloaded."""
        parts = evenly_spaced(MAX_SPACED_SHARDS, len(self.cache.ranges))
        items = [index for part in parts for index in self.fallback_candidates(self.cache.starts[part])]
        return [items[i] for i in evenly_spaced(count, len(items))]

    def fingerprint(self) -> str:
        """A hash of which shards there are, and which rows of each."""
        return short_hash(json.dumps([(Path(url).name, first, rows) for url, _, first, rows in self.cache.ranges]))

    def content(self) -> str:
        """Of a few shards, which are not downloaded for it."""
        parts = [self.cache.ranges[part] for part in evenly_spaced(HASHED_SHARDS, len(self.cache.ranges))]
        return hashlib.sha256(b"".join(first_bytes(part.url, HASHED_BYTES) for part in parts)).hexdigest()[:16]

    def prefetch(self, keys: Sequence[SampleKey], seed: int) -> None:
        """In a loading process, begin to download the shards of these samples, and those that come after them."""
        if get_worker_info() is None:
            return
        for key in keys:
            part, _ = self.cache.locate(key.index)
            if self._epochs.get(part) != key.epoch:
                self._epochs[part] = key.epoch
                order = permutation(len(self.cache.ranges), seed, key.epoch, "files").tolist()
                position = order.index(part)
                self.cache.prefetch(order[position : position + 2])


def is_sharded(source: str) -> bool:
    """Whether a source names shards: an address, a pattern, a tar file, or a folder of tar or parquet files."""
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        has_pattern = set(source) & set("*?") or RANGE_PATTERN.search(source)
        return bool("://" in source or has_pattern or source.endswith(TAR_SUFFIXES))
    names = [name for part in (folder, *filter(Path.is_dir, folder.iterdir())) for name in os.listdir(part)]
    if not any(map(_is_shard, names)):
        return False
    names += (name for _, _, files in os.walk(folder) for name in files)
    return not any(name.lower().endswith(SUFFIXES) for name in names)


def open_shards(source: str, split: Split, *, streams: int) -> ShardedSource:
    """One split of a set in shards, of which at most 3 x `streams` are cached on this machine at a time.

    Shards that are named test or validation are held out; where there are none, the first 5 % of the rows of each.
    ValueError: no shard there, or one that cannot be read.
    """
    shards = list_shards(source)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "shards" / short_hash(source)
    ranges = _ranges_of_split(shards, count_rows(shards, folder), split)
    if not ranges:
        raise ValueError(f"data.source {source}: no rows for the {split} split; write larger shards, or name one test")
    cache = ShardCache(ranges, folder, max_files=CACHED_SHARDS_PER_STREAM * streams)
    return ShardedSource(
        names=ShardColumn(cache, "name"),
        images=ShardColumn(cache, "image"),
        captions=ShardColumn(cache, "captions"),
        description=f"shards: {len(shards):,} of {source}, downloaded into {folder} on demand",
        cache=cache,
    )


def list_shards(source: str) -> dict[str, str]:
    """All shards that an address, a pattern with *, ? or {000..099}, a file or a folder names: URL -> content hash.

    Where there are tar files no other one is a shard: a parquet file there describes rows. ValueError: none.
    """
    if "::" in source:
        raise ValueError(f"data.source {source}: files inside other files are not read; unpack them first")
    if math.prod(max(1, int(last) - int(first) + 1) for first, last in RANGE_PATTERN.findall(source)) > MAX_SHARD_URLS:
        raise ValueError(f"data.source {source}: more than {MAX_SHARD_URLS:,} addresses; write a shorter range, or *")
    with ThreadPoolExecutor(IO_THREADS) as pool:
        try:
            files = dict(itertools.chain.from_iterable(pool.map(_list_files, _expand_ranges(source))))
        except Exception as error:  # file systems raise errors of many types
            raise ValueError(f"data.source {source} cannot be listed: {one_line(error) or repr(error)}") from None
    urls = list(filter(is_tar, files)) or list(filter(_is_shard, files))
    if not urls:
        raise ValueError(f"data.source {source}: no tar or parquet file there; choose another --data.source")
    versions = {url: next((files[url][key] for key in VERSION_KEYS if files[url].get(key)), "") for url in sorted(urls)}
    return {url: short_hash(f"{url} {files[url].get('size', '')} {version}") for url, version in versions.items()}


def _expand_ranges(source: str) -> list[str]:
    """A source with {000..099} written out."""
    bounds = RANGE_PATTERN.search(source)
    if not bounds:
        return [source]
    first, last = bounds.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [other for number in numbers for other in _expand_ranges(source.replace(bounds[0], number, 1))]


def _list_files(address: str) -> list[tuple[str, dict[str, Any]]]:
    """The files at an address, each with what its file system knows of it."""
    system, path = fsspec.core.url_to_fs(os.path.expanduser(address))
    if set(path) & set("*?"):
        files = system.glob(path, detail=True)
    elif system.isdir(path):
        files = system.find(path, detail=True)
    else:
        files = {path: system.info(path)}
    local = "://" not in address
    return [(name if local else system.unstrip_protocol(name), info) for name, info in files.items()]


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*TAR_SUFFIXES, ".parquet")) and Path(name).name.lower() not in METADATA_FILES


def _ranges_of_split(shards: dict[str, str], counts: Sequence[int], split: Split) -> list[ShardRange]:
    """The rows that are in a split: of each shard the first ones are held out, or all or none where names say so."""
    paths = [url.split("/") for url in shards]
    common = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))
    is_test = [any(named_split(part) in HELD_OUT_SPLITS for part in path[common:]) for path in paths]
    ranges = []
    for shard, rows, test in zip(shards.items(), counts, is_test, strict=True):
        if any(is_test) and not all(is_test):
            held_out = rows if test else 0
        else:
            held_out = math.ceil(HELD_OUT_FRACTION * rows) if rows > 1 else 0
        span = (0, held_out) if split == "test" else (held_out, rows - held_out)
        ranges.append(ShardRange(*shard, *span))
    return [span for span in ranges if span.rows]


def count_rows(shards: dict[str, str], folder: Path) -> list[int]:
    """The rows of each shard; each is counted once and noted in `folder`. ShardReadError: see `count_shard_rows`."""
    path = folder / "rows.jsonl"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock-rows"), path.open("a+", encoding="utf-8", buffering=1) as file:
            file.seek(0)
            counts = {}
            for line in file:
                with contextlib.suppress(ValueError):  # a line that was cut off
                    noted = json.loads(line)
                    counts[noted["shard"]] = noted["rows"]
            missing = [url for url in shards if shards[url] not in counts]
            bar = tqdm(missing, desc="rows of shards", unit="shard", disable=None if missing else True)
            with ThreadPoolExecutor(IO_THREADS) as pool:
                for url, rows in zip(bar, pool.map(count_shard_rows, missing), strict=True):
                    counts[shards[url]] = rows
                    file.write(json.dumps({"shard": shards[url], "rows": rows}) + "\n")
    return [counts[content_hash] for content_hash in shards.values()]
