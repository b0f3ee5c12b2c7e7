"""Latents and token ids computed once, in files of a fixed number of rows that are read from the disk row by row.

A folder holds index.json, words.txt and SPLIT-VARIANT-NUMBER.safetensors. A variant is one crop and flip of every
image: variant v of n is what epochs v, v + n, ... would have cut. Each file tells its name and what it was made with,
and each row has a checksum: a row that is read is a row that was written, and no file need be read whole for it. Where
images have buckets, a file holds images of one bucket, and buckets.safetensors tells the bucket of each image.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm import rng
from ldm.config import Config
from ldm.data import ImageTextDataset, collate
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey, make_batch_sampler
from ldm.data.sources.shapes import Split
from ldm.io.atomic import write_tensors
from ldm.io.tensors import sha256

INDEX_FILE, VOCABULARY_FILE, BUCKETS_FILE = "index.json", "words.txt", "buckets.safetensors"
TEXT_COLUMNS = "tokens", "pooled"  # what a text tower says of each wording
MAX_OPEN_FILES = 64  # files that a process keeps open
ENCODE_BATCH_SIZE = 64  # images, or captions, that are encoded at a time
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> mean and log-variance of their latents
EncodeText = Callable[[Tensor], tuple[Tensor, Tensor]]  # ids -> token states and pooled vectors, each of a fixed size
Tokenize = Callable[[list[str]], Tensor]  # captions -> (n, length) ids


class LatentIndex(Config):
    """What a folder of latents holds, and what it was made with."""

    format: Literal["ldm-latents-3"] = "ldm-latents-3"
    fingerprint: dict[str, Any]
    """data, seed, and the hashes of the VAE and of the tokenizer; of the text towers, too, where states are kept"""
    images_per_file: int = Field(ge=1)
    augmentations: int = Field(ge=1)
    rows: dict[Split, NonNegativeInt] = Field(min_length=2)
    sample_captions: list[str]
    """the first captions of the test split, for sample grids"""
    groups_sha256: str | None = None
    """hash of buckets.safetensors, where images have buckets"""


def content_key(identity: dict[str, Any], shard_size: int) -> str:
    """A short name of what decides latents, ids, and which rows are where; it stands in each file."""
    return str(rng.fold_seed(json.dumps([identity, shard_size], sort_keys=True)))


class LatentFileLayout:
    """Which rows stand in which file: in their order, `shard_size` in each, and no two groups in one."""

    def __init__(self, rows: int, shard_size: int, groups: Tensor | None = None) -> None:
        self.shard_size = shard_size
        self._order: Tensor | None = None
        self._firsts, counts = [0], [rows]  # of each group: its first file, its rows
        if groups is not None:
            self._order, self._groups, counts = groups.argsort(stable=True), groups, groups.bincount().tolist()
            self._rank = torch.empty_like(self._order)  # of each row in its group
            starts = torch.tensor([0, *itertools.accumulate(counts[:-1])])
            self._rank[self._order] = torch.arange(rows) - starts[groups[self._order]]
        for count in counts[:-1]:
            self._firsts.append(self._firsts[-1] - (-count // shard_size))
        self._counts = counts

    def files(self) -> list[Sequence[int]]:
        """The rows of each file."""
        starts = itertools.accumulate(self._counts[:-1], initial=0)
        spans = [
            range(first, min(first + self.shard_size, start + count))
            for start, count in zip(starts, self._counts, strict=True)
            for first in range(start, start + count, self.shard_size)
        ]
        return [span if self._order is None else self._order[span.start : span.stop].tolist() for span in spans]

    def locate(self, row: int) -> tuple[int, int]:
        """The number of a row's file, and its place there."""
        if self._order is None:
            return divmod(row, self.shard_size)
        number, place = divmod(int(self._rank[row]), self.shard_size)
        return self._firsts[int(self._groups[row])] + number, place


def list_latent_files(split: Split, layout: LatentFileLayout, *, variants: int) -> list[tuple[str, int, Sequence[int]]]:
    """Name, variant and rows of every file of a split."""
    return [
        (f"{split}-{variant:03}-{number:06}.safetensors", variant, rows)
        for variant in range(variants if split == "train" else 1)
        for number, rows in enumerate(layout.files())
    ]


def write_latent_file(
    path: Path,
    data: ImageTextDataset,
    variant: int,
    rows: Sequence[int],
    *,
    encode: Encode,
    tokenize: Tokenize,
    keep: EncodeText | None,
    made: str,
) -> None:
    """Encode some rows and write them, with text states where `keep` gives them; `made` is what decides them all.

    ValueError: numbers that float16 does not hold.
    """
    columns: dict[str, list[Tensor]] = {"mean": [], "deviation": [], "sizes": [], "ids": [], "wordings": []}
    for batch in _batches(data, variant, rows):
        mean, logvar = encode(batch["image"])
        columns["mean"].append(_to_float16(mean, "latents"))
        columns["deviation"].append(_to_float16((0.5 * logvar).exp(), "latents"))
        columns["sizes"].append(batch["sizes"].int())
    for row in rows:
        wordings = data.captions_of(SampleKey(row, variant, row))
        columns["ids"].append(tokenize(wordings).int())
        columns["wordings"].append(torch.tensor([len(wordings)]))
    if keep is not None:
        for ids in torch.cat(columns["ids"]).split(ENCODE_BATCH_SIZE):
            for name, states in zip(TEXT_COLUMNS, keep(ids.long()), strict=True):
                columns.setdefault(name, []).append(_to_float16(states, "states of the text tower"))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    tensors["last"] = tensors.pop("wordings").cumsum(0)  # row of `ids` after the last wording of each row
    save_latent_file(path, tensors, made)


