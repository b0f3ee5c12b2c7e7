"""Latent diffusion: a U-Net learns to predict the noise in latents, or pixels, under frozen text embeddings.

Sources: Ho et al. 2020 (algorithm 1), Rombach et al. 2022 (section 3.3), Ho and Salimans 2022 (caption dropout).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from ldm.commands import command_to_train, quote, script_command
from ldm.conditioning import Conditioning
from ldm.config import CONFIGS, check_equal, differences
from ldm.data import Batch, DataConfig, ImageTextDataset, open_splits
from ldm.data.latents import InMemoryLatents, LatentDataset
from ldm.data.loader import sample_batches
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.imaging import captioned_grid, tensor_to_pil
from ldm.io.tensors import init_weights, same_weights, to_device, weights_sha256
from ldm.parts import UNET_PIXELS, images_at_once
from ldm.pipeline import ModelComponents, Pipeline
from ldm.pipeline.denoiser import text_conditioning
from ldm.pipeline.load import load_components, load_vae
from ldm.precision import compile_network, place
from ldm.ranks import ONE_RANK, Ranks
from ldm.rng import StepRNG, generator
from ldm.stages.latents import find_vae, open_latents, text_fingerprint
from ldm.stages.start import announce
from ldm.text import TextConditioner, TextConfig, TextEmbeddings, load_text_encoder
from ldm.text.image_tower import ImageTower
from ldm.text.tokenizer import vocabulary
from ldm.training.config import TrainingConfig
from ldm.training.distributed import ranks_of
from ldm.training.stage import Networks, Stage, Trainable
from ldm.unet import UNet, UNetConfig
from ldm.unet.alignment import AlignedUNet, alignment_distance
from ldm.vae import VAE, Posterior

VALIDATION_T = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the range that is trained


class TrainLDMConfig(TrainingConfig):
    """Settings of train_ldm."""

    run: Path = Path("runs/characters/ldm")
    data: DataConfig = DataConfig()
    vae: str = "latest"
    """a VAE, alone or in a whole model: a model folder, a diffusers folder (or its vae/) or a single file; `latest`:
    the newest finished train_vae run near this run; `none`: pixels"""
    text: TextConfig = TextConfig()
    second_text: TextConfig = TextConfig(model="none")
    """a second tower, whose hidden states are concatenated to those of the first, as in Stable Diffusion XL"""
    unet: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    init_from: Path | None = None
    """start from the U-Net of a finished model: a model folder, a diffusers folder or a single file"""
    channel_weight_power: float = Field(0.0, ge=0)
    """weigh the error of each latent channel by this power of its deviation before it is standardized; 0 weighs all
    channels alike, 2 as the decoder sees them"""
    align_weight: float = Field(0.0, ge=0)
    """weight of the cosine distance of the features after the U-Net's middle, which are projected, to those that the
    image tower of the text tower's CLIP has of the image; above 0 a U-Net learns in fewer steps what words look like"""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """share of captions that are replaced by "", for classifier-free guidance"""
    cache_latents: bool = False
    """encode each image once, before training, and keep its latent in memory: with one crop, and without flips"""
    cached_latents: Path | None = None
    """folder of cache_latents.py: train on its latents and token ids, and open no image"""
    compile: bool = False
    """compile the U-Net with torch.compile: the first steps take minutes, further ones less than without"""
    sample_prompts: tuple[str, ...] = ()
    """prompts of the sample grid; captions of held-out images when empty"""
    sample_steps: int = Field(30, ge=1)
    """sampling steps of the sample grid; txt2img's default for this model"""
    sample_guidance_scale: float = 3.0
    """guidance scale of the sample grid; txt2img's default for this model"""
    sample_guidance_interval: tuple[float, float] = (0.0, 1.0)
    """lowest and highest t at which it is used; txt2img's default for this model"""

    @property
    def in_memory(self) -> bool:
        """Whether latents are encoded before training and cached in memory."""
        return self.cache_latents and self.cached_latents is None


