"""What a batch is, and how samples become one."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import default_collate


class Batch(TypedDict, total=False):
    """What data sets give to a training: each some of these fields. A sample has the same, without the first axis.

    Images come with captions, latents in memory with captions, latents from files with the ids of a caption.
    """

    image: Tensor  # (b, c, height, width) float32 in [-1, 1]
    mean: Tensor  # (b, c, h, w) float32, of the latents' normal distribution, as the VAE gives it
    logvar: Tensor  # (b, c, h, w) float32, its log-variance
    sizes: Tensor  # (b, 6) int64, in pixels: original height and width, crop top and left, height and width
    caption: list[str]  # one caption for each image, "" where it has none
    ids: Tensor  # (b, n) int64, the token ids of a caption
    hidden_states: Tensor  # (b, n, dim) float32, of the text towers for these ids
    pooled: Tensor  # (b, dim) float32, the pooled vector of the text towers


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack the tensors of samples, and list their captions."""
    return default_collate(list(samples))
