"""Latents and token ids computed once, in files of a fixed number of rows that are read from the disk row by row.

A folder holds index.json, words.txt and SPLIT-VARIANT-NUMBER.safetensors. A variant is one crop and flip of every
image: variant v of n is what epochs v, v + n, ... would have cut. Each file tells its name and what it was made with,
and each row has a checksum: a row that is read is a row that was written, and no file need be read whole for it.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm import keyed
from ldm.config import Config
from ldm.data import CaptionedImages, collate
from ldm.data.order import Key
from ldm.data.shapes import Split

INDEX, WORDS = "index.json", "words.txt"
OPEN = 64  # files that a process keeps open
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> mean and log-variance of their latents
Tokenize = Callable[[list[str]], Tensor]  # captions -> (n, length) ids


class Index(Config):
    """What a folder of latents holds, and what it was made with."""

    format: Literal["ldm-latents-1"] = "ldm-latents-1"
    identity: dict[str, Any]
    """data, seed, and the hashes of the VAE and of the tokenizer"""
    shard_size: int
    variants: int
    rows: dict[Split, int]
    shown: list[str]
    """the first captions of the test split, for sample grids"""


def made_with(identity: dict[str, Any]) -> str:
    """A short name of what decides latents and ids, which stands in each file."""
    return str(keyed.key(json.dumps(identity, sort_keys=True)))


def shards_of(split: Split, rows: int, *, variants: int, shard_size: int) -> list[tuple[str, int, range]]:
    """Name, variant and rows of every file of a split."""
    return [
        (f"{split}-{variant:03}-{number:06}.safetensors", variant, range(first, min(first + shard_size, rows)))
        for variant in range(variants if split == "train" else 1)
        for number, first in enumerate(range(0, rows, shard_size))
    ]


def write_shard(
    path: Path, data: CaptionedImages, variant: int, rows: range, *, encode: Encode, tokenize: Tokenize, made: str
) -> None:
    """Encode some rows and write them; `made` is the hash of what decides them."""
    columns: dict[str, list[Tensor]] = {"mean": [], "deviation": [], "sizes": [], "ids": [], "wordings": []}
    for batch in _batches(data, variant, rows):
        mean, logvar = encode(batch["image"])
        columns["mean"].append(mean.half().cpu())
        columns["deviation"].append((0.5 * logvar).exp().half().cpu())
        columns["sizes"].append(batch["sizes"].int())
    for row in rows:
        wordings = data.wordings(Key(row, variant, row))
        columns["ids"].append(tokenize(wordings).int())
        columns["wordings"].append(torch.tensor([len(wordings)]))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    tensors["last"] = tensors.pop("wordings").cumsum(0)  # row of `ids` after the last wording of each row
    save_shard(path, tensors, made)


def save_shard(path: Path, tensors: dict[str, Tensor], made: str) -> None:
    """Write the columns of a file, with a checksum of each row, beside, then in place."""
    firsts = torch.cat([tensors["last"].new_zeros(1), tensors["last"][:-1]])
    spans = zip(firsts.tolist(), tensors["last"].tolist(), strict=True)
    sums = [checksum(_row(tensors, i, first, last)) for i, (first, last) in enumerate(spans)]
    beside = path.with_name(f".{path.name}")
    save_file({**tensors, "checksum": torch.tensor(sums)}, beside, {"name": path.name, "made": made})
    beside.replace(path)


def is_whole(path: Path, made: str) -> bool:
    """Whether a file was written, with what `made` stands for."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == {"name": path.name, "made": made}
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
    return {**row, "ids": columns["ids"][first:last], "span": torch.tensor([index, first, last])}


def read_index(folder: Path) -> Index:
    """ValueError when the folder is no finished one."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds no finished latents (no {INDEX}): make them with scripts/encode.py")
    try:
        return Index.from_dict(json.loads((folder / INDEX).read_text()), source=f"{folder}/{INDEX}")
    except (json.JSONDecodeError, TypeError):
        raise ValueError(
            f"{folder}/{INDEX} is damaged: run scripts/encode.py again, which keeps what is whole"
        ) from None


class LatentShards(Dataset[dict[str, Any]]):
    """The samples of a split with the mean and log-variance of their latents, and token ids for a caption.

    Wordings are drawn as `CaptionedImages` draws them, so a run with the cache takes the captions of one without.
    """

    def __init__(self, folder: Path, split: Split, *, seed: int) -> None:
        self.folder, self.split, self.seed = folder, split, seed
        self.index = read_index(folder)
        self.made = made_with(self.index.identity)

    def __len__(self) -> int:
        return self.index.rows[self.split]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        training = self.split == "train"
        variant = key.epoch % self.index.variants if training else 0
        number, row = divmod(key.index, self.index.shard_size)
        path = self.folder / f"{self.split}-{variant:03}-{number:06}.safetensors"
        try:
            found = read_row(_opened(path, self.made), row)
        except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError):
            raise ValueError(f"{path} is missing or damaged: remove it and run scripts/encode.py again") from None
        wordings = len(found["ids"])
        chosen = keyed.key(self.seed, "caption", key.epoch, key.index) % wordings if training else 0
        return {
            "mean": found["mean"][0].float(),
            "logvar": 2 * found["deviation"][0].float().clamp_min(1e-7).log(),
            "sizes": found["sizes"][0].long(),
            "ids": found["ids"][chosen].long(),
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


@lru_cache(OPEN)
def _opened(path: Path, made: str) -> dict[str, Any]:
    """The columns of a file that is mapped into memory; ValueError when it is not the one that is wanted."""
    if not is_whole(path, made):
        raise ValueError("no such file")
    file = safe_open(path, framework="pt")
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)


def _batches(data: CaptionedImages, variant: int, rows: range, size: int = 64) -> Iterator[Any]:
    for first in range(rows.start, rows.stop, size):
        yield collate([data[Key(row, variant, row)] for row in range(first, min(first + size, rows.stop))])