class DiffusionStage(Stage):
    """Trains a U-Net under a frozen VAE and frozen text towers, where there are any."""

    Config, default = TrainLDMConfig, CONFIGS / "characters/ldm.yaml"
    data: ImageTextDataset | LatentDataset | InMemoryLatents
    held_out: ImageTextDataset | LatentDataset
    vae_sha256: str | None

    def __init__(
        self,
        config: TrainLDMConfig,
        vae: VAE | None,
        text: TextConditioner | None,
        device: torch.device,
        image_tower: ImageTower | None = None,
    ) -> None:
        check_unet_dims(config, vae, text)
        if vae is None and config.channel_weight_power:
            raise ValueError("channel_weight_power: pixels are not standardized; leave it at 0, or name a --vae")
        self.config, self.device, self.vae, self.text, self.image_tower = config, device, vae, text, image_tower
        self.unet = UNet(config.unet, gradient_checkpointing=config.gradient_checkpointing)
        self.diffusion = Diffusion(config.diffusion)
        trained: nn.Module = self.unet
        if image_tower:
            example = torch.zeros(1, 3, *image_tower.size)
            trained = AlignedUNet(self.unet, image_tower(example)[-1].shape[1])
        self.trainables = [Trainable("unet", trained)]
        networks = (("vae", vae), ("text", text), ("image_tower", image_tower))
        self.frozen: dict[str, nn.Module] = {name: module for name, module in networks if module is not None}
        self.empty_ids = text.tokenizer([""]) if text else None

    @classmethod
    def build(cls, config: TrainLDMConfig, accelerator: Accelerator) -> "DiffusionStage":
        """With the finished stages before it, and initial weights; ValueError where something does not fit."""
        check_in_memory(config)
        if config.compile and config.fsdp:
            raise ValueError("compile: FSDP2 gathers weights in the middle of the network; leave out one of both")
        train_vae, train_clip = (command_to_train(config, stage, cls.default) for stage in ("vae", "clip"))
        vae_path = None if config.vae == "none" else find_vae(config.vae, config.run.parent, train_vae)
        vae = load_vae(vae_path) if vae_path else None
        text = load_text_encoder((config.text, config.second_text), config.run.parent, train_clip)
        model_ids = " and ".join(encoder.model_id for encoder in text.encoders) if text else "none"
        accelerator.print(f"VAE: {vae_path or 'none'}; text: {model_ids}")
        if vae and config.cached_latents is None:
            config.data.check_channels(vae.config.image_channels)
        config.data.check_buckets(config.unet.factor * (vae.config.factor if vae else 1))
        stage = cls(config, vae, text, accelerator.device, load_image_tower(config, text))
        stage.vae_sha256 = weights_sha256(vae) if vae else None
        if config.init_from and not config.resume:
            stage.init_unet(load_components(config.init_from), config.init_from, accelerator)
        for module in stage.frozen.values():
            place(module, accelerator.device)
        if config.compile:
            compile_network(stage.trainables[0].module)
        return stage

    def init_unet(self, source: ModelComponents, where: Path, accelerator: Accelerator) -> None:
        """Start from the U-Net of a finished model; what else differs there, which is no error, is printed."""
        same_input = source.unet.config.model_copy(update={"cond_channels": self.config.unet.cond_channels})
        check_equal(self.config.unet.to_dict(), same_input.to_dict(), where, "they must be equal")
        init_weights(self.unet, source.unet.state_dict(), where)
        other = [differences(self.config.diffusion.to_dict(), source.diffusion.config.to_dict())]
        networks = {"VAE": (self.vae, source.vae), "text tower": (self.text, source.text)}
        other += [f"another {name}" for name, pair in networks.items() if not same_weights(*pair)]
        other = list(filter(None, other))
        if other:
            accelerator.print(f"{where} has {'; '.join(other)}: its U-Net has to learn that anew")

    def open_data(self, accelerator: Accelerator) -> None:
        """Images or cached latents, and the pipeline that validation, samples and `save` use."""
        config = self.config
        if config.cached_latents is None:
            self.data, self.held_out = open_splits(config.data, seed=config.seed)
            words = vocabulary(self.data.captions)
            captions = self.data.captions, self.held_out.captions
            cut = self.text.read_ahead(*captions) if self.text else ""
        else:
            folder, data = config.cached_latents, config.data
            self.data, self.held_out, words = open_latents(folder, data, config.seed, self.vae_sha256, self.text)
            cut = self.data.index.cut_captions
        announce(self, accelerator, cut)
        self.validation = next(sample_batches(self.held_out))
        if config.in_memory and self.vae:
            if not isinstance(self.data, ImageTextDataset) or self.data.is_sharded:
                raise ValueError("data.source: shards exceed the memory; use cache_latents.py, or --no-cache-latents")
            accelerator.print("caching latents with one fixed crop per image (--no-cache-latents for random crops)")
            ranks = ranks_of(accelerator)
            self.data = InMemoryLatents(self.data, self.encode_for_cache, device=self.device, ranks=ranks)
        guidance = {name: getattr(config, f"sample_{name}") for name in ("guidance_scale", "guidance_interval")}
        metadata = {"data": config.data.to_dict(), "steps": config.sample_steps, **guidance}
        networks = (self.unet, self.diffusion, self.vae, self.text)
        self.pipeline = Pipeline(ModelComponents(*networks, config.data.resolution, words, metadata))

    # Loss.

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        """Weighted squared error of the prediction at a random t, and the alignment of features: means of the batch."""
        # Latents.
        z = self.latents(batch, lambda shape: rng.randn("latent", shape))
        # t, and the captions that are dropped.
        positions = to_device(torch.tensor(rng.positions), z.device)
        t = self.diffusion.sample_t(rng.rand("time"), positions, rng.batch_size)
        dropped = rng.rand("dropout", torch.device("cpu")) < self.config.caption_dropout
        # Noised latents.
        noise = rng.randn("noise", z.shape[1:])
        z_t = self.diffusion.add_noise(z, noise, t)
        # Prediction.
        cond = self.conditioning(batch, dropped)
        answer = networks["unet"](z_t, self.diffusion.network_timestep(t), cond)
        prediction, features = answer if self.image_tower else (answer, None)
        # Weighted error.
        root = self.channel_weights().sqrt()
        error = squared_error(root * prediction, root * self.diffusion.training_target(z, noise, t))
        loss = (self.diffusion.loss_weight(t) * error).mean()
        if features is None:
            return {"loss": loss}
        # Alignment.
        alignment = alignment_distance(features, self.image_features(batch)).mean()
        return {"loss": loss + self.config.align_weight * alignment, "alignment": alignment}

    def channel_weights(self) -> Tensor:
        """Weight of each channel's squared error, (c, 1, 1), with a mean of 1; (1, 1, 1) for pixels."""
        if self.vae is None:
            return torch.ones(1, 1, 1, device=self.device)
        weights = self.vae.latent_std**self.config.channel_weight_power
        return (weights / weights.mean())[:, None, None]

    def chance_loss(self, name: str, batch: Batch, rng: StepRNG) -> float:
        """The mean of every target, which is 0, is predicted."""

        def ignorant(z_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor | tuple[Tensor, Tensor]:
            zeros = torch.zeros_like(z_t)
            return (zeros, zeros.new_zeros(1, 1, 1, 1)) if self.image_tower else zeros

        networks: Any = {name: ignorant}
        return self.loss(name, networks, batch, rng)["loss"].item()

    def latents(self, batch: Batch, randn: Callable[[torch.Size], Tensor]) -> Tensor:
        """What is noised, (b, c, h, w); `randn` draws the noise of the posterior, for a shape (c, h, w)."""
        if self.vae is None:
            return batch["image"].to(self.device, non_blocking=True)
        if "mean" in batch:
            posterior = Posterior(*(batch[key].to(self.device, non_blocking=True) for key in ("mean", "logvar")))
        else:
            images = batch["image"].to(self.device, non_blocking=True)
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # in float32, as they are cached
                posterior = self.vae.encode(images)
        return self.vae.standardize(posterior.sample(randn(posterior.mean.shape[1:])))

    @torch.no_grad()
    def image_features(self, batch: Batch) -> Tensor:
        """What the image tower has of the images of a batch in its last block, (b, c, h, w)."""
        assert self.image_tower is not None
        if "features" in batch:
            return batch["features"].to(self.device, non_blocking=True)
        images = batch["image"].to(self.device, non_blocking=True)
        return self.image_tower(images.expand(-1, 3, -1, -1))[-1]

    def encode_for_cache(self, images: Tensor) -> dict[str, Tensor]:
        """What is cached in memory of images (b, c, h, w) on this device."""
        assert self.vae is not None
        mean, logvar = self.vae.encode(images)
        features = {"features": self.image_features({"image": images})} if self.image_tower else {}
        return {"mean": mean, "logvar": logvar, **features}

    def conditioning(self, batch: Batch, dropped: Tensor | None = None) -> Conditioning:
        """Text and sizes of a batch, with those of "" where `dropped` (b,) is True; ids and lengths stay on the CPU."""
        embeddings = self._text_embeddings(batch, dropped)
        cond = text_conditioning(self.text, embeddings) if self.text and embeddings else Conditioning()
        sizes = batch["sizes"].to(self.device, non_blocking=True) if self.config.unet.size_embed_dim else None
        return replace(cond, sizes=sizes)

    def _text_embeddings(self, batch: Batch, dropped: Tensor | None) -> TextEmbeddings | None:
        if self.text is None or self.empty_ids is None:
            return None
        ids = batch["ids"] if "ids" in batch else self.text.tokenizer(batch["caption"])
        ids = drop_captions(ids, dropped, self.empty_ids)
        if "hidden_states" not in batch:
            return self.text.encode_ids(ids)
        hidden_states, pooled = (
            drop_captions(cached.to(self.device, non_blocking=True), dropped, empty)
            for cached, empty in zip((batch["hidden_states"], batch["pooled"]), self._empty_embeddings, strict=True)
        )
        return self.text.states_from_cache(ids, hidden_states, pooled)

    @cached_property
    def _empty_embeddings(self) -> tuple[Tensor, Tensor]:
        assert self.text is not None and self.empty_ids is not None
        with torch.autocast(self.device.type, enabled=False):  # in float32, as the embeddings of captions were cached
            return self.text.encode_for_cache(self.empty_ids)

    def example_batch(self, count: int) -> Batch:
        """Random images, or latents where the configuration caches them."""
        batch = self.config.data.example_batch(count)
        if self.vae is None or not (self.config.cache_latents or self.config.cached_latents):
            return batch
        features: Batch = {"features": self.image_features(batch).cpu()} if self.image_tower else {}
        shape = (count, *self.vae.config.latent_shape(batch.pop("image")))
        return {**batch, **features, "mean": torch.randn(shape), "logvar": torch.zeros(shape)}

    # Validation, samples, model folder.

    def validate(self, ranks: Ranks = ONE_RANK) -> dict[str, float]:
        """The unweighted loss on held-out samples at fixed t, with fixed noise; and under other captions.

        `validation_loss_shuffled` is that under the captions of other samples, `validation_loss_empty` that without
        captions: a model that listens is worse at both.
        """
        count, side = len(self.validation["sizes"]), self.config.data.resolution
        shape = self.pipeline.latent_shape(side, side)
        noise = torch.randn(2, count, *shape, generator=generator(self.config.seed, "validation")).to(self.device)
        batches = {"": self.validation}
        if self.text is not None and count > 1:
            batches |= {"_shuffled": shift_captions(self.validation), "_empty": self.validation}

        def errors_of(own: slice) -> dict[str, Tensor]:
            z, errors = self.latents(samples_of(self.validation, own), lambda shape: noise[0, own]), {}
            for name, batch in batches.items():
                cond = self.conditioning(samples_of(batch, own), torch.full((len(z),), name == "_empty"))
                errors[name] = self._errors_at_t(z, noise[1, own], cond).cpu()
            return errors

        size = ranks.part_size(count, images_at_once((side, side), UNET_PIXELS))
        parts = list(ranks.map(errors_of, [slice(first, first + size) for first in range(0, count, size)]))
        means = {name: torch.cat([part[name] for part in parts], dim=1).mean(1).tolist() for name in batches}
        of_t = zip((f"validation_loss_t{t}" for t in self._validation_t()), means[""], strict=True)
        return {**{f"validation_loss{name}": fmean(values) for name, values in means.items()}, **dict(of_t)}

    def _validation_t(self) -> list[float]:
        t_min = self.config.diffusion.t_min
        return [round(t_min + (1 - t_min) * value, 4) for value in VALIDATION_T]

    def _errors_at_t(self, z: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """The unweighted error of each of b latents and noises (b, c, h, w) at each t: (t, b)."""
        errors = []
        for value in self._validation_t():
            t = torch.full((len(z),), value, device=self.device)
            z_t = self.diffusion.add_noise(z, noise, t)
            prediction = self.unet(z_t, self.diffusion.network_timestep(t), cond)
            errors.append(squared_error(prediction, self.diffusion.training_target(z, noise, t)))
        return torch.stack(errors)

    def sample(self) -> Image.Image:
        """A grid of sampled images with their prompts."""
        config = self.config
        data = self.held_out
        captions = data.index.sample_captions if isinstance(data, LatentDataset) else self.validation["caption"]
        prompts = list(config.sample_prompts or captions[:16])
        images = self.pipeline.sample(
            prompts,
            range(len(prompts)),
            steps=config.sample_steps,
            guidance_scale=config.sample_guidance_scale,
            literal=not config.sample_prompts,
        )
        return captioned_grid(tensor_to_pil(images), prompts, columns=8)

    def report(self) -> str:
        return self.text.tokenizer.report() if self.text and self.config.cached_latents is None else ""

    def save(self, folder: Path) -> None:
        self.pipeline.save(folder)

    def next_command(self) -> str:
        model = (self.config.run / "model").as_posix()
        return f"{script_command('txt2img', launched=False)} {quote('a prompt', '--model', model)}"

    def fingerprint(self) -> dict[str, Any]:
        fingerprint: dict[str, Any] = {"data": self.config.data.fingerprint(), "unet": self.config.unet.to_dict()}
        fingerprint |= {"diffusion": self.config.diffusion.to_dict(), "vae_sha256": self.vae_sha256}
        fingerprint["image_tower_sha256"] = weights_sha256(self.image_tower) if self.image_tower else None
        return fingerprint | text_fingerprint(self.text)


def load_image_tower(config: TrainLDMConfig, text: TextConditioner | None) -> ImageTower | None:
    """That of the CLIP whose text tower conditions, where features are aligned to it. ValueError: there is none."""
    if not config.align_weight:
        return None
    if text is None:
        raise ValueError("align_weight: without a text.model there is no CLIP to align to; leave it at 0")
    if config.cached_latents is not None:
        raise ValueError("align_weight: cached latents have no images; leave it at 0, or leave out --cached-latents")
    encoder = text.encoders[0]
    try:
        return ImageTower.load(encoder.model_id, encoder.config.pretrained)
    except ValueError as error:
        raise ValueError(f"align_weight {config.align_weight:g}: {error}, or leave it at 0") from None


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over each item: (b, ...), (b, ...) -> (b,)."""
    return (prediction.float() - target).square().flatten(1).mean(1)


def drop_captions(values: Tensor, dropped: Tensor | None, empty: Tensor) -> Tensor:
    """Values of captions (b, ...) with those of "" (1, ...) where the caption is dropped (b,) bool."""
    if dropped is None:
        return values
    where = dropped.to(values.device, non_blocking=True).view(-1, *[1] * (values.ndim - 1))
    return torch.where(where, empty.to(values.device), values)


def samples_of(batch: Batch, own: slice) -> Batch:
    """A part of a batch."""
    part: Any = {name: column[own] for name, column in batch.items()}  # type: ignore[index]
    return part


def shift_captions(batch: Batch) -> Batch:
    """A batch in which each sample has the caption of the one before it."""
    shifted: Any = dict(batch)
    for key in shifted.keys() & {"ids", "hidden_states", "pooled"}:
        shifted[key] = shifted[key].roll(1, 0)
    if "caption" in shifted:
        shifted["caption"] = [*shifted["caption"][-1:], *shifted["caption"][:-1]]
    return shifted


# Checks of the configuration.


def check_in_memory(config: TrainLDMConfig) -> None:
    """ValueError where latents cannot be cached in memory as the configuration says."""
    if config.in_memory and config.data.random_flip:
        raise ValueError("data.random_flip: cached latents cannot be mirrored; leave it off, or add --no-cache-latents")


def check_unet_dims(config: TrainLDMConfig, vae: VAE | None, text: TextConditioner | None) -> None:
    """ValueError unless the U-Net fits the latents and the text."""
    expected = {
        "cond_channels": 0,
        "in_channels": vae.config.latent_channels if vae else config.data.channels,
        "context_dim": text.width if text else 0,
        "pooled_dim": text.pooled_dim if text else 0,
    }
    for name, value in expected.items():
        if (found := getattr(config.unet, name)) != value:
            flag = f"--unet.{name.replace('_', '-')} {value}"
            raise ValueError(f"unet.{name} is {found}, the VAE and text need {value}: {flag}")
