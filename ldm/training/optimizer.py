"""The optimizer: AdamW, its learning rate, and its steps: clipped, and skipped where the gradient is not finite."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

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


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients together; a sharded one, where they are."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def step_clipped(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], norm: Tensor, max_norm: float, nonfinite: Tensor
) -> None:
    """Step, with gradients of a larger norm scaled down to `max_norm`, unless `nonfinite` is 1.0.

    Fused optimizers scale gradients as they read them, and read that flag on the device, as they do for the loss scaler
    of fp16; for others this is a CPU-GPU sync point.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = (norm / max_norm).clamp_min(1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        optimizer.step()
    elif not nonfinite.item():
        clip_grads_with_norm_(parameters, max_norm, norm)
        optimizer.step()
