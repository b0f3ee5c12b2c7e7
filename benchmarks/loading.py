"""Measure how fast images and latents come: results/loading.json, on which docs/scaling.md builds.

    python benchmarks/loading.py

Images: JPEGs of 1024 x 768 from a folder, decoded, cut and resized to 512, by the number of loading processes. Latents:
rows of 4 x 32 x 32 (256 pixels, factor 8) from files of 4,096, in shuffled order. First batch: of ten million rows.
Shards: tar and parquet files of the same JPEGs, counted, fetched into the cache, read in shuffled order, decoded.
"""

import io
import json
import os
import platform
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ldm.data import DataConfig, collate, open_dataset
from ldm.data.batch_sampler import EpochBatchSampler, ShardedBatchSampler, permutation
from ldm.data.latents import (
    INDEX_FILE,
    LatentDataset,
    LatentFileLayout,
    LatentIndex,
    content_key,
    list_latent_files,
    save_latent_file,
)
from ldm.data.sources.sharded import open_shards

ROOT = Path(__file__).parents[1]
PHOTOS, ROWS, SHARD, MANY, BATCH, SHARDS = 600, 16_384, 4_096, 10_000_000, 256, 4
IDENTITY: dict[str, Any] = {"data": {}, "items": {}, "seed": 0, "vae_sha256": "", "tokenizer_sha256": ""}


