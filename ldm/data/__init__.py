"""Images and captions: where they come from, how they are cropped, and in which order they are taken."""

from ldm.data.config import DataConfig
from ldm.data.dataset import ImageTextDataset, open_dataset, open_splits
from ldm.data.loader import Batch, collate
from ldm.data.sources.base import Split

__all__ = ["Batch", "DataConfig", "ImageTextDataset", "Split", "collate", "open_dataset", "open_splits"]
