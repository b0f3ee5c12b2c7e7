"""The settings that all training scripts share."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ldm.cli import ScriptConfig


class TrainingConfig(ScriptConfig):
    """Settings of the training loop."""

    run: Path = Path("runs/untitled")
    """folder for everything that the run writes"""
    steps: int = Field(1000, ge=1)
    """optimizer steps"""
    batch_size: int = Field(64, ge=1)
    """images in an optimizer step, over all ranks and micro-batches"""
    grad_accum_steps: int = Field(1, ge=1)
    """micro-batches in an optimizer step"""
    seed: int = 0
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    """steps in which the learning rate rises from 0"""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after the warm-up; cosine and linear end at 0"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradient clipping: a larger norm is scaled down to it"""
    max_nonfinite_steps: int = Field(10, ge=0)
    """consecutive steps that may be skipped for a non-finite gradient before the run stops"""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """decay of the averaged weights, which validation, samples and the final model use"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    fsdp: bool = False
    """shard weights, averages and optimizer state over the ranks (FSDP2): less memory, more traffic"""
    num_workers: int = Field(0, ge=0)
    """processes that load data"""
    timeout: int = Field(1800, ge=1, le=10**8)
    """timeout in seconds for collectives and for the data loader"""
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(500, ge=1)
    sample_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """where scalars go in addition to log.jsonl"""
    resume: str | None = None
    """`latest`, or a checkpoint folder"""
