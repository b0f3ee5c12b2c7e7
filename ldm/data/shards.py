"""Latents and token ids computed once, in files of a fixed number of rows that are read from the disk row by row.

A folder holds index.json, words.txt and SPLIT-VARIANT-NUMBER.safetensors, each beside a .json with its hash. A variant
is one crop and flip of every image: variant v of n is what epochs v, v + n, ... would have cut.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm import keyed
from ldm.config import Config
from ldm.data import CaptionedImages, DataConfig, collate
from ldm.data.order import Key
from ldm.data.shapes import Split
from ldm.weights import sha256

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
    sha256: dict[str, str]


def identity_of(data: DataConfig, seed: int, *, vae_sha256: str, tokenizer_sha256: str) -> dict[str, Any]:
    """What decides latents and ids."""
    return {
        "data": data.identity(),
        "seed": seed,
        "vae_sha256": vae_sha256,
        "tokenizer_sha256": tokenizer_sha256,
    }


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
    """Encode some rows and write them beside, then in place; `made` is the hash of what decides them."""
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
    beside = path.with_name(f".{path.name}")
    save_file(tensors, beside)
    digest = sha256(beside)
    beside.replace(path)
    path.with_suffix(".json").write_text(json.dumps({"sha256": digest, "made": made}))


def hash_of(path: Path, made: str) -> str | None:
    """The hash of a file that was written whole, with what `made` stands for; None when it is to be written."""
    try:
        told = json.loads(path.with_suffix(".json").read_text())
        return told["sha256"] if told["made"] == made and path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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

    def __len__(self) -> int:
        return self.index.rows[self.split]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        training = self.split == "train"
        variant = key.epoch % self.index.variants if training else 0
        number, row = divmod(key.index, self.index.shard_size)
        shard = _opened(self.folder, f"{self.split}-{variant:03}-{number:06}.safetensors", self._hash)
        deviation = shard.get_slice("deviation")[row].float()
        first, last = (shard.get_slice("last")[i].item() if i >= 0 else 0 for i in (row - 1, row))
        chosen = keyed.key(self.seed, "caption", key.epoch, key.index) % (last - first) if training else 0
        return {
            "mean": shard.get_slice("mean")[row].float(),
            "logvar": 2 * deviation.clamp_min(1e-7).log(),
            "sizes": shard.get_slice("sizes")[row].long(),
            "ids": shard.get_slice("ids")[first + chosen].long(),
        }

    def _hash(self, name: str) -> str | None:
        return self.index.sha256.get(name)


@lru_cache(OPEN)
def _opened(folder: Path, name: str, hash_of: Callable[[str], str | None]) -> Any:
    """A file that is mapped into memory, once it has proved to be what the index tells."""
    path = folder / name
    if not path.is_file() or sha256(path) != hash_of(name):
        raise ValueError(f"{path} is missing or damaged: run scripts/encode.py again, which keeps what is whole")
    return safe_open(path, framework="pt")


def _batches(data: CaptionedImages, variant: int, rows: range, size: int = 64) -> Iterator[Any]:
    for first in range(rows.start, rows.stop, size):
        yield collate([data[Key(row, variant, row)] for row in range(first, min(first + size, rows.stop))])
