"""TODO."""

import math

from ldm.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, from 0."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    done = min(1.0, max(0.0, (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)))
    if config.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate * (1 - done) if config.lr_schedule == "linear" else rate
