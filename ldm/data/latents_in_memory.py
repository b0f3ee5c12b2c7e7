"""Latents of a whole data set, computed once and cached in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.batch_sampler import SampleKey, sample_batches
from ldm.data.dataset import ImageTextDataset


class InMemoryLatents(Dataset[dict[str, Any]]):
    """The samples of a data set with the mean and log-variance of their latents in place of the image: see `Batch`."""

    def __init__(
        self,
        data: ImageTextDataset,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        device: torch.device,
        progress: bool,
    ) -> None:
        """`encode` maps images (b, c, height, width) to mean and log-variance, each (b, c, h, w)."""
        parts = []
        with torch.no_grad():
            for batch in tqdm(sample_batches(data), desc="latents", unit="batch", disable=not progress):
                mean, logvar = encode(batch["image"].to(device))
                parts.append({"mean": mean.cpu(), "logvar": logvar.cpu(), "sizes": batch["sizes"]})
        self.data, self.columns = data, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.make_batch_sampler, self.fingerprint = data.make_batch_sampler, data.fingerprint
        self.sync, self.report = data.sync, data.report

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return {name: column[key.index] for name, column in self.columns.items()} | {"caption": self.data.caption(key)}
