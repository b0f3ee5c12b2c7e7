"""A generator and a discriminator, each with its optimizer: exact on one rank and on two, whole and sharded."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import ToyGAN, assert_same, losses, signal_at, tensors_of, toy, toy_config, toy_gan
from ranks import Harm, launch, rank_environment
from safetensors.torch import load_file
from torch import Tensor

from ldm.rng import StepRNG
from ldm.training.stage import Batch, Networks
from ldm.training.trainer import Trainer

environment = pytest.fixture(scope="module", autouse=True)(rank_environment)


class ConstantDiscriminator(ToyGAN):
    """A discriminator whose loss has no gradient."""

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        terms = super().loss(name, networks, batch, rng)
        return {"loss": terms["loss"] * (name == "generator")}


def test_each_loss_moves_its_own_network_only(tmp_path: Path) -> None:
    stage = ConstantDiscriminator()
    start = {name: t.clone() for name, t in stage.discriminator.state_dict().items()}
    generator = {name: t.clone() for name, t in stage.generator.state_dict().items()}
    toy(toy_config(tmp_path), stage=lambda: stage)
    assert_same(start, stage.discriminator.state_dict())
    assert all(not torch.equal(generator[name], t) for name, t in stage.generator.state_dict().items())
    names = {name + group for name in ("generator", "discriminator") for group in ("", "_optimizer", "_ema")}
    assert names == {file.stem for file in (tmp_path / "checkpoints/step-000008").glob("*.safetensors")}


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    toy(toy_config(tmp_path / "one"), stage=toy_gan)
    toy(toy_config(tmp_path / "four", grad_accum_steps=4), stage=toy_gan)
    compare(tmp_path / "one", tmp_path / "four")


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    toy(toy_config(tmp_path / "whole"), stage=toy_gan)
    toy(toy_config(tmp_path / "stopped"), stage=toy_gan, on_step=signal_at(5))
    toy(toy_config(tmp_path / "stopped", resume="latest"), stage=toy_gan)
    assert_same(tensors_of(tmp_path / "whole", 8), tensors_of(tmp_path / "stopped", 8))


def test_an_overflow_halves_the_loss_scale_of_fp16_once(tmp_path: Path) -> None:
    """One of the generator counts neither for the discriminator nor twice."""

    class Overflowing(ToyGAN):
        def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
            terms = super().loss(name, networks, batch, rng)
            if (name, rng.step) == ("generator", 1):
                terms["loss"] = terms["loss"] * 1e38  # finite, but not its gradient times the scale
            return terms

    scales: list[float] = []
    norms: list[dict[str, float]] = []

    def record(trainer: Trainer) -> None:
        scales.append(trainer.accelerator.scaler.get_scale() if trainer.accelerator.scaler else 1.0)
        norms.append({key: value.item() for key, value in trainer.losses.items() if key.endswith("norm")})

    torch.manual_seed(0)
    toy(toy_config(tmp_path / "fp16", steps=2), stage=Overflowing, fp16=True, on_step=record)
    assert scales[:2] == [8.0, 4.0]  # two sound updates double it, the overflow halves it
    toy(toy_config(tmp_path / "float32", steps=2), stage=toy_gan, on_step=record)
    assert norms[0] == pytest.approx(norms[2], rel=1e-3)  # the scale is out of what is clipped and logged


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_equal_one_and_resume_bit_for_bit(fsdp: bool, precision: str, tmp_path: Path) -> None:
    """Losses to 1e-5, and the model; the one rank cuts its batch as the two do, since bf16 rounds gradients."""
    environment, one, two = {"ACCELERATE_MIXED_PRECISION": precision}, tmp_path / "one", tmp_path / "two"
    flags = [f"fsdp={fsdp}", "keep_checkpoints=3"]
    launch("gan", one, 1, [*flags, "grad_accum_steps=4"], environment=environment)
    launch("gan", two, 2, [*flags, "grad_accum_steps=2"], environment=environment)
    compare(one, two)
    toy(toy_config(tmp_path / "float32"), stage=toy_gan)
    difference = max(abs(value / losses(one)[step] - 1) for step, value in losses(tmp_path / "float32").items())
    assert (difference > 1e-4) == (precision == "bf16")
    models = [load_file(run / "model/generator.safetensors") for run in (one, two)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.allclose(models[0][name], models[1][name], rtol=1e-4, atol=1e-6) for name in models[0])
    shutil.copytree(two / "checkpoints/step-000003", tmp_path / "again/checkpoints/step-000003")
    launch("gan", tmp_path / "again", 2, [*flags, "grad_accum_steps=2", "resume=latest"], environment=environment)
    assert_same(tensors_of(two, 8), tensors_of(tmp_path / "again", 8))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_the_last_step_stops_before_the_model(ranks: int, tmp_path: Path) -> None:
    codes = [128 + signal.SIGUSR1] * ranks
    launch("gan", tmp_path / "run", ranks, [], harm=Harm("signal", ranks - 1, 8), codes=codes)
    assert (tmp_path / "run/STOPPED").read_text() == "step 8\n"
    assert not (tmp_path / "run/model").exists()


def compare(one: Path, two: Path) -> None:
    """The losses of all steps, of both networks, are equal to 1e-5."""
    want, found = losses(one), losses(two)
    assert want.keys() == found.keys() and len(want) == 8
    assert max(abs(found[step] / want[step] - 1) for step in want) < 1e-5