def photos(folder: Path) -> None:
    """JPEGs with the detail, and so the size, of photographs: about 250 kB each."""
    draw = np.random.default_rng(0)
    fine = draw.integers(-14, 15, (768, 1024, 3), np.int16)
    for number in range(PHOTOS):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).resize((1024, 768))
        pixels = np.clip(np.asarray(coarse, np.int16) + np.roll(fine, number, 1), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        (folder / f"{number:04}.jpg").write_bytes(buffer.getvalue())


def shard(path: Path, made: str, rows: int) -> None:
    """A file of latents as scripts/encode.py writes it, of random numbers."""
    draw = torch.Generator().manual_seed(0)
    columns = {
        "mean": torch.randn(rows, 4, 32, 32, generator=draw).half(),
        "deviation": torch.rand(rows, 4, 32, 32, generator=draw).half(),
        "sizes": torch.full((rows, 6), 256, dtype=torch.int32),
        "ids": torch.randint(0, 49_408, (rows, 77), generator=draw, dtype=torch.int32),
        "last": torch.arange(1, rows + 1),
    }
    save_latent_file(path, columns, made)


def index(folder: Path, rows: int) -> LatentIndex:
    """Write the index of a folder of latents."""
    told = LatentIndex(
        fingerprint=IDENTITY,
        images_per_file=SHARD,
        augmentations=1,
        rows={"train": rows, "test": 0},
        sample_captions=[],
    )
    (folder / INDEX_FILE).write_text(json.dumps(told.to_dict()))
    return told


def batches(data: Dataset[Any], workers: int, batch: int = BATCH) -> Iterator[Any]:
    """Shuffled batches, as training takes them."""
    order = data.order(seed=0, batch_size=batch)  # type: ignore[attr-defined]
    return iter(DataLoader(data, batch_sampler=order, collate_fn=collate, num_workers=workers))


def tar(path: Path, images: Sequence[Path]) -> None:
    """A shard in webdataset's layout: an image and its caption after each other."""
    with tarfile.open(path, "w") as file:
        for image in images:
            file.add(image, image.name)
            caption = tarfile.TarInfo(f"{image.stem}.txt")
            caption.size = len(image.stem)
            file.addfile(caption, io.BytesIO(image.stem.encode()))


def parquet(path: Path, images: Sequence[Path]) -> None:
    """A shard as hub data sets have them."""
    cells = [{"bytes": image.read_bytes(), "path": None} for image in images]
    table = pyarrow.table({"image": cells, "caption": [image.stem for image in images]})
    pyarrow.parquet.write_table(table, path, row_group_size=100)


def shards(folder: Path, images: list[Path], cores: int) -> dict[str, Any]:
    """What shards of all images cost, by their format, and what a loading process needs for them."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    found: dict[str, Any] = {}
    for write in (tar, parquet):
        kind = write.__name__
        (folder / kind).mkdir()
        for number in range(SHARDS):
            write(folder / kind / f"{number}.{kind}", images[number::SHARDS])
        start = time.perf_counter()
        source = open_shards(str(folder / kind), "train", streams=SHARDS)
        counted = time.perf_counter()
        for number in range(SHARDS):
            source.store.rows(number)
        fetched = time.perf_counter()
        found[f"{kind}_rows_counted_per_second"] = round(len(images) / (counted - start))
        found[f"{kind}_rows_fetched_per_second"] = round(len(images) / (fetched - counted))
        order = iter(
            ShardedBatchSampler([span.rows for span in source.spans], streams=SHARDS, seed=0, batch_size=BATCH)
        )
        keys = [key for _ in range(20) for key in next(order)]
        start = time.perf_counter()
        for key in keys:
            source.images[key.index]
        found[f"{kind}_rows_read_per_second"] = round(len(keys) / (time.perf_counter() - start))
    config = DataConfig(source=str(folder / "tar"), resolution=512, shard_streams=SHARDS)
    data = open_dataset(config, "train", seed=0)
    found["images_per_second"] = {w: round(rate(data, w, count=512, batch=32), 1) for w in range(cores + 1)}
    found["worker_mib"] = round(worker_memory(data), 1)
    start = time.perf_counter()
    next(iter(ShardedBatchSampler([10_000] * (MANY // 10_000), streams=16, seed=0, batch_size=BATCH)))
    found["seconds_to_first_keys_of_10_million"] = round(time.perf_counter() - start, 3)
    return found


def rate(data: Dataset[Any], workers: int, *, count: int, batch: int) -> float:
    """Samples a second, after the first batches, in which loading processes start."""
    found = batches(data, workers, batch)
    for _ in range(1 + workers):
        next(found)
    start = time.perf_counter()
    for _ in range(count // batch):
        next(found)
    return count // batch * batch / (time.perf_counter() - start)


def worker_memory(data: Dataset[Any]) -> float:
    """What a loading process adds to the memory of the machine, MiB: its own pages, after 20 batches."""
    found = batches(data, 1, 32)
    for _ in range(20):
        next(found)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    own = []
    for child in children.stdout.split():
        rollup = Path(f"/proc/{child}/smaps_rollup")
        if rollup.is_file():
            lines = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:] if ":" in line)
            own.append(sum(int(lines[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024)
    return max(own)


def first_batch(folder: Path, made: str) -> float:
    """Seconds to the first shuffled batch of ten million rows; of 2,442 files those are there that it takes from."""
    names = [name for name, _, _ in list_latent_files("train", LatentFileLayout(MANY, SHARD), variants=1)]
    order = EpochBatchSampler(MANY, seed=0, batch_size=BATCH)
    wanted = {names[i // SHARD] for i in order.indices(0)}
    for name in wanted:
        shard(folder / name, made, 64)
    index(folder, MANY)
    permutation.cache_clear()
    start = time.perf_counter()
    data = LatentDataset(folder, "train", seed=0)
    keys = next(iter(EpochBatchSampler(MANY, seed=0, batch_size=BATCH)))
    collate([data[key._replace(index=key.index // SHARD * SHARD + key.index % 64)] for key in keys])
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write results/loading.json."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("photos", "latents", "many"):
            (folder / part).mkdir()
        photos(folder / "photos")
        data = open_dataset(DataConfig(source=str(folder / "photos"), resolution=512), "train", seed=0)
        mean = sum(path.stat().st_size for path in (folder / "photos").iterdir()) / PHOTOS
        found["jpeg_kib"] = round(mean / 1024, 1)
        found["images_per_second"] = {w: round(rate(data, w, count=512, batch=32), 1) for w in range(cores + 1)}
        found["worker_mib"] = round(worker_memory(data), 1)
        found["shards"] = shards(folder, sorted((folder / "photos").iterdir()), cores)
        made = content_key(index(folder / "latents", ROWS).fingerprint, SHARD)
        for shard_name, _, rows in list_latent_files("train", LatentFileLayout(ROWS, SHARD), variants=1):
            shard(folder / "latents" / shard_name, made, len(rows))
        found["latent_row_kib"] = round(
            sum(p.stat().st_size for p in (folder / "latents").glob("*.safetensors")) / ROWS / 1024, 2
        )
        latents = LatentDataset(folder / "latents", "train", seed=0)
        found["latents_per_second"] = {w: round(rate(latents, w, count=12_800, batch=BATCH)) for w in range(cores + 1)}
        found["seconds_to_first_batch_of_10_million"] = round(first_batch(folder / "many", made), 2)
    about = {
        "machine": f"{platform.machine()}, {cores} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    results = ROOT / "benchmarks/results/loading.json"
    results.write_text(json.dumps({**about, "commit": commit, **found}, indent=1) + "\n")
    print(results.read_text())


if __name__ == "__main__":
    main()
