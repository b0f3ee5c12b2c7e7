"""The optimizer: AdamW, its learning rate, and steps that are skipped where the gradient is not finite."""

import math

import torch
from torch import Tensor, nn

from ldm.training.config import TrainingConfig


def adamw(
    parameters: list[nn.Parameter], config: TrainingConfig, *, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) in one fused kernel; `learning_rate` is the run's unless it is given."""
    rate = config.learning_rate if learning_rate is None else learning_rate
    return torch.optim.AdamW(parameters, lr=rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: TrainingConfig, step: int, peak: float | None = None) -> float:
    """The learning rate of optimizer step `step`, from 0; `peak` is that of the configuration unless it is given."""
    rate = (config.learning_rate if peak is None else peak) * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    done = min(1.0, max(0.0, (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)))
    if config.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate * (1 - done) if config.lr_schedule == "linear" else rate


def step_if_finite(optimizer: torch.optim.Optimizer, nonfinite: Tensor) -> None:
    """Step unless `nonfinite` is 1.0.

    Fused optimizers read that flag on the device, as they do for the loss scaler of fp16; for others this is a CPU-GPU
    sync point.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        optimizer.step()
    elif not nonfinite.item():
        optimizer.step()
