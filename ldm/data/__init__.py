"""Images and captions: where they come from, how they are cut, and in which order."""

from torch.utils.data import default_collate as collate

from ldm.data.config import DataConfig
from ldm.data.dataset import ImageTextDataset, open_dataset

__all__ = ["DataConfig", "ImageTextDataset", "collate", "open_dataset"]
