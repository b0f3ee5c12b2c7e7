"""Measure how fast images and latents are loaded: results/loading.json, which docs/scaling.md builds on.

    python benchmarks/loading.py

Images: JPEGs of 1024 x 768 from a folder, decoded, cropped and resized to 512, by the number of loading processes.
Latents: rows of 4 x 32 x 32 (256 pixels, factor 8) from files of 4,096, in shuffled order. First batch: of ten million
rows. Shards: tar and parquet files of the same JPEGs, counted, fetched into the cache, read in shuffled order, decoded.
"""

import io
import json
import os
import platform
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from commit import commit
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data import DataConfig, ImageTextDataset, collate, open_dataset
from ldm.data.batch_sampler import EpochBatchSampler, ShardedBatchSampler, permutation
from ldm.data.latents import (
    INDEX_FILE,
    LatentDataset,
    LatentFileLayout,
    LatentIndex,
    content_key,
    save_latent_file,
)
from ldm.data.sources.sharded import open_shards

ROOT = Path(__file__).parents[1]
NUM_PHOTOS, NUM_SHARDS, BATCH_SIZE = 600, 4, 256
NUM_LATENTS, LATENTS_PER_FILE, MANY_LATENTS = 16_384, 4_096, 10_000_000
FINGERPRINT: dict[str, Any] = {"data": {}, "items": {}, "seed": 0, "vae_sha256": "", "tokenizer_sha256": ""}