def _to_float16(numbers: Tensor, told: str) -> Tensor:
    halves = numbers.half().cpu()
    if not halves.isfinite().all():
        largest = numbers.abs().max().item()
        raise ValueError(f"the {told} reach {largest:g}, beyond the 65,504 of float16: train without keeping them")
    return halves


def save_latent_file(path: Path, tensors: dict[str, Tensor], made: str) -> None:
    """Write the columns of a file, with a checksum of each row, whole."""
    firsts = torch.cat([tensors["last"].new_zeros(1), tensors["last"][:-1]])
    spans = zip(firsts.tolist(), tensors["last"].tolist(), strict=True)
    sums = [checksum(_row(tensors, i, first, last)) for i, (first, last) in enumerate(spans)]
    write_tensors(path, {**tensors, "checksum": torch.tensor(sums)}, file_tag(path.name, made))


def file_tag(name: str, made: str) -> dict[str, str]:
    """What a file tells of itself: one entry, as safetensors writes several in any order and files shall be equal."""
    return {"file": f"{name} {made}"}


def save_groups(folder: Path, groups: Tensor | None) -> str | None:
    """Write the group of each row of the train split, where there are groups; returns the hash of the file."""
    if groups is None:
        return None
    write_tensors(folder / BUCKETS_FILE, {"groups": groups.short()})
    return sha256(folder / BUCKETS_FILE)


def is_valid(path: Path, made: str) -> bool:
    """Whether a file was written, with what `made` stands for."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == file_tag(path.name, made)
    except (OSError, SafetensorError):
        return False


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
    wordings = {name: columns[name][first:last] for name in ("ids", *TEXT_COLUMNS) if name in columns}
    return {**row, **wordings, "span": torch.tensor([index, first, last])}


def read_index(folder: Path) -> LatentIndex:
    """ValueError when the folder is no finished one."""
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder} holds no finished latents (no {INDEX_FILE}): make them with scripts/encode.py")
    try:
        values = json.loads((folder / INDEX_FILE).read_text())
    except (ValueError, RecursionError):
        raise ValueError(
            f"{folder}/{INDEX_FILE} is damaged: run scripts/encode.py again, which keeps what is whole"
        ) from None
    return LatentIndex.from_dict(values, source=f"{folder}/{INDEX_FILE}")


class LatentDataset(Dataset[dict[str, Any]]):
    """The samples of a split with the mean and log-variance of their latents, and the token ids of a caption.

    Where they were kept there are also the states of its tokens, and its pooled vector. Wordings are drawn as
    `CaptionedImages` draws them, so a run with the cache takes the captions of one without.
    """

    def __init__(self, folder: Path, split: Split, *, seed: int) -> None:
        self.folder, self.split, self.seed = folder, split, seed
        self.index = read_index(folder)
        self.made = content_key(self.index.fingerprint, self.index.images_per_file)
        self.groups = self._read_groups() if split == "train" and self.index.groups_sha256 else None
        self._layout = LatentFileLayout(self.index.rows[split], self.index.images_per_file, self.groups)

    def _read_groups(self) -> Tensor:
        path = self.folder / BUCKETS_FILE
        if not path.is_file() or sha256(path) != self.index.groups_sha256:
            raise ValueError(f"{path} is missing or damaged: run scripts/encode.py again, which keeps what is whole")
        return load_file(path)["groups"].long()

    def __len__(self) -> int:
        return self.index.rows[self.split]

    @property
    def make_batch_sampler(self) -> Callable[..., EpochBatchSampler]:
        """Makes the order of its samples."""
        return make_batch_sampler(len(self), self.groups)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples, which a resumed run must not change."""
        return {**self.index.fingerprint["data"], "items": self.index.fingerprint["items"][self.split]}

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        training = self.split == "train"
        variant = key.epoch % self.index.augmentations if training else 0
        number, row = self._layout.locate(key.index)
        path = self.folder / f"{self.split}-{variant:03}-{number:06}.safetensors"
        try:
            found = read_row(_opened(path, self.made), row)
        except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError):
            raise ValueError(f"{path} is missing or damaged: remove it and run scripts/encode.py again") from None
        wordings = len(found["ids"])
        chosen = rng.fold_seed(self.seed, "caption", key.epoch, key.index) % wordings if training else 0
        return {
            "mean": found["mean"][0].float(),
            "logvar": 2 * found["deviation"][0].float().clamp_min(1e-7).log(),
            "sizes": found["sizes"][0].long(),
            "ids": found["ids"][chosen].long(),
            **{name: found[name][chosen].float() for name in TEXT_COLUMNS if name in found},
        }


def read_row(columns: Any, row: int) -> dict[str, Tensor]:
    """A row of a file; ValueError when it is not what was written."""
    first, last = (int(columns["last"][i : i + 1].item()) if i >= 0 else 0 for i in (row - 1, row))
    if not 0 <= first < last:
        raise ValueError("the spans of the captions do not rise")
    found = _row(columns, row, first, last)
    if checksum(found) != columns["checksum"][row : row + 1].item():
        raise ValueError("the checksum is another")
    return found


@lru_cache(MAX_OPEN_FILES)
def _opened(path: Path, made: str) -> dict[str, Any]:
    """The columns of a file that is mapped into memory; ValueError when it is not the one that is wanted."""
    if not is_valid(path, made):
        raise ValueError("no such file")
    file = safe_open(path, framework="pt")
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)


def _batches(data: ImageTextDataset, variant: int, rows: Sequence[int]) -> Iterator[Any]:
    for first in range(0, len(rows), ENCODE_BATCH_SIZE):
        yield collate([data[SampleKey(row, variant, row)] for row in rows[first : first + ENCODE_BATCH_SIZE]])
