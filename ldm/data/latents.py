"""Latents computed once: in memory, or with token ids in files that are read from the disk row by row.

A folder holds index.json, vocab.txt and SPLIT-AUGMENTATION-NUMBER.safetensors. An augmentation is one crop and flip of
every image: augmentation a of n is what epochs a, a + n, ... would have cropped. A file's metadata name it and what it
was made with, and each row has a checksum, so no file need be read whole to be trusted. Where images have buckets, a
file holds images of one bucket, and buckets.safetensors has the bucket of each image.
"""

import itertools
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm import rng
from ldm.config import Config
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey, make_batch_sampler
from ldm.data.dataset import ImageTextDataset
from ldm.data.loader import sample_batches
from ldm.data.sources.base import Split
from ldm.io.atomic import write_tensors
from ldm.io.tensors import sha256
from ldm.ranks import ONE_RANK, Ranks

LATENTS_FORMAT: Literal["ldm-latents-4"] = "ldm-latents-4"
INDEX_FILE, VOCABULARY_FILE, BUCKETS_FILE = "index.json", "vocab.txt", "buckets.safetensors"
ITEM_HASHES = "items", "content"  # of the images of each split: see `ImageTextDataset.fingerprint`
TEXT_COLUMNS = "hidden_states", "pooled"  # of the text towers, for each caption
MAX_OPEN_FILES = 64  # by each process
ENCODE_BATCH_SIZE = 64  # images, or captions, that are encoded at a time
MIN_STD = 1e-7  # of a latent: one that float16 made 0 has a logarithm
REMEDY = "run scripts/cache_latents.py again, which keeps valid files"
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # (b, c, height, width) to mean and log-variance (b, c, h, w)


