"""The loss of the U-Net, and whether a model listens: validation under the right captions, those of others and none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import copy_stages_before, train
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.process import DiffusionConfig
from ldm.evaluation.figures import loss_curves
from ldm.rng import StepRNG
from ldm.stages.diffusion import VALIDATION_T, DiffusionStage, TrainLDMConfig, shift_captions
from ldm.training.stage import Stage
from ldm.unet import UNetConfig
from ldm.vae import VAE, VAEConfig

NAMES = {"validation_loss", "validation_loss_shuffled", "validation_loss_empty"}


def test_each_validation_logs_three_losses(tiny_runs: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tiny_runs / "ldm/log.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation_loss" in line]
    assert validations and all(line.keys() >= NAMES for line in validations)
    single = [validations[-1][f"validation_loss_t{t}"] for t in VALIDATION_T]
    assert validations[-1]["validation_loss"] == pytest.approx(sum(single) / len(single))
    loss_curves([tiny_runs / "clip", tiny_runs / "ldm"], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").is_file()


def test_what_a_network_is_told_in_validation(tiny_runs: Path, tmp_path: Path) -> None:
    """The same latents and noise three times: under each caption, under the one before it, and under ""."""
    copy_stages_before("ldm", tiny_runs, tmp_path)
    stages: list[Any] = []

    def keep(stage: Stage) -> Stage:
        stages.append(stage)
        return stage

    train("ldm", tmp_path / "ldm", "--steps", "1", "--warmup-steps", "0", wrap=keep)
    stage: DiffusionStage = stages[0]
    calls: list[tuple[Tensor, Conditioning]] = []

    def unet(z_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        calls.append((z_t, cond))
        return torch.zeros_like(z_t)

    stage.unet = unet  # type: ignore[assignment]
    losses = stage.validate()
    assert losses["validation_loss"] == losses["validation_loss_shuffled"] == losses["validation_loss_empty"]
    right, shuffled, empty = (calls[len(VALIDATION_T) * i] for i in range(3))
    assert torch.equal(right[0], shuffled[0]) and torch.equal(right[0], empty[0])
    assert right[1].pooled is not None and shuffled[1].pooled is not None and stage.text is not None
    torch.testing.assert_close(shuffled[1].pooled, right[1].pooled.roll(1, 0))
    torch.testing.assert_close(empty[1].pooled, stage.text([""]).pooled.expand_as(right[1].pooled))


def test_errors_of_channels_are_weighed_by_a_power_of_their_deviation(tmp_path: Path) -> None:
    """By weights of mean 1, so that an equal error of all channels counts as without them."""
    vae = VAE(VAEConfig(base_channels=32, channel_mult=(1,), num_res_blocks=1, latent_channels=2))
    vae.latent_std.copy_(torch.tensor([3.0, 1.0]))
    unet = UNetConfig(in_channels=2, model_channels=32, channel_mult=(1,), transformer_depth=(0,), num_heads=(1,),
                      mid_transformer_depth=0, context_dim=0)  # fmt: skip
    diffusion = DiffusionConfig(noise_schedule="flow", prediction="x0")
    batch: Any = {"mean": torch.randn(4, 2, 8, 8), "logvar": torch.full((4, 2, 8, 8), -30.0)}
    z, rng = vae.standardize(batch["mean"]), StepRNG(0, 0, [0, 1, 2, 3], 4, torch.device("cpu"))

    def loss(power: float, *error: float) -> float:
        """Of a prediction that is wrong by an error in each channel."""
        config = TrainLDMConfig(channel_weight_power=power, unet=unet, diffusion=diffusion, run=tmp_path)
        stage = DiffusionStage(config, vae, None, torch.device("cpu"))
        off = torch.tensor(error)[:, None, None]
        networks: Any = {"unet": lambda z_t, timestep, cond: z + off}
        return stage.loss("unet", networks, batch, rng)["loss"].item()

    assert loss(0, 1, 0) == pytest.approx(0.5, abs=1e-4)
    assert loss(1, 1, 0) == pytest.approx(0.75, abs=1e-4)
    assert loss(2, 1, 0) == pytest.approx(0.9, abs=1e-4)
    assert loss(1, 2, 2) == pytest.approx(4, abs=1e-3)


def test_captions_are_shifted_in_every_form() -> None:
    """As texts, as ids, and as cached embeddings; nothing else is."""
    rows = torch.arange(6).reshape(3, 2)
    keys = ("ids", "hidden_states", "pooled", "sizes")
    shifted: dict[str, Any] = dict(shift_captions({"caption": ["a", "b", "c"], **dict.fromkeys(keys, rows)}))  # type: ignore[typeddict-item]
    assert shifted["caption"] == ["c", "a", "b"]
    assert all(shifted[key].tolist() == [[4, 5], [0, 1], [2, 3]] for key in keys[:3]) and shifted["sizes"] is rows
