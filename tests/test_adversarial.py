"""A VAE against a discriminator: its weight, exactness over ranks, accumulation and resume, and the watchdog."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, logged, signal_at, tensors_of, train
from pydantic import ValidationError
from ranks import launch, rank_environment
from torch import nn

from ldm.training.stage import Stage
from ldm.training.trainer import Trainer
from ldm.training.watchdog import Watchdog, WatchdogConfig
from ldm.vae.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    last_layer_gradients,
    used_weights,
)

environment = pytest.fixture(scope="module", autouse=True)(rank_environment)
SMALL = [f"--discriminator.{name}" for name in ("base-channels=16", "num-layers=1", "norm-num-groups=8")]
GAN = [*SMALL, "--loss.adversarial-weight=0.5", "--loss.adversarial-start=1", "--learning-rate=5e-4"]
GAN += ["--loss.latent-noise=0.5"]  # relative to a deviation that is measured, too
WATCHED = [*GAN, "--steps=8", "--validate-every=1", "--checkpoint-every=1", "--keep-checkpoints=1"]
WATCHED += ["--watchdog.patience=2", "--watchdog.drop=1", "--learning-rate=2e-2"]


# The discriminator and its weight.


def test_one_logit_judges_a_patch() -> None:
    """The receptive field is that of Isola et al. for three layers, 70 pixels; batch items do not see each other."""
    config = DiscriminatorConfig(base_channels=16, norm_num_groups=8)
    discriminator = PatchDiscriminator(config, 3)
    assert discriminator(torch.rand(1, 3, config.smallest_side, config.smallest_side)).shape == (1, 1, 1, 1)
    with torch.no_grad():
        for module in discriminator.modules():  # a norm sees the whole image
            if isinstance(module, nn.Sequential):
                module[1] = nn.Identity()
    images = torch.rand(2, 3, 128, 128, requires_grad=True)
    logits = discriminator(images)
    [gradient] = torch.autograd.grad(logits[0, 0, 7, 7], images)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70 and not gradient[1].any()


def test_widths_and_sizes_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError, match="norm_num_groups: 32 groups do not divide a width of 40 .base_channels"):
        DiscriminatorConfig(base_channels=20)
    with pytest.raises(SystemExit, match="data.resolution 16 is below 24 pixels.* lower discriminator.num_layers"):
        train("vae", tmp_path / "vae", "--loss.adversarial-weight=1")
    with pytest.raises(SystemExit, match="adversarial_start 4 is not below steps 4, .* lower it"):
        train("vae", tmp_path / "vae", *GAN, "--loss.adversarial-start=4")


def test_the_hinge_loss_is_zero_beyond_the_margin_and_one_at_chance() -> None:
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.zeros(2), torch.zeros(2)) == 1


def test_the_adaptive_weight_makes_both_gradients_of_the_last_layer_equal() -> None:
    network, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    with used_weights(network[-1]) as weights:
        y = network(x)
    losses = [y.square().mean(), 7 * y.sum()]
    gradients = last_layer_gradients(losses, weights[0])
    weight = adaptive_weight(gradients, largest=100)
    (first, *_), (second, *_) = (torch.autograd.grad(loss, network[-1].weight, retain_graph=True) for loss in losses)
    assert (weight * second).norm() == pytest.approx(first.norm().item(), rel=1e-5)
    assert adaptive_weight(torch.tensor([[1.0], [0.0]]), largest=100) == 100


# Exactness.


@pytest.mark.parametrize("flags", [["--grad-accum-steps=2"], ["--fsdp"]])
def test_two_ranks_equal_one(flags: list[str], tmp_path: Path) -> None:
    """Losses of both networks to 1e-5, with a weight that is measured on the whole batch."""
    train("vae", tmp_path / "one", *GAN)
    launch("vae", tmp_path / "two", 2, [*GAN, *flags])
    for name in ("loss", "adversarial_weight", "discriminator_loss"):
        want, found = (logged(tmp_path / run, name) for run in ("one", "two"))
        assert want.keys() == found.keys() and max(want) == 4
        assert found == pytest.approx(want, rel=1e-5)
    assert logged(tmp_path / "one", "adversarial_weight")[4] > 0


def test_a_resumed_run_is_bit_equal_and_no_loss_moves_the_other_network(tmp_path: Path) -> None:
    """Also where the discriminator starts after the resume, and where the weight was measured before it."""

    def check(trainer: Trainer) -> None:
        vae, discriminator = (trainer.state.modules[name] for name in ("vae", "discriminator"))
        assert all(p.requires_grad and p.grad is not None for p in vae.parameters())
        started = trainer.state.step > 1
        assert all(p.requires_grad and (p.grad is not None) == started for p in discriminator.parameters())

    train("vae", tmp_path / "whole", *GAN, on_step=check)
    for stop in (1, 2, 3):
        run = tmp_path / f"stopped-{stop}"
        with pytest.raises(SystemExit):
            train("vae", run, *GAN, on_step=signal_at(stop))
        train("vae", run, *GAN, "--resume=latest")
        assert_same(tensors_of(tmp_path / "whole", 4), tensors_of(run, 4))


def test_the_first_loss_leaves_no_gradient_in_the_discriminator(tmp_path: Path) -> None:
    """What the discriminator steps with is the gradient of its own loss alone."""
    gradients: list[torch.Tensor] = []

    class Watched:
        def __init__(self, stage: Stage) -> None:
            self.stage: Any = stage

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stage, name)

        def loss(self, name: str, *inputs: Any) -> Any:
            discriminator = self.stage.trainables[1].module
            if name == "discriminator":
                gradients.extend(p.grad for p in discriminator.parameters() if p.grad is not None)
            return self.stage.loss(name, *inputs)

    train("vae", tmp_path / "vae", *GAN, wrap=Watched)
    assert not gradients


# The watchdog.


def test_the_watchdog_needs_a_lasting_fall_after_the_start() -> None:
    dog = Watchdog(WatchdogConfig(drop=1, patience=2), "db", start=3)
    values = {1: 20.0, 2: 10.0, 3: 10.0, 4: 21.0, 5: 20.5, 6: 19.0, 7: 20.1, 8: 19.0}
    assert not any(dog.observe(step, {"db": value}) for step, value in values.items())
    assert (dog.best, dog.good_step) == (21.0, 7)
    again = Watchdog(dog.config, "db", start=3)
    again.load_state_dict(json.loads(json.dumps(dog.state_dict())))
    assert not again.observe(8, {"db": 19.0}) and again.worse == 1  # a resumed run looks at its last step once more
    assert again.observe(9, {"db": float("nan")}) and again.complaint() == (
        "db fell from 21 to nan and stayed low for 2 validations"
    )
    again.go_back(6)
    assert (again.factor, again.worse) == (0.5, 0) and not again.observe(6, {"db": 0.0})  # which was seen before


class Ruined:
    """A stage whose discriminator ruins the VAE from step 4 on, as long as it has its whole weight."""

    def __init__(self, stage: Stage) -> None:
        self.stage: Any = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def loss(self, name: str, networks: Any, batch: Any, rng: Any) -> Any:
        terms = self.stage.loss(name, networks, batch, rng)
        if name == "vae" and rng.step >= 3 and self.stage.watchdog.factor == 1:
            terms["loss"] = 1e5 * terms["adversarial"]
        return terms


def test_a_ruined_vae_goes_back_with_half_the_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint is kept though only the newest would be; a resumed run takes the same course, bit for bit."""
    train("vae", tmp_path / "whole", *WATCHED, wrap=Ruined)
    printed = capsys.readouterr().out
    [(step, came_from)] = logged(tmp_path / "whole", "went_back_from").items()
    assert (step, came_from) == (3, 5)  # two validations that were worse
    assert f"validations: back to step-{step:06d}, with 0.5 of the weight" in printed
    assert logged(tmp_path / "whole", "weight_factor") == {3: 0.5}
    kept = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    assert kept == ["step-000007", "step-000008"]  # the last good one, and the newest
    for stop in (4, 5):  # between both, and where it goes back
        run = tmp_path / f"stopped-{stop}"
        with pytest.raises(SystemExit):
            train("vae", run, *WATCHED, wrap=Ruined, on_step=signal_at(stop))
        train("vae", run, *WATCHED, "--resume=latest", wrap=Ruined)
        assert_same(tensors_of(tmp_path / "whole", 8), tensors_of(run, 8))


@pytest.mark.parametrize("two_ranks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_discriminator_of_too_much_weight_is_weakened_until_the_run_gives_up(two_ranks: bool, tmp_path: Path) -> None:
    """Two ranks with shards go back to the same steps as one."""
    flags, message = [*WATCHED, "--loss.adversarial-weight=1e4"], "also with 1/32 of the weight: lower"
    with pytest.raises(SystemExit, match=f"validation_psnr fell from .* {message}"):
        train("vae", tmp_path / "one", *flags)
    assert len(list((tmp_path / "one/checkpoints").glob("step-*"))) >= 1
    assert list(logged(tmp_path / "one", "weight_factor").values())[-1] == 1 / 32
    if two_ranks:
        assert message in launch("vae", tmp_path / "two", 2, [*flags, "--fsdp"], codes=[1, 1])
        for name in ("weight_factor", "went_back_from"):
            assert logged(tmp_path / "one", name) == logged(tmp_path / "two", name)


def test_a_watchdog_without_a_checkpoint_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"psnr fell .* no checkpoint to go back to: lower --checkpoint-every, .* step 3"
    ):
        train("vae", tmp_path / "vae", *WATCHED, "--checkpoint-every=100", wrap=Ruined)