class InMemoryLatents(Dataset[dict[str, Any]]):
    """The samples of a data set with what `encode` makes of images in their place, such as latents: see `Batch`.

    What it makes of each bucket is of a shape of its own, and so in columns of its own. Each rank encodes a part.
    """

    def __init__(
        self,
        data: ImageTextDataset,
        encode: Callable[[Tensor], Mapping[str, Tensor]],
        *,
        device: torch.device,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self.data, self.groups = data, data.groups if data.groups is not None else torch.zeros(len(data)).long()
        self.rows = torch.empty_like(self.groups)  # of each sample, in the columns of its group
        self.columns: list[dict[str, Tensor]] = []

        def encode_rows(rows: Tensor) -> dict[str, Tensor]:
            [batch] = sample_batches(data, rows.tolist())
            encoded = {name: column.cpu() for name, column in encode(batch["image"].to(device)).items()}
            return {**encoded, "sizes": batch["sizes"]}

        with tqdm(total=len(data), desc="latents", unit="image", disable=ranks.rank > 0) as bar, torch.no_grad():
            for group in range(len(data.sides)):
                members, parts = (self.groups == group).nonzero().flatten(), []
                self.rows[members] = torch.arange(len(members))
                for part in ranks.map(encode_rows, members.split(ENCODE_BATCH_SIZE)):
                    parts.append(part)
                    bar.update(len(part["sizes"]))
                self.columns.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        data.sync(ranks.gather)  # the images that could not be read, whose replacements have captions of their own
        self.make_batch_sampler, self.sync, self.report = data.make_batch_sampler, data.sync, data.report
        self.fingerprint, self.item_names = data.fingerprint, data.item_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        columns, row = self.columns[int(self.groups[key.index])], int(self.rows[key.index])
        return {name: column[row] for name, column in columns.items()} | {"caption": self.data.caption(key)}


class LatentIndex(Config):
    """What a folder of latents holds, and what it was made with."""

    format: Literal["ldm-latents-4"] = LATENTS_FORMAT
    fingerprint: dict[str, Any]
    """data, seed, and the hashes of the VAE and of the tokenizer; of the towers, too, if text embeddings are cached"""
    source: str | None = None
    """`data.source` as it was spelled"""
    images_per_file: int = Field(ge=1)
    augmentations: int = Field(ge=1)
    rows: dict[Split, NonNegativeInt] = Field(min_length=2)
    sample_captions: list[str]
    """the first captions of the test split, for sample grids"""
    cut_captions: str = ""
    """the report of captions that the text tower cuts"""
    groups_sha256: str | None = None
    """hash of buckets.safetensors, where images have buckets"""


def content_key(fingerprint: dict[str, Any], images_per_file: int) -> str:
    """A short hash of what decides latents, ids, and which rows are where; it is in each file's metadata."""
    return str(rng.fold_seed(json.dumps([LATENTS_FORMAT, fingerprint, images_per_file], sort_keys=True)))


class LatentFileLayout:
    """Which rows of a split are in which file: in their order, `size` in each, and no two groups in one."""

    def __init__(self, split: Split, rows: int, size: int, *, augmentations: int, groups: Tensor | None) -> None:
        self.split, self._rows, self.augmentations = split, rows, augmentations if split == "train" else 1
        self._order = None if groups is None else groups.argsort(stable=True)
        self._position = None if self._order is None else self._order.argsort()  # of each row in that order
        ends = list(itertools.accumulate([rows] if groups is None else groups.bincount().tolist(), initial=0))
        self._starts = [i for start, end in itertools.pairwise(ends) for i in range(start, end, size)]

    def files(self) -> list[tuple[str, int, Sequence[int]]]:
        """Name, augmentation and rows of every file."""
        order, spans = self._order, itertools.pairwise([*self._starts, self._rows])
        rows = [range(first, end) if order is None else order[first:end].tolist() for first, end in spans]
        return [(self._name(a, number), a, part) for a in range(self.augmentations) for number, part in enumerate(rows)]

    def locate(self, row: int, epoch: int) -> tuple[str, int]:
        """The name of the file that has a row in an epoch, and its row there."""
        position = row if self._position is None else int(self._position[row])
        number = bisect_right(self._starts, position) - 1
        return self._name(epoch % self.augmentations, number), position - self._starts[number]

    def _name(self, augmentation: int, number: int) -> str:
        return f"{self.split}-{augmentation:03}-{number:06}.safetensors"


def write_latent_file(
    path: Path,
    data: ImageTextDataset,
    augmentation: int,
    rows: Sequence[int],
    *,
    encode: Encode,
    tokenize: Callable[[list[str]], Tensor],
    encode_text: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    key: str,
) -> None:
    """Encode the images at some rows and their captions, and write them; `key` is `content_key`.

    `tokenize` maps captions to ids (b, n), `encode_text` these to `TEXT_COLUMNS`. ValueError: numbers beyond float16.
    """
    columns: dict[str, list[Tensor]] = {"mean": [], "deviation": [], "sizes": []}
    for batch in sample_batches(data, rows, epoch=augmentation, batch_size=ENCODE_BATCH_SIZE):
        mean, logvar = encode(batch["image"])
        columns["mean"].append(_to_float16(mean, "latents"))
        columns["deviation"].append(_to_float16((0.5 * logvar).exp(), "latents"))
        columns["sizes"].append(batch["sizes"].int())
    captions = [data.captions_of(SampleKey(row, augmentation, row)) for row in rows]
    columns["ids"] = [tokenize(texts).int() for texts in captions]
    if encode_text is not None:
        for ids in torch.cat(columns["ids"]).split(ENCODE_BATCH_SIZE):
            for name, states in zip(TEXT_COLUMNS, encode_text(ids.long()), strict=True):
                columns.setdefault(name, []).append(_to_float16(states, "text embeddings"))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    counts = torch.tensor([len(texts) for texts in captions])
    tensors["last"] = counts.cumsum(0)  # row of `ids` after the last caption of each row
    save_latent_file(path, tensors, key)


def _to_float16(numbers: Tensor, name: str) -> Tensor:
    halves = numbers.half().cpu()
    if not halves.isfinite().all():
        raise ValueError(f"{name} overflow float16 (max {numbers.abs().max():g}, limit 65,504): do not cache them")
    return halves


def save_latent_file(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write the columns of a file, with a checksum of each row, whole."""
    firsts = torch.cat([tensors["last"].new_zeros(1), tensors["last"][:-1]])
    spans = zip(firsts.tolist(), tensors["last"].tolist(), strict=True)
    checksums = [checksum(_row(tensors, i, first, last)) for i, (first, last) in enumerate(spans)]
    write_tensors(path, {**tensors, "checksum": torch.tensor(checksums)}, file_tag(path.name, key))


def file_tag(name: str, key: str) -> dict[str, str]:
    """A file's metadata: one entry, as safetensors writes several in any order and equal files shall be equal bytes."""
    return {"file": f"{name} {key}"}


def is_valid(path: Path, key: str) -> bool:
    """Whether a file was finished, with what `key` stands for."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == file_tag(path.name, key)
    except (OSError, SafetensorError):
        return False


def save_groups(folder: Path, groups: Tensor | None) -> str | None:
    """Write the group of each training row, where there are groups; returns the hash of the file."""
    if groups is None:
        return None
    write_tensors(folder / BUCKETS_FILE, {"groups": groups.short()})
    return sha256(folder / BUCKETS_FILE)


def checksum(row: dict[str, Tensor]) -> int:
    """CRC-32 of names, types, shapes and numbers of a row."""
    total = 0
    for name, tensor in sorted(row.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().numpy().tobytes(), total)
    return total


def _row(columns: Any, index: int, first: int, last: int) -> dict[str, Tensor]:
    """Everything of one row; `columns` are tensors by name, or slices of a file."""
    row = {name: columns[name][index : index + 1] for name in ("mean", "deviation", "sizes")}
    captions = {name: columns[name][first:last] for name in ("ids", *TEXT_COLUMNS) if name in columns}
    return {**row, **captions, "span": torch.tensor([index, first, last])}


def read_index(folder: Path) -> LatentIndex:
    """ValueError when the folder is unfinished, damaged, or of another version."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished latents (no {INDEX_FILE}): run scripts/cache_latents.py")
    try:
        values = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: {REMEDY}") from None
    if (version := values.get("format")) != LATENTS_FORMAT:
        raise ValueError(f"{folder} holds {version}, expected {LATENTS_FORMAT}: run scripts/cache_latents.py again")
    return LatentIndex.from_dict(values, source=str(path))


class LatentDataset(Dataset[dict[str, Any]]):
    """The samples of a split of a folder: see `Batch`. Captions are drawn as `ImageTextDataset` draws them."""

    def __init__(self, folder: Path, split: Split, *, seed: int) -> None:
        self.folder, self.split, self.seed = folder, split, seed
        self.index = read_index(folder)
        self.key = content_key(self.index.fingerprint, self.index.images_per_file)
        self.groups = None
        if split == "train" and self.index.groups_sha256:
            path = folder / BUCKETS_FILE
            if not path.is_file() or sha256(path) != self.index.groups_sha256:
                raise ValueError(f"{path} is missing or damaged: {REMEDY}")
            self.groups = load_file(path)["groups"].long()
        rows, size, augmentations = self.index.rows[split], self.index.images_per_file, self.index.augmentations
        self._layout = LatentFileLayout(split, rows, size, augmentations=augmentations, groups=self.groups)

    def __len__(self) -> int:
        return self.index.rows[self.split]

    def make_batch_sampler(self, **options: int) -> EpochBatchSampler:
        return make_batch_sampler(len(self), self.groups, **options)

    def fingerprint(self) -> dict[str, Any]:
        hashes = self.index.fingerprint
        return {name: hashes[name][self.split] for name in ITEM_HASHES if hashes.get(name)}

    def item_names(self) -> list[str]:
        """None: the rows of a folder never change."""
        return []

    def describe(self) -> str:
        """What was opened, on one line."""
        rows, embeddings = self.index.rows, ", with text embeddings" if "text_sha256" in self.index.fingerprint else ""
        counts = f"{rows['train']:,} with {self.index.augmentations} augmentations, {rows['test']:,} held out"
        return f"latents: {counts}, in {self.folder}{embeddings}"

    def sync(self, gather: Callable[[list[int]], list[int]]) -> None:
        """All ranks read the same files."""

    def report(self) -> str:
        """Nothing: what cannot be read is an error."""
        return ""

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        name, row_in_file = self._layout.locate(key.index, key.epoch)
        path = self.folder / name
        try:
            row = read_row(open_columns(path, self.key), row_in_file)
        except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError):
            raise ValueError(f"{path} is missing or damaged: remove it and {REMEDY}") from None
        draw = rng.fold_seed(self.seed, "caption", key.epoch, key.index) if self.split == "train" else 0
        chosen = draw % len(row["ids"])
        return {
            "mean": row["mean"][0].float(),
            "logvar": 2 * row["deviation"][0].float().clamp_min(MIN_STD).log(),
            "sizes": row["sizes"][0].long(),
            "ids": row["ids"][chosen].long(),
            **{name: row[name][chosen].float() for name in TEXT_COLUMNS if name in row},
        }


def read_row(columns: Any, row: int) -> dict[str, Tensor]:
    """A row of a file; ValueError when it is not what was written."""
    first, last = (int(columns["last"][i : i + 1].item()) if i >= 0 else 0 for i in (row - 1, row))
    if not 0 <= first < last:
        raise ValueError("the spans of the captions do not rise")
    values = _row(columns, row, first, last)
    if checksum(values) != columns["checksum"][row : row + 1].item():
        raise ValueError("checksum mismatch")
    return values


@lru_cache(MAX_OPEN_FILES)
def open_columns(path: Path, key: str) -> dict[str, Any]:
    """The columns of a file that is mapped into memory; ValueError when it was made with something else."""
    if not is_valid(path, key):
        raise ValueError("not a file of this cache")
    file = safe_open(path, framework="pt")
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is not a dictionary)
