"""The VAE: an encoder compresses images to latents, a decoder gives them back (Rombach et al. 2022, section 3.1).

With `loss.adversarial_weight` a discriminator is trained beside it.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ldm.commands import command_to_train
from ldm.config import CONFIGS, check_equal
from ldm.data import Batch, DataConfig, ImageTextDataset, open_splits
from ldm.data.loader import sample_batches
from ldm.imaging import image_grid, tensor_to_pil
from ldm.io.tensors import init_weights
from ldm.parts import VAE_PIXELS, images_at_once
from ldm.pipeline.load import load_vae, save_vae
from ldm.ranks import ONE_RANK, Ranks
from ldm.rng import StepRNG, fold_seed
from ldm.stages.start import announce
from ldm.text.image_tower import ImageTower
from ldm.text.weights import latest_tower
from ldm.training.config import TrainingConfig
from ldm.training.optimizer import adamw
from ldm.training.stage import Networks, Stage, Trainable
from ldm.training.watchdog import Watchdog, WatchdogConfig
from ldm.vae import VAE, VAEConfig
from ldm.vae.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    last_layer_gradients,
    used_weights,
)
from ldm.vae.equivariance import ScaleTurn, draw_scale_turn
from ldm.vae.losses import SSIM_WINDOW, VAELossConfig, has_ssim, psnr, ssim, vae_loss
from ldm.vae.perceptual import LPIPS, FeatureDistance


class TrainVAEConfig(TrainingConfig):
    """Settings of train_vae."""

    run: Path = Path("runs/characters/vae")
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    loss: VAELossConfig = VAELossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    init_from: Path | None = None
    """start from the VAE of a finished model: a model folder, a diffusers folder or a single file"""


class VAEStage(Stage):
    """Trains a VAE, alone or against a discriminator, and measures the statistics of its latents."""

    Config, default = TrainVAEConfig, CONFIGS / "characters/vae.yaml"
    data: ImageTextDataset
    held_out: ImageTextDataset
    device: torch.device
    validation: Tensor  # held-out images (b, c, h, w)

    def __init__(self, config: TrainVAEConfig) -> None:
        config.vae.latent_size(config.data.resolution)
        config.data.check_buckets(config.vae.factor)
        config.data.check_channels(config.vae.image_channels)
        self.config = config
        self.vae = VAE(config.vae, gradient_checkpointing=config.gradient_checkpointing)
        self.trainables, self.frozen = [Trainable("vae", self.vae)], {}
        self.latent_std = torch.zeros(config.vae.latent_channels)  # of the step before
        self._moments: list[Tensor] = []  # means and mean squares of the latents, in each micro-batch
        if config.loss.adversarial_weight:
            self._add_discriminator(config)

    def _add_discriminator(self, config: TrainVAEConfig) -> None:
        if config.data.resolution < config.discriminator.smallest_side:
            least = f"data.resolution {config.data.resolution} is below {config.discriminator.smallest_side} pixels"
            raise ValueError(f"{least}, so it has no patch: lower discriminator.num_layers")
        start = config.loss.adversarial_start
        if start >= config.steps:
            late = f"loss.adversarial_start {start} is not below steps {config.steps}"
            raise ValueError(f"{late}, so no discriminator would be trained: lower it, or set adversarial_weight to 0")
        optimizer = partial(adamw, learning_rate=config.discriminator.learning_rate)
        discriminator = PatchDiscriminator(config.discriminator, config.vae.image_channels)
        self.trainables = [*self.trainables, Trainable("discriminator", discriminator, optimizer, start)]
        self.watchdog = Watchdog(config.watchdog, "validation_psnr", start=start)
        self.adaptive_weight = torch.zeros(())  # of the step before
        self._gradients: list[Tensor] = []  # of the last layer, in each micro-batch of this step
        self._pairs: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # real and made images, for the discriminator

    @classmethod
    def build(cls, config: TrainVAEConfig, accelerator: Accelerator) -> "VAEStage":
        """With the weights of `init_from` and of a perceptual network; ValueError where these do not fit."""
        stage = cls(config)
        stage.device = accelerator.device
        if config.init_from and not config.resume:
            source = load_vae(config.init_from)
            check_equal(config.vae.to_dict(), source.config.to_dict(), config.init_from, "they must be equal")
            init_weights(stage.vae, source.state_dict(), config.init_from)
        if config.loss.perceptual_weight:
            train_clip = command_to_train(config, "clip", cls.default)
            if config.loss.lpips_files and config.data.resolution < LPIPS.smallest_side:
                raise ValueError(f"data.resolution {config.data.resolution}: lpips needs {LPIPS.smallest_side} pixels")
            distance = load_perceptual(config.loss, config.run.parent, train_clip)
            stage.frozen = {"perceptual": distance.to(accelerator.device)}
        return stage

    def open_data(self, accelerator: Accelerator) -> None:
        self.data, self.held_out = open_splits(self.config.data, seed=self.config.seed)
        announce(self, accelerator)
        if self.vae.linear is not None and not self.config.init_from and not self.config.resume:
            self.vae.linear.init_from_pca(torch.cat(list(self.data.spread_images(2048))))
        self.validation = next(sample_batches(self.held_out))["image"]

    # Losses.

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        """Of the VAE: a reconstruction through a sampled latent. Of the discriminator: both, made and real images."""
        if name == "discriminator":
            real, made = self._pairs.pop(tuple(rng.positions))
            logits = networks["discriminator"](torch.cat([real, made]))
            return {"loss": hinge_loss(*logits.chunk(2))}
        images = batch["image"].to(rng.device, non_blocking=True)
        shape = self.config.vae.latent_shape(images)
        noise, change = rng.randn("latent", shape), self._scale_turn(images, rng)
        added = self._added_noise(shape, rng)

        def alter(latents: Tensor) -> Tensor:
            if self.config.loss.latent_noise:
                self._moments.append(torch.stack([(latents**n).mean((0, 2, 3)) for n in (1, 2)]).detach())
            return change(latents + added) if change else latents + added

        with used_weights(_inner(networks["vae"]).decoder.conv_out) as weights:
            output, posterior = networks["vae"](images, noise, alter)
        if change:
            images = change(images, factor=self.config.vae.factor)
        terms = vae_loss(images, output, posterior, self.config.loss, self.frozen.get("perceptual"))
        if self.watchdog is not None and rng.step >= self.config.loss.adversarial_start:
            self._pairs[tuple(rng.positions)] = (images, output.detach())
            terms |= self._adversarial_terms(terms["loss"], output, weights[0], networks)
        return terms

    def _adversarial_terms(
        self, loss: Tensor, output: Tensor, last_layer: Tensor, networks: Networks
    ) -> dict[str, Tensor]:
        """The loss with the adversarial one added, which has the weight that the step before measured."""
        assert self.watchdog is not None
        adversarial = -networks["discriminator"](output).mean()
        self._gradients.append(last_layer_gradients([loss, adversarial], last_layer))
        self.adaptive_weight = self.adaptive_weight.to(loss.device)
        weight = self.config.loss.adversarial_weight * self.watchdog.factor * self.adaptive_weight
        return {"loss": loss + weight * adversarial, "adversarial": adversarial, "adversarial_weight": weight}

    def _added_noise(self, shape: tuple[int, ...], rng: StepRNG) -> Tensor | float:
        """What is added to the latents that are decoded: noise of another level for each image, or nothing."""
        if not self.config.loss.latent_noise:
            return 0.0
        self.latent_std = self.latent_std.to(rng.device)
        level = self.config.loss.latent_noise * rng.rand("noise level")
        return level[:, None, None, None] * self.latent_std[:, None, None] * rng.randn("added noise", shape)

    def _scale_turn(self, images: Tensor, rng: StepRNG) -> ScaleTurn | None:
        """What happens to all latents of this step, if anything."""
        draw = random.Random(fold_seed(rng.seed, "equivariance", rng.step))
        if draw.random() >= self.config.loss.equivariance_probability:
            return None
        smallest = SSIM_WINDOW if self.config.loss.ssim_weight else 1  # pixels
        if self.watchdog is not None:
            smallest = max(smallest, self.config.discriminator.smallest_side)
        if self.config.loss.lpips_files:
            smallest = max(smallest, LPIPS.smallest_side)
        _, height, width = self.config.vae.latent_shape(images)
        return draw_scale_turn(draw, height, width, smallest=-(-smallest // self.config.vae.factor))

    def after_step(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Measure the latents and the adaptive weight on the whole batch: on all ranks, as on one with all samples."""
        if self._moments:
            average, square = mean(torch.stack(self._moments).mean(0))
            deviation = (square - average**2).clamp_min(0).sqrt()
            self.latent_std = torch.where(deviation.isfinite(), deviation, self.latent_std)
            self._moments = []
        if self.watchdog is None or not self._gradients:
            return
        gradients = mean(torch.stack(self._gradients).mean(0))
        weight = adaptive_weight(gradients, largest=self.config.loss.max_adaptive_weight)
        self.adaptive_weight = torch.where(weight.isfinite(), weight, self.adaptive_weight)
        self._gradients = []

    def state_dict(self) -> dict[str, Any]:
        """The deviation of the latents, the adaptive weight, and what the watchdog remembers."""
        state: dict[str, Any] = {"latent_std": self.latent_std.tolist()} if self.config.loss.latent_noise else {}
        if self.watchdog is not None:
            state |= {"adaptive_weight": self.adaptive_weight.item(), "watchdog": self.watchdog.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "latent_std" in state:
            self.latent_std = torch.tensor(state["latent_std"])
        if self.watchdog is not None and "watchdog" in state:
            self.adaptive_weight = torch.tensor(state["adaptive_weight"])
            self.watchdog.load_state_dict(state["watchdog"])

    # What the loop calls besides.

    def example_batch(self, count: int) -> Batch:
        return self.config.data.example_batch(count)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) through the mean of their posterior, in [-1, 1]."""
        return self.vae.decode(self.vae.encode(images).mean).clamp(-1, 1)

    def validate(self, ranks: Ranks = ONE_RANK) -> dict[str, float]:
        """PSNR in dB and SSIM of held-out images, and their perceptual distance where it is trained on."""
        measures: dict[str, Any] = {"psnr": psnr, **self.frozen}
        if has_ssim(self.validation):
            measures["ssim"] = ssim

        def means_of(part: Tensor) -> dict[str, float]:
            images = part.to(self.device)
            output, share = self.reconstruct(images), len(images) / len(self.validation)
            return {name: measure(output, images).mean().item() * share for name, measure in measures.items()}

        size = ranks.part_size(len(self.validation), images_at_once(self.validation.shape[-2:], VAE_PIXELS))
        parts = list(ranks.map(means_of, self.validation.split(size)))
        return {f"validation_{name}": sum(part[name] for part in parts) for name in measures}

    def sample(self) -> Image.Image:
        """Held-out images, each next to its reconstruction."""
        images = self.validation[:32].to(self.device)
        pairs = torch.stack([images, self.reconstruct(images)], 1).flatten(0, 1)
        return image_grid(tensor_to_pil(pairs), columns=8)

    def save(self, folder: Path) -> None:
        """Measure the latents, then write weights and model.json."""
        self.vae.fit_latent_stats(images.to(self.device) for images in self.data.spread_images(4096))
        save_vae(self.vae, folder, self.config.data.to_dict())

    def next_command(self) -> str:
        return command_to_train(self.config, "ldm", self.default)

    def report(self) -> str:
        """Whether the run ended with a VAE that the watchdog had begun to doubt."""
        if self.watchdog is None or not self.watchdog.worse:
            return ""
        remedy = "the averages may be of no use: train with a lower --loss.adversarial-weight or --validate-every"
        return f"warning: {self.watchdog.complaint()}: {remedy}"

    def fingerprint(self) -> dict[str, Any]:
        networks = {"vae": self.config.vae.to_dict()}
        if self.watchdog is not None:
            networks["discriminator"] = self.config.discriminator.to_dict()
        return {"data": self.config.data.fingerprint(), **networks}


def load_perceptual(config: VAELossConfig, runs: Path, train_clip: str) -> FeatureDistance | LPIPS:
    """The distance that a configuration names; `train_clip` is the command that makes what `latest` looks for."""
    if config.lpips_files:
        return LPIPS.load(*config.lpips_files)
    name = config.perceptual
    if name == "latest":
        name = latest_tower(runs, script=train_clip)
    return FeatureDistance(ImageTower.load(name, config.perceptual_pretrained))


def _inner(network: Any) -> Any:
    """The network within DDP."""
    return getattr(network, "module", network)
