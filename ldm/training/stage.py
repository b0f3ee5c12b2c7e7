"""TODO."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.batch_sampler import EpochBatchSampler
from ldm.rng import StepRNG
from ldm.training.config import TrainingConfig

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Trainable:
    """A module, with an optimizer of its own, and the loss that this optimizer minimizes.

    `loss(module, batch, draws)` returns scalar tensors by name and minimizes "loss". It is given the prepared module
    and must call it through its forward. A VAE has one player; with a discriminator there are two, stepped in turn.
    """

    name: str
    module: nn.Module
    loss: Callable[[nn.Module, Batch, StepRNG], dict[str, Tensor]]


@dataclass(frozen=True)
class StageCallbacks:
    """What a stage does beside training; called with the averaged weights in place, on the main process only.

    But `check` is called on every process, at every line of the log; a ValueError of it ends the run.
    """

    validate: Callable[[], dict[str, float]]
    sample: Callable[[], Image.Image | None]
    save_model: Callable[[Path], None]
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Stage:
    """What is trained, and on what.

    `identity` is what a checkpoint must agree on to be resumed: whatever decides the data, their order and the model.
    `order` makes the order of the samples: see `Order` for what it is given.
    """

    trainables: list[Trainable]
    data: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    hooks: StageCallbacks
    fingerprint: dict[str, Any]
    make_batch_sampler: Callable[..., EpochBatchSampler]


Fit = Callable[[TrainingConfig, Accelerator, Stage], Path]  # `fit`, or what takes its place
