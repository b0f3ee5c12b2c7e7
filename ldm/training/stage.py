"""What the loop is given: a stage with its networks, loss and data. The doctor and the planner take the same object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.batch_sampler import EpochBatchSampler, SampleKey
from ldm.data.loader import Batch
from ldm.ranks import Ranks
from ldm.rng import StepRNG
from ldm.training.config import TrainingConfig
from ldm.training.optimizer import adamw
from ldm.training.watchdog import Watchdog

Networks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Trainable:
    """A network with an optimizer of its own. A VAE has one, with a discriminator there are two.

    Only parameters that require a gradient are optimized, averaged and saved in checkpoints.
    """

    name: str
    module: nn.Module
    make_optimizer: Callable[[list[nn.Parameter], TrainingConfig], torch.optim.Optimizer] = adamw
    start: int = 0  # steps before the first one in which it is trained


class TrainingData(Protocol):
    """A data set as the loop sees it."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey) -> Any:
        """A sample; batches of them are collated."""

    def make_batch_sampler(
        self, *, seed: int, batch_size: int, start: int, grad_accum_steps: int, rank: int, world: int
    ) -> EpochBatchSampler:
        """Which samples a rank takes from step `start` on."""

    def sync(self, gather: Callable[[list[int]], list[int]]) -> None:
        """Called on every rank at each log line; `gather` joins lists of all ranks. A ValueError stops the run."""

    def report(self) -> str:
        """What to print at the end of a run, if there is something."""

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed: hashes of the samples, wherever they are stored."""

    def item_names(self) -> Sequence[str]:
        """The name of each sample, to tell which were added or removed; none where they have none, or are too many."""


class Stage(Protocol):
    """One training: what is trained, on what, by which loss.

    It is built without data, which `open_data` opens when all else is known to fit. `validate`, `sample` and `save` run
    with the averaged weights in place, in eval mode, without gradients; `sample` and `save` on rank 0.
    """

    trainables: Sequence[Trainable]  # updated in this order in each step
    frozen: Mapping[str, nn.Module]
    data: TrainingData
    held_out: TrainingData  # for `validate` and `sample`
    watchdog: Watchdog | None = None  # looks at what `validate` measures

    def open_data(self, accelerator: Accelerator) -> None:
        """Open both data sets, and make what needs them before the first step, such as initial weights."""

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        """Scalar terms of the loss of trainable `name`; "loss" is minimized.

        `networks` are all trainables as they are prepared for this machine (DDP, FSDP2), by name: call them through
        their forward. `batch` is on the CPU, `rng.device` is where the networks are. Only the parameters of `name`
        require a gradient. In each step all micro-batches come for the first trainable, then for the next.
        """

    def after_step(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Called on every rank after each step; `mean` averages a tensor over all ranks."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What else the next steps depend on, such as weights of losses that training finds: for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        return None

    def chance_loss(self, name: str, batch: Batch, rng: StepRNG) -> float | None:
        """The loss of a network that ignores its input, with the same batch and noise.

        None where some twenty steps need not get below it, as those of a VAE from random weights.
        """
        return None

    def validate(self, ranks: Ranks) -> dict[str, float]:
        """Scalars on held-out data, whose names begin with `validation`; it runs on all of these ranks."""

    def sample(self) -> Image.Image | None:
        """An image to look at, if there is one."""

    def save(self, folder: Path) -> None:
        """Write the finished model."""

    def next_command(self) -> str:
        """The command that uses the finished model: that of the next stage, or one that generates."""

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed, without the samples: what decides their views and the model.

        It needs no open data.
        """

    def report(self) -> str:
        """What to print at the end of a run, if there is something."""
        return ""

    def example_batch(self, count: int) -> Batch:
        """A random batch as the loader gives it, for measurements: no data set is opened for it."""
