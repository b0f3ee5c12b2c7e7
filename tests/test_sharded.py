"""Sets in shards: every row comes once, in an order that ranks and stops do not change, from a small cache."""

import gzip
import os
import pickle
import random
import tarfile
import time
from itertools import islice
from pathlib import Path

import cache_latents
import check_data
import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from helpers import losses, numbered_png, train, write_set, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import launch, rank_environment
from torch.utils.data import DataLoader

from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import SampleKey, ShardedBatchSampler, permutation
from ldm.data.loader import KeyedBatches
from ldm.data.sources import shard, shard_cache
from ldm.data.sources.shard import ShardReadError, read_rows
from ldm.data.sources.shard_cache import open_rows, write_rows
from ldm.data.sources.sharded import ShardedSource, is_sharded, list_shards, open_shards

TARS, ROWS = 6, 20
environment = pytest.fixture(scope="module", autouse=True)(rank_environment)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache/shards"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_set(tmp_path / "photos")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    streams=st.integers(1, 9),
    batch=st.sampled_from([1, 4, 6, 12]),
    seed=st.integers(0, 3),
)
def test_each_row_comes_once_in_an_epoch(rows: list[int], streams: int, batch: int, seed: int) -> None:
    """No row is lost or comes twice, over three epochs, wherever the steps end."""
    sampler = ShardedBatchSampler(rows, streams=streams, seed=seed, batch_size=batch)
    size = sum(rows)
    assert batch % sampler.streams == 0 and sampler.streams <= min(streams, size)
    keys = [key for keys in islice(sampler, 3 * -(-size // batch) + batch) for key in keys]
    for epoch in range(3):
        assert sorted(key.index for key in keys if key.epoch == epoch) == list(range(size))
    if size > 10:
        first, second = ([key.index for key in keys if key.epoch == epoch] for epoch in (0, 1))
        assert first != second


def test_each_rank_takes_its_part_from_few_files() -> None:
    rows = [50] * 32
    whole = ShardedBatchSampler(rows, streams=8, seed=0, batch_size=16)
    parts = [ShardedBatchSampler(rows, streams=8, seed=0, batch_size=16, rank=rank, world=4) for rank in range(4)]
    later = ShardedBatchSampler(rows, streams=8, seed=0, batch_size=16, start=7)
    files: list[set[int]] = [set() for _ in parts]
    for step, (keys, *cuts) in enumerate(islice(zip(whole, *parts, strict=True), 100)):
        assert [key for cut in cuts for key in cut] == keys
        for files_of_rank, cut in zip(files, cuts, strict=True):
            files_of_rank |= {key.index // 50 for key in cut}
        if step >= 7:
            assert next(iter(ShardedBatchSampler(rows, streams=8, seed=0, batch_size=16, start=step))) == keys
    assert next(iter(later)) == [later.key_at(7, position) for position in range(16)]
    assert sum(map(len, files)) == 32 and set().union(*files) == set(range(32))


def test_a_step_needs_few_files() -> None:
    sampler = ShardedBatchSampler([100] * 40, streams=4, seed=0, batch_size=8)
    steps = [{key.index // 100 for key in keys} for keys in islice(sampler, 500)]
    assert all(len(files) <= 4 for files in steps) and len(set().union(*steps)) == 40


def test_rows_are_what_the_tars_hold(photos: Path) -> None:
    data, held_out = (
        open_dataset(DataConfig(source=str(photos), resolution=16), split, seed=0) for split in ("train", "test")
    )
    assert (len(data), len(held_out)) == (TARS * (ROWS - 1), TARS)  # 5 % of each shard, at least one
    numbers = []
    for split in (data, held_out):
        for index in range(len(split)):
            sample = split[SampleKey(index, 0, 0)]
            number = int(sample["caption"])
            assert sample["image"][0, 8, 8].item() == pytest.approx(number / 127.5 - 1, abs=1e-5)
            assert sample["sizes"].tolist() == [16, 24, 0, int(sample["sizes"][3]), 16, 16]
            numbers.append(number)
    assert sorted(numbers) == list(range(TARS * ROWS))
    assert (
        f"shards: {TARS} of {photos}" in data.describe()
        and f"{TARS * (ROWS - 1)} in the train split" in data.describe()
    )
    assert data.source.names[0] == f"{photos}/000.tar, row 1"


def test_only_what_is_needed_is_in_the_cache(photos: Path, cache: Path) -> None:
    source = open_shards(str(photos), "train", streams=1)
    for index in range(len(source.images)):
        assert source.captions[index] and source.images[index]
        assert len(list(cache.rglob("*.arrow"))) <= 3
    assert len(list(cache.rglob("*.arrow"))) == 3
    counts = next(cache.rglob("rows.jsonl"))
    before = counts.read_text()
    assert len(before.splitlines()) == TARS
    counts.write_text(before + '{"shard": "cut o')
    (photos / "000.tar").unlink()
    assert len(open_shards(str(photos), "train", streams=1).images) == (TARS - 1) * (ROWS - 1)
    write_tar(photos / "001.tar", [("1.png", numbered_png(1)), ("2.png", numbered_png(2))])  # another file of that name
    assert len(open_shards(str(photos), "train", streams=1).images) == (TARS - 2) * (ROWS - 1) + 1


def test_removed_files_are_closed(photos: Path, cache: Path) -> None:
    """A file that is open takes room on the disk, even when it is removed."""
    source = open_shards(str(photos), "train", streams=1)
    for index in range(len(source.images)):
        assert source.images[index]
    mapped = Path("/proc/self/maps")
    if not mapped.is_file():
        pytest.skip("needs /proc")
    open_files = {line.split(maxsplit=5)[5] for line in mapped.read_text().splitlines() if ".arrow" in line}
    assert len({name for name in open_files if str(cache) in name}) <= 3


def test_the_cache_heals_itself(photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were cut off, left by a killed process or removed while they were open; a copy for a new process."""
    source = open_shards(str(photos), "train", streams=1)
    assert source.images[0] == numbered_png(1)
    path = next(cache.rglob("*.arrow"))
    copied = pickle.dumps(source)
    path.with_name(f".{path.name}").touch()
    whole = path.read_bytes()
    for end in (0, 3, 100, len(whole) // 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:end])
        source = open_shards(str(photos), "train", streams=1)
        assert source.images[0] == numbered_png(1) and len(list(cache.rglob("*.arrow"))) == 1
    path.unlink()
    assert source.images[0] == numbered_png(1) and source.images[ROWS] == numbered_png(ROWS + 2)
    assert pickle.loads(copied).images[0] == numbered_png(1)
    monkeypatch.setattr(shard_cache, "write_rows", lambda path, rows: path.write_bytes(b"") or ROWS)
    with pytest.raises(ShardReadError, match=r"005\.tar was downloaded twice, and .*arrow is damaged: check that disk"):
        source.images[len(source.images) - 1]


def test_a_changed_file_is_never_read(tmp_path: Path, cache: Path) -> None:
    """Bits flipped, bytes cut off or changed: the shard is downloaded again, or an error where it is gone."""
    photos = write_set(tmp_path / "photos", tars=1, rows=5)
    source = open_shards(str(photos), "train", streams=1)
    want, draw = list(zip(source.images, source.captions, strict=True)), random.Random(0)
    path = next(cache.rglob("*.arrow"))
    whole = path.read_bytes()
    assert open_rows(path) is not None
    for number in range(200):
        position = draw.randrange(len(whole))
        changed = (
            whole[:position] + bytes([whole[position] ^ (1 << draw.randrange(8))]) + whole[position + 1 :],
            whole[:position],
            whole[:position] + draw.randbytes(8) + whole[position + 8 :],
        )[number % 3]
        path.unlink()  # an open one is mapped into memory
        path.write_bytes(changed)
        assert changed == whole or open_rows(path) is None
    again: ShardedSource = pickle.loads(pickle.dumps(source))  # as another process has it: no file is open
    assert list(zip(again.images, again.captions, strict=True)) == want and path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    (photos / "000.tar").unlink()
    with pytest.raises(ShardReadError, match="000.tar cannot be read .*; repair it, or remove it from --data.source"):
        pickle.loads(pickle.dumps(source)).images[0]


def test_a_file_in_use_is_not_evicted(photos: Path, cache: Path) -> None:
    source = open_shards(str(photos), "train", streams=1)
    assert source.images[0]
    path = next(cache.rglob("*.arrow"))
    for index in range(len(source.images)):
        assert source.images[index] and path.exists() and source.images[0]


def test_all_kinds_of_rows(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    files = [
        ("a/1.jpg", b"no image"),
        ("a/1.json", b'{"caption": "from JSON", "sha256": "x"}'),
        ("a/2.left.png", numbered_png(2)),
        ("a/2.txt", b"two  words\n"),
        ("a/2.json", b"{"),
        ("a/3.txt", b"no image"),
        ("b/3.webp", numbered_png(3)),
        ("b/3.caption", b"\xff"),
        ("b/4.PNG", numbered_png(4)),
        ("b/4.json", b'{"text": {"a": 1}}'),
        ("__meta__", b""),
        ("b/5.png", numbered_png(5)),
        ("b/5.prompt", b"five"),
        ("b/6.png", numbered_png(6)),
        ("b/6.npy", b"of no matter"),
    ]
    write_tar(folder / "x.tgz", files, links=["a/0.png", "b/7.png"])
    pyarrow.parquet.write_table(pyarrow.table({"key": [1]}), folder / "x.parquet")  # what img2dataset leaves there
    source = open_shards(str(folder), "train", streams=1)
    captions = [source.captions[i] for i in range(len(source.images))]
    assert captions == [["two words"], [], [], ["five"], []]  # the first is held out
    assert source.images[0] == numbered_png(2) and source.images[4] == numbered_png(6)
    for index, error in ((1, "not UTF-8"), (2, "its caption: the caption .* not text")):
        with pytest.raises(ValueError, match=error):
            source.images[index]
    data = open_dataset(DataConfig(source=str(folder), resolution=16, max_unreadable=1), "train", seed=0)
    samples = [data[SampleKey(i, 0, i)] for i in range(5)]
    assert {sample["caption"] for sample in samples} == {"two words", "five", ""}
    assert len(data.reader.unreadable()) == 2 and "x.tgz, row 2: its caption is not UTF-8" in data.report()


def test_parquet_shards_on_any_file_system(tmp_path: Path) -> None:
    """By address, pattern and range; a path in a table is not followed; shards that are named test are held out."""
    system = fsspec.filesystem("memory")
    for name, first in (("train-000", 0), ("train-001", 10), ("test-000", 20)):
        images = [{"bytes": numbered_png(i), "path": None} for i in range(first, first + 9)]
        images.append({"bytes": None, "path": str(tmp_path / "secret.png")})
        table = pyarrow.table(
            {"image": images, "text": [[str(i), ""] for i in range(first, first + 10)], "x": [0] * 10}
        )
        with system.open(f"/set/{name}.parquet", "wb") as file:
            pyarrow.parquet.write_table(table, file)
    (tmp_path / "secret.png").write_bytes(numbered_png(0))
    try:
        for address in ("memory://set", "memory://set/*.parquet"):
            train_set, test_set = (open_shards(address, split, streams=2) for split in ("train", "test"))
            assert (len(train_set.images), len(test_set.images)) == (20, 10)
            assert [test_set.captions[i] for i in (0, 3)] == [["20"], ["23"]] and train_set.images[11] == numbered_png(
                11
            )
            with pytest.raises(ValueError, match="holds no image"):
                train_set.images[9]
        assert list(list_shards("memory://set/train-{000..001}.parquet")) == [
            f"memory:///set/train-00{i}.parquet" for i in (0, 1)
        ]
    finally:
        system.rm("/set", recursive=True)


def test_cells_of_any_kind(tmp_path: Path) -> None:
    """What is wrong in one cell is an error of its row alone, and other columns do not matter."""
    texts = pyarrow.array([b"a", b"\xff", b"", None]).cast(pyarrow.binary()).view(pyarrow.string())
    images = pyarrow.array([numbered_png(0), numbered_png(1), numbered_png(2), None])
    pairs = pyarrow.array([[("a", 1)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"pairs": pairs, "image": images, "caption": texts})
    pyarrow.parquet.write_table(table, tmp_path / "set/1.parquet")
    times = pyarrow.array([2**62, 0, 0, 0], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(table.set_column(2, "caption", times), tmp_path / "set/2.parquet")
    rows = list(read_rows(str(tmp_path / "set/1.parquet")))
    assert [row.captions for row in rows] == [["a"], [], [], []]
    assert [row.error for row in rows] == [None, "its caption is not UTF-8, or not JSON", None, "holds no image"]
    assert all(row.error for row in read_rows(str(tmp_path / "set/2.parquet")))
    pyarrow.parquet.write_table(table.set_column(2, "caption", [[{"a": "x"}] * 4]), tmp_path / "set/2.parquet")
    assert "is not text" in str(next(read_rows(str(tmp_path / "set/2.parquet"))).error)
    for number in range(3):
        pyarrow.parquet.write_table(table[:1], tmp_path / f"set/{number}.parquet")
    with pytest.raises(ValueError, match="no rows for the test split; write larger shards, or name one test"):
        open_shards(str(tmp_path / "set"), "test", streams=1)


def test_large_files_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an image or a text so much is read, and so many rows are in memory while a shard is downloaded."""
    monkeypatch.setattr(shard, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(shard, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(shard_cache, "MAX_BATCH_BYTES", 1000)
    files = [(f"{i}.png", bytes(600)) for i in range(5)] + [("6.png", bytes(5000)), ("6.txt", b"x" * 5000)]
    write_tar(tmp_path / "x.tar", files)
    rows = list(read_rows(str(tmp_path / "x.tar")))
    assert [len(row.image or b"") for row in rows] == [600] * 5 + [1000] and rows[-1].captions == ["x" * 10]
    write_rows(tmp_path / "rows.arrow", iter(rows))
    table = open_rows(tmp_path / "rows.arrow")
    assert table is not None and [len(batch) for batch in table.to_batches()] == [2, 2, 2]


def test_what_names_shards(photos: Path, tmp_path: Path) -> None:
    assert all(map(is_sharded, (str(photos), "a/{00..12}.tar", "s3://bucket", "x/*.parquet", "x.tar")))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/metadata.parquet").touch()
    assert not any(map(is_sharded, ("org/name", "shapes", str(tmp_path / "images"), "x.parquet")))
    (photos / "1.png").touch()
    assert not is_sharded(str(photos))
    for source, error in (
        (str(tmp_path / "none/*.tar"), "no tar or parquet file there"),
        (str(tmp_path / "none.tar"), "none.tar cannot be listed"),
        ("nothing://x", "cannot be listed: Protocol not known: nothing"),
        ("zip://*.tar::memory://a.zip", "files inside other files .*; unpack them"),
        ("memory://{000..99999999999}/{9..0}.tar", "more than 1,000,000 addresses; .*shorter range"),
    ):
        with pytest.raises(ValueError, match=error):
            open_shards(source, "train", streams=1)
    with pytest.raises(ValueError, match="data.bucket_step: .*shards.*; leave it at 0"):
        open_dataset(DataConfig(source=f"{photos}/*.tar", resolution=16, bucket_step=8), "train", seed=0)


def test_a_name_of_another_encoding(photos: Path) -> None:
    (photos / "003.tar").rename(os.fsdecode(os.fsencode(photos / "x") + b"\xff.tar"))
    source = open_shards(f"{photos}/*.tar", "train", streams=1)
    assert source.images[len(source.images) - 1] == numbered_png(4 * ROWS - 1) and source.fingerprint()


def test_a_damaged_shard_is_named(photos: Path) -> None:
    whole = (photos / "002.tar").read_bytes()
    damaged = [bytes([*whole[:8192], 255 ^ whole[8192], *whole[8193:]])]  # a header, which tarfile takes for the end
    for end in (len(whole) // 2 + 100, 2 * 1024 + 512, 10, 8192):  # in a header, before data, in the first, between two
        damaged += [whole[:end], gzip.compress(whole[:end])]
    damaged.append(gzip.compress(whole)[:-1000])
    for content in damaged:
        (photos / "002.tar").write_bytes(content)
        with pytest.raises(ShardReadError, match=r"002\.tar cannot be read \(.*\); repair it, or remove it from"):
            open_shards(str(photos), "train", streams=1)
    (photos / "002.tar").write_bytes(gzip.compress(whole))  # whatever its name
    data = open_dataset(DataConfig(source=str(photos), resolution=16), "train", seed=0)
    write_tar(photos / "004.tar", [("1.png", numbered_png(1))])
    with pytest.raises(ShardReadError, match=r"004\.tar has 1 rows now, not 20: start again"):
        data[SampleKey(4 * (ROWS - 1), 0, 0)]
    (photos / "003.tar").write_bytes(b"")
    with pytest.raises(ShardReadError, match=r"003\.tar cannot be read"):
        data[SampleKey(3 * (ROWS - 1), 0, 0)]
    assert not data.reader.unreadable()  # no image is to blame


def test_an_unchanged_shard_is_read(photos: Path) -> None:
    """Tars of other writers, too: with two blocks of zeros at their end and no more."""
    path = photos / "002.tar"
    whole = path.read_bytes()
    rows = list(read_rows(str(path)))
    assert len(rows) == ROWS and all(row.error is None for row in rows)
    path.write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE))
    assert path.stat().st_size < len(whole) and list(read_rows(str(path))) == rows


def test_an_unreadable_image_is_replaced_by_one_of_its_shard(tmp_path: Path, cache: Path) -> None:
    folder = write_set(tmp_path / "photos", tars=3)
    files = [(f"{i}.{end}", data) for i in range(ROWS) for end, data in (("png", numbered_png(i)), ("txt", b"%d" % i))]
    files[10] = ("5.png", b"damaged")
    write_tar(folder / "001.tar", files)
    data = open_dataset(DataConfig(source=str(folder), resolution=16, max_unreadable=0.5), "train", seed=0)
    sample = data[SampleKey(ROWS - 1 + 4, 0, 0)]
    assert 1 <= int(sample["caption"]) < ROWS and int(sample["caption"]) != 5
    assert len(data.reader.unreadable()) == 1 and f"{folder}/001.tar, row 5: not a PNG" in data.reader.unreadable()[0]
    assert len(list(cache.rglob("*.arrow"))) == 1  # its own shard alone
    write_tar(folder / "001.tar", [(f"{i}.png", b"damaged") for i in range(ROWS)])
    data = open_dataset(DataConfig(source=str(folder), resolution=16, max_unreadable=0.5), "train", seed=0)
    other = int(data[SampleKey(ROWS - 1 + 4, 0, 0)]["caption"])
    assert (
        not ROWS <= other < 2 * ROWS and len(data.reader.unreadable()) > 5
    )  # where most of it is damaged, one of another shard
    source = data.source
    assert isinstance(source, ShardedSource)
    source.cache.path(1).unlink()
    assert f"{folder}/001.tar, row 5" in data.reader.unreadable()  # no reason, for which it had to be downloaded again


def test_shards_are_downloaded_ahead(photos: Path, cache: Path) -> None:
    """By a loading process: those of its samples, and those that come next."""
    data = open_dataset(DataConfig(source=str(photos), resolution=16, shard_streams=2), "train", seed=0)
    source = data.source
    assert isinstance(source, ShardedSource)
    keys = next(iter(data.make_batch_sampler(seed=0, batch_size=4)))
    needed = [source.cache.locate(key.index)[0] for key in (keys[0], keys[2])]
    files = permutation(TARS, 0, 0, "files").tolist()
    ahead = {*needed, *(files[files.index(number) + 1] for number in needed)}
    loader = DataLoader(
        KeyedBatches(data), batch_sampler=[keys], num_workers=1, collate_fn=tuple, persistent_workers=True
    )
    batches = iter(loader)
    next(batches)
    expected = {source.cache.path(number) for number in ahead}
    deadline = time.monotonic() + 20
    while not expected <= set(cache.rglob("*.arrow")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_evenly_spaced_items_need_few_shards(tmp_path: Path, cache: Path) -> None:
    photos = write_set(tmp_path / "photos", tars=40, rows=3)
    data = open_dataset(DataConfig(source=str(photos), resolution=16), "train", seed=0)
    items = data.source.evenly_spaced(20)
    assert len(set(items)) == 20 and len({index // 2 for index in items}) == 16
    assert data.source.evenly_spaced(100) == [
        first + i for first in sorted({i // 2 * 2 for i in items}) for i in (0, 1)
    ]


def test_ranks_and_stops_change_nothing(photos: Path, tmp_path: Path) -> None:
    """Two ranks with loading processes of their own, and a stop, give the run of one without."""
    flags = ["--data.source", f"{photos}/{{000..005}}.tar", "--data.shard-streams", "4"]
    train("vae", tmp_path / "whole/vae", *flags)
    train("vae", tmp_path / "cut/vae", *flags, "--steps", "2", "--num-workers", "2")
    train("vae", tmp_path / "cut/vae", *flags, "--resume", "latest", "--num-workers", "2")
    whole, cut = losses(tmp_path / "whole/vae"), losses(tmp_path / "cut/vae")
    assert whole == cut and len(whole) == 4
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache-of-ranks")}
    launch("vae", tmp_path / "two", 2, [*flags, "--num-workers", "1"], environment=environment)
    assert losses(tmp_path / "two") == pytest.approx(whole, rel=1e-5)
    assert list((tmp_path / "cache-of-ranks").rglob("*.arrow"))
    write_tar(photos / "000.tar", [("1.png", numbered_png(1)), ("2.png", numbered_png(2))])
    with pytest.raises(SystemExit, match="step-000004 was trained on other images"):
        train("vae", tmp_path / "cut/vae", *flags, "--resume", "latest", "--steps", "9")


def test_other_stages_read_shards(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train_clip and train_ldm, cache_latents.py, and check_data.py."""
    flags = ["--data.source", str(photos)]
    train("clip", tmp_path / "clip", *flags)
    train("vae", tmp_path / "vae", *flags)
    train("ldm", tmp_path / "ldm", *flags, "--no-cache-latents")
    with pytest.raises(SystemExit, match="data.source: shards .*--no-cache-latents"):
        train("ldm", tmp_path / "other", *flags)
    out = ["--out", str(tmp_path / "latents"), "--data.resolution", "16", "--images-per-file", "50"]
    cache_latents.main([*out, *flags])
    train("ldm", tmp_path / "cached", *flags, "--cached-latents", str(tmp_path / "latents"))
    assert len(losses(tmp_path / "cached")) == len(losses(tmp_path / "ldm")) == 4
    capsys.readouterr()
    check_data.main([str(photos), "--size", "16"])
    assert f"{TARS * ROWS} images, 0 unreadable" in capsys.readouterr().out