def photos(folder: Path) -> None:
    """JPEGs with the detail, and so the size, of photographs: about 250 kB each."""
    draw = np.random.default_rng(0)
    fine = draw.integers(-14, 15, (768, 1024, 3), np.int16)
    for number in range(NUM_PHOTOS):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).resize((1024, 768))
        pixels = np.clip(np.asarray(coarse, np.int16) + np.roll(fine, number, 1), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        (folder / f"{number:04}.jpg").write_bytes(buffer.getvalue())


def latent_file(path: Path, key: str, rows: int) -> None:
    """A file of latents as scripts/cache_latents.py writes it, of random numbers."""
    draw = torch.Generator().manual_seed(0)
    columns = {
        "mean": torch.randn(rows, 4, 32, 32, generator=draw).half(),
        "deviation": torch.rand(rows, 4, 32, 32, generator=draw).half(),
        "sizes": torch.full((rows, 6), 256, dtype=torch.int32),
        "ids": torch.randint(0, 49_408, (rows, 77), generator=draw, dtype=torch.int32),
        "last": torch.arange(1, rows + 1),
    }
    save_latent_file(path, columns, key)


def latent_index(folder: Path, rows: int) -> None:
    """Write the index of a folder of latents."""
    index = LatentIndex(
        fingerprint=FINGERPRINT,
        images_per_file=LATENTS_PER_FILE,
        augmentations=1,
        rows={"train": rows, "test": 0},
        sample_captions=[],
    )
    (folder / INDEX_FILE).write_text(json.dumps(index.to_dict()))


def latent_files(rows: int) -> list[tuple[str, int]]:
    """Name and rows of all files of latents."""
    layout = LatentFileLayout("train", rows, LATENTS_PER_FILE, augmentations=1, groups=None)
    return [(name, len(chosen)) for name, _, chosen in layout.files()]


def batches(data: ImageTextDataset | LatentDataset, workers: int, batch_size: int = BATCH_SIZE) -> Iterator[Any]:
    """Shuffled batches, as training takes them."""
    sampler = data.make_batch_sampler(seed=0, batch_size=batch_size)
    return iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


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
    results: dict[str, Any] = {}
    for write in (tar, parquet):
        kind = write.__name__
        (folder / kind).mkdir()
        for number in range(NUM_SHARDS):
            write(folder / kind / f"{number}.{kind}", images[number::NUM_SHARDS])
        start = time.perf_counter()
        source = open_shards(str(folder / kind), "train", streams=NUM_SHARDS)
        counted = time.perf_counter()
        for number in range(NUM_SHARDS):
            source.cache.open(number)
        downloaded = time.perf_counter()
        results[f"{kind}_rows_counted_per_second"] = round(len(images) / (counted - start))
        results[f"{kind}_rows_fetched_per_second"] = round(len(images) / (downloaded - counted))
        rows = [span.rows for span in source.cache.ranges]
        sampler = iter(ShardedBatchSampler(rows, streams=NUM_SHARDS, seed=0, batch_size=BATCH_SIZE))
        keys = [key for _ in range(20) for key in next(sampler)]
        start = time.perf_counter()
        for key in keys:
            source.images[key.index]
        results[f"{kind}_rows_read_per_second"] = round(len(keys) / (time.perf_counter() - start))
    config = DataConfig(source=str(folder / "tar"), resolution=512, shard_streams=NUM_SHARDS)
    data = open_dataset(config, "train", seed=0)
    results["images_per_second"] = {n: round(rate(data, n, count=512, batch_size=32), 1) for n in range(cores + 1)}
    results["worker_mib"] = round(worker_memory(data), 1)
    start = time.perf_counter()
    next(iter(ShardedBatchSampler([10_000] * (MANY_LATENTS // 10_000), streams=16, seed=0, batch_size=BATCH_SIZE)))
    results["seconds_to_first_keys_of_10_million"] = round(time.perf_counter() - start, 3)
    return results


def rate(data: ImageTextDataset | LatentDataset, workers: int, *, count: int, batch_size: int) -> float:
    """Samples a second, after the first batches, in which loading processes start."""
    loader = batches(data, workers, batch_size)
    for _ in range(1 + workers):
        next(loader)
    start = time.perf_counter()
    for _ in range(count // batch_size):
        next(loader)
    return count // batch_size * batch_size / (time.perf_counter() - start)


def worker_memory(data: ImageTextDataset) -> float:
    """What a loading process adds to the memory of the machine, MiB: its private pages, after 20 batches."""
    loader = batches(data, 1, 32)
    for _ in range(20):
        next(loader)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    private = []
    for child in children.stdout.split():
        rollup = Path(f"/proc/{child}/smaps_rollup")
        if rollup.is_file():
            lines = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:] if ":" in line)
            private.append(sum(int(lines[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024)
    return max(private)


def first_batch(folder: Path, key: str) -> float:
    """Seconds to the first shuffled batch of ten million rows; of 2,442 files those are there that it takes from."""
    names = [name for name, _ in latent_files(MANY_LATENTS)]
    sampler = EpochBatchSampler(MANY_LATENTS, seed=0, batch_size=BATCH_SIZE)
    for name in {names[i // LATENTS_PER_FILE] for i in sampler.indices(0)}:
        latent_file(folder / name, key, 64)
    latent_index(folder, MANY_LATENTS)
    permutation.cache_clear()
    start = time.perf_counter()
    data = LatentDataset(folder, "train", seed=0)
    keys = next(iter(data.make_batch_sampler(seed=0, batch_size=BATCH_SIZE)))
    rows = [key.index // LATENTS_PER_FILE * LATENTS_PER_FILE + key.index % 64 for key in keys]  # that are there
    collate([data[replace(key, index=row)] for key, row in zip(keys, rows, strict=True)])
    return time.perf_counter() - start


def measure(folder: Path, cores: int) -> dict[str, Any]:
    """All results; the files that they need are written to a folder."""
    for part in ("photos", "latents", "many"):
        (folder / part).mkdir()
    photos(folder / "photos")
    data = open_dataset(DataConfig(source=str(folder / "photos"), resolution=512), "train", seed=0)
    results: dict[str, Any] = {"jpeg_kib": round(mean_size(folder / "photos"), 1)}
    results["images_per_second"] = {n: round(rate(data, n, count=512, batch_size=32), 1) for n in range(cores + 1)}
    results["worker_mib"] = round(worker_memory(data), 1)
    results["shards"] = shards(folder, sorted((folder / "photos").iterdir()), cores)
    key = content_key(FINGERPRINT, LATENTS_PER_FILE)
    for name, rows in latent_files(NUM_LATENTS):
        latent_file(folder / "latents" / name, key, rows)
    results["latent_row_kib"] = round(mean_size(folder / "latents") / LATENTS_PER_FILE, 2)
    latent_index(folder / "latents", NUM_LATENTS)
    latents = LatentDataset(folder / "latents", "train", seed=0)
    rates = {n: rate(latents, n, count=12_800, batch_size=BATCH_SIZE) for n in range(cores + 1)}
    results["latents_per_second"] = {workers: round(value) for workers, value in rates.items()}
    results["seconds_to_first_batch_of_10_million"] = round(first_batch(folder / "many", key), 2)
    return results


def mean_size(folder: Path) -> float:
    """Of the files in a folder, in KiB."""
    return statistics.mean(path.stat().st_size for path in folder.iterdir()) / 1024


def main() -> None:
    """Measure, and write results/loading.json."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), cores)
    machine = {
        "machine": f"{platform.machine()}, {cores} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    path = ROOT / "benchmarks/results/loading.json"
    path.write_text(json.dumps({**machine, **results}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
