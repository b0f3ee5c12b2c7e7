"""Every batch reaches the networks where these are: all stages on a GPU that is pretended, where mixed devices fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import STAGE_NAMES, accelerator_on, build_stage
from pretend_gpu import OnGPU, pretend_gpu, waits

from ldm.cli import parse_cli
from ldm.data.batch_sampler import SampleKey
from ldm.data.loader import collate
from ldm.pipeline.inputs import initial_noise
from ldm.rng import StepRNG
from ldm.stages.diffusion import DiffusionStage
from ldm.stages.latents import CacheLatentsConfig, LatentWriter
from ldm.training.trainer import Trainer


def use(stage: Any, device: torch.device) -> None:
    """Loss, gradients, validation and samples."""
    networks = {trainable.name: trainable.module for trainable in stage.trainables}
    batch = collate([stage.data[SampleKey(i, 0, i)] for i in range(4)])
    for name, network in networks.items():
        loss = stage.loss(name, networks, batch, StepRNG(0, 0, range(4), 4, device))["loss"]
        assert isinstance(loss, OnGPU)
        loss.backward()
        assert all(isinstance(parameter, OnGPU) for parameter in network.parameters())
        assert any(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        assert all(isinstance(value, float) for value in stage.validate().values())
        stage.sample()


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_each_stage(name: str, tiny_runs: Path) -> None:
    with pretend_gpu() as device:
        use(build_stage(name, tiny_runs / "on_gpu", device=device), device)


def test_cached_latents_with_text_embeddings_and_sizes(tiny_runs: Path, tmp_path: Path) -> None:
    """Written there, and trained on."""
    flags = f"--out {tmp_path}/latents --vae {tiny_runs}/vae/model --text.model local-dir:{tiny_runs}/clip/model"
    flags += " --data.resolution 16 --text-embeddings --text.layer penultimate --text.use-pooled"
    config = parse_cli(CacheLatentsConfig, flags.split(), default=None, description="")
    with pretend_gpu() as device:
        LatentWriter(config, accelerator_on(device)).run()
        cached = ["--cached-latents", str(config.out), "--unet.size-embed-dim", "8"]
        stage = build_stage("ldm", tiny_runs / "on_gpu", *cached, device=device)
        assert "hidden_states" in stage.validation
        use(stage, device)


def test_a_batch_that_is_left_on_the_cpu_is_found(tiny_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DiffusionStage, "latents", lambda stage, batch, randn: torch.zeros(len(batch["sizes"]), 4, 4, 4)
    )
    with pretend_gpu() as device:
        stage = build_stage("ldm", tiny_runs / "on_gpu", device=device)
        with torch.no_grad(), pytest.raises(RuntimeError, match="same device, found cuda:0 and cpu"):
            stage.validate()


DISCRETE = (
    "--diffusion.noise-schedule scaled_linear --diffusion.prediction epsilon --diffusion.shift 1 --diffusion.t-min 0 "
    "--diffusion.loss-weighting uniform --diffusion.gamma None --diffusion.snr-floor None"
)


def pinned(batch: Any) -> Any:
    """As the loader gives it where there is a GPU."""
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize(
    ("name", "flags"), [("clip", ""), ("vae", ""), ("ldm", ""), ("ldm", DISCRETE), ("ldm", "--unet.size-embed-dim 8")]
)
def test_a_step_does_not_wait_for_the_gpu(name: str, flags: str, tiny_runs: Path, tmp_path: Path) -> None:
    """With its loss, gradients, clipping, optimizer and averages."""
    with pretend_gpu() as device:
        stage = build_stage(name, tiny_runs / "on_gpu", *flags.split(), device=device)
        keys = [SampleKey(i, 0, i) for i in range(8)]
        accelerator = accelerator_on(device)
        trainer = Trainer(stage.config.model_copy(update={"run": tmp_path}), accelerator, stage)
        for _ in range(2):  # the first puts tables on the device
            batch = pinned(collate([stage.data[key] for key in keys]))
            waits.clear()
            trainer.train_step(iter([(keys, batch)]))
        assert not waits, dict(waits)


def test_a_wait_is_found() -> None:
    with pretend_gpu() as device:
        waits.clear()
        ones = torch.ones(3, device=device)
        ones.sum().item()
        torch.zeros(3).to(device)
        ones[ones > 0]
        torch.zeros(3).pin_memory().to(device, non_blocking=True)
    assert sum(waits.values()) == 3


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "ddpm", "unipc"])
def test_a_sampling_step_does_not_wait_for_the_gpu(sampler: str, tiny_runs: Path) -> None:
    with pretend_gpu() as device:
        stage = build_stage("ldm", tiny_runs / "on_gpu", device=device)
        pipeline = stage.pipeline.to(device)
        noise = initial_noise(pipeline.latent_shape(16, 16), [0, 1])
        counts = []
        for _ in pipeline.stream(noise, ["a star", "a red star"], ["", ""], seeds=[0, 1], steps=4, sampler=sampler):
            counts.append(dict(waits))
            waits.clear()
    assert counts[1:] == [{}] * 3
