"""Train the U-Net on noised latents (or pixels) under frozen text states."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm import imaging
from ldm.cli import exit_on_user_error, parse_cli
from ldm.data import DataConfig, ImageTextDataset, collate, open_dataset
from ldm.data.batch_sampler import first_samples
from ldm.data.latents import VOCABULARY_FILE, LatentDataset
from ldm.data.latents_in_memory import InMemoryLatents
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.io import model_dir
from ldm.io.model_dir import latest_model
from ldm.io.tensors import sha256
from ldm.pipeline import Pipeline
from ldm.pipeline.pipeline import (
    initial_noise,
    latents_fingerprint,
    load_text_encoder,
    load_vae,
    tensor_to_pil,
    text_fingerprint,
    to_conditioning,
    vocabulary,
)
from ldm.rng import StepRNG, generator
from ldm.text import Text, TextConfig, TextEmbeddings, encode_for_cache, states_from_cache
from ldm.training.config import TrainingConfig
from ldm.training.distributed import make_accelerator, make_gather
from ldm.training.stage import Batch, Fit, Stage, StageCallbacks, Trainable
from ldm.training.trainer import fit
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, Posterior

DEFAULT = Path(__file__).parents[1] / "configs/shapes/ldm.yaml"
VALIDATION_T = (0.1, 0.3, 0.5, 0.7, 0.9)


class TrainLDMConfig(TrainingConfig):
    """Settings of train_ldm."""

    run: Path = Path("runs/shapes/ldm")
    data: DataConfig = DataConfig()
    vae: str = "latest"
    """model folder of a train_vae run; `latest`: the newest finished one beside this run; `none`: work in pixels"""
    text: TextConfig = TextConfig()
    second_text: TextConfig = TextConfig(model="none")
    """another tower, whose states go beside those of the first, as in Stable Diffusion XL"""
    unet: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """share of captions that are replaced by "", so that guidance has something to compare with"""
    cache_latents: bool = False
    """encode each image once, before training, and keep its latent in memory: with one crop, and without flips"""
    cached_latents: Path | None = None
    """folder that encode.py wrote: train on its latents and token ids, and open no image"""
    sample_prompts: tuple[str, ...] = ()
    """prompts of the sample grid; captions of held-out images when empty"""
    sample_steps: int = Field(30, ge=1)
    sample_guidance_scale: float = 3.0
    """guidance scale of the sample grid; txt2img takes it as its default for this model"""


def train(config: TrainLDMConfig, fit: Fit = fit) -> Path:
    """Build the stage and run it, with `fit` or with what looks at it in its place; returns the model folder."""
    in_memory = config.cache_latents and config.cached_latents is None
    if in_memory and config.data.random_flip:
        raise ValueError(
            "data.random_flip: cached latents can not be mirrored; add --no-cache-latents, or --data.no-random-flip"
        )
    if in_memory and config.data.bucket_step:
        raise ValueError("data.bucket_step: cached latents are of one shape; add --no-cache-latents, or use encode.py")
    accelerator = make_accelerator(config)
    device = accelerator.device
    vae_folder = resolve_vae(config)
    vae = load_vae(vae_folder) if vae_folder else None
    text = load_text_encoder((config.text, config.second_text), config.run.parent, training_command(config, "clip"))
    accelerator.print(f"autoencoder: {vae_folder or 'none'}; text: {describe_text(text)}")
    check_unet_dims(config, vae, text)
    if vae and config.cached_latents is None:
        config.data.check_channels(vae.config.image_channels)
    config.data.check_buckets(config.unet.factor * (vae.config.factor if vae else 1))
    data, held_out, words = open_data(config, vae_folder, text, accelerator.print)
    if in_memory and isinstance(data, ImageTextDataset) and data.is_sharded:
        raise ValueError("data.source: shards are too many to be cached; add --no-cache-latents, or use encode.py")
    unet = UNet(config.unet, gradient_checkpointing=config.gradient_checkpointing)
    process = Diffusion(config.diffusion)
    about = {"data": config.data.to_dict(), "guidance_scale": config.sample_guidance_scale}
    pipeline = Pipeline(
        unet, process, vae=vae, text=text, resolution=config.data.resolution, vocabulary=words, metadata=about
    )
    shape = pipeline.latent_shape(config.data.resolution, config.data.resolution)
    for module in (vae, text):
        if module is not None:
            module.to(device)
    fixed = collate(first_samples(held_out, 64))
    shown = held_out.index.sample_captions if isinstance(held_out, LatentDataset) else fixed["caption"]
    source: Dataset[Any] = data
    if in_memory and vae and isinstance(data, ImageTextDataset):
        accelerator.print(
            "latents: encoded once, with one crop of each image (--no-cache-latents: a new one each time)"
        )
        source = InMemoryLatents(data, vae.encode, device=device, progress=accelerator.is_main_process)

    def latents(batch: Batch, noise: Callable[[torch.Size], Tensor]) -> Tensor:
        """What is noised, (b, c, h, w); `noise` draws that of the posterior, for a shape (c, h, w)."""
        if vae is None:
            return batch["image"]
        if "mean" in batch:
            posterior = Posterior(batch["mean"], batch["logvar"])
        else:
            with torch.no_grad():
                posterior = vae.encode(batch["image"])
        return vae.standardize(posterior.sample(noise(posterior.mean.shape[1:])))

    if text:
        empty = text.tokenize([""])
        said_of_empty = encode_for_cache(text, empty)

    def states_of(batch: Batch, dropped: Tensor | None) -> TextEmbeddings:
        """What the text tower says of the captions, with those of "" where one is dropped."""
        assert text
        if "tokens" in batch:
            said = batch["ids"], batch["tokens"], batch["pooled"]
            return states_from_cache(text, *map(partial(drop_captions, dropped), said, (empty, *said_of_empty)))
        ids = batch["ids"].cpu() if "ids" in batch else text.tokenize(batch["caption"])
        return text.encode_ids(drop_captions(dropped, ids, empty))

    def errors(
        module: nn.Module, z: Tensor, batch: Batch, noise: Tensor, t: Tensor, dropped: Tensor | None = None
    ) -> Tensor:
        """Squared error of each image, whose caption may be dropped: (b,)."""
        states = states_of(batch, dropped) if text else None
        sizes = batch["sizes"].to(device) if config.unet.size_embed_dim else None
        answer = module(
            process.add_noise(z, noise, t), process.network_timestep(t), *to_conditioning(text, states), sizes
        )
        return (answer.float() - process.training_target(z, noise, t)).square().flatten(1).mean(1)

    def loss(module: nn.Module, batch: Batch, draws: StepRNG) -> dict[str, Tensor]:
        z = latents(batch, lambda own: draws.randn("latent", own))
        positions = torch.tensor(draws.positions, device=z.device)
        t = process.sample_t(draws.rand("time"), positions, draws.batch_size)
        dropped = draws.rand("dropout") < config.caption_dropout
        error = errors(module, z, batch, draws.randn("noise", z.shape[1:]), t, dropped)
        return {"loss": (process.loss_weight(t) * error).mean()}

    def validate() -> dict[str, float]:
        count = len(fixed["sizes"])
        noise = torch.randn(2, count, *shape, generator=generator(config.seed, "validation")).to(device)
        moved = {name: value.to(device) for name, value in fixed.items() if isinstance(value, Tensor)}
        z = latents(moved, lambda own: noise[0])
        by_time = {
            f"validation_loss_t{t}": errors(unet, z, fixed, noise[1], torch.full((count,), t, device=device))
            for t in VALIDATION_T
        }
        means = {name: error.mean().item() for name, error in by_time.items()}
        return {"validation_loss": sum(means.values()) / len(means), **means}

    def sample() -> Image.Image:
        prompts = list(config.sample_prompts or shown[:16])
        seeds = list(range(len(prompts)))
        noise = initial_noise(shape, seeds).to(device)
        steps, scale = config.sample_steps, config.sample_guidance_scale
        call: dict[str, Any] = {"seeds": seeds, "steps": steps, "guidance_scale": scale}
        z = pipeline.sample(noise, prompts, [""] * len(seeds), literal=not config.sample_prompts, **call)
        return imaging.captioned_grid(tensor_to_pil(pipeline.decode(z)), prompts, columns=8)

    def check() -> None:
        if isinstance(data, ImageTextDataset):
            data.sync_unreadable(make_gather(accelerator))

    identity: dict[str, Any] = {"data": data.fingerprint()}
    identity |= {"unet": config.unet.to_dict(), "diffusion": config.diffusion.to_dict()}
    identity["vae_sha256"] = sha256(vae_folder / "vae.safetensors") if vae_folder else None
    identity |= text_fingerprint(text)
    stage = Stage(
        trainables=[Trainable("unet", unet, loss)],
        data=source,
        collate=collate,
        hooks=StageCallbacks(validate=validate, sample=sample, save_model=pipeline.save, check=check),
        fingerprint=identity,
        make_batch_sampler=data.make_batch_sampler,
    )
    try:
        return fit(config, accelerator, stage)
    finally:
        accelerator.print("\n".join(one.report() for one in (data, held_out) if isinstance(one, ImageTextDataset)))


def open_data(
    config: TrainLDMConfig, vae: Path | None, text: Text | None, say: Callable[[str], None]
) -> tuple[ImageTextDataset | LatentDataset, ImageTextDataset | LatentDataset, list[str]]:
    """Training and held-out samples, and the words of the captions.

    ValueError when latents were made of other data, with another VAE or another tokenizer.
    """
    if config.cached_latents is None:
        data, held_out = (open_dataset(config.data, split, seed=config.seed) for split in ("train", "test"))
        say(data.describe())
        return data, held_out, vocabulary(data.captions)
    if vae is None or text is None:
        raise ValueError("latents: encode.py made them with a VAE and a text tower; leave out `none` for both")
    train, test = (LatentDataset(config.cached_latents, split, seed=config.seed) for split in ("train", "test"))
    index, wanted = train.index, latents_fingerprint(config.data, config.seed, vae, text)
    with_states = "text_sha256" in index.fingerprint
    wanted |= text_fingerprint(text) if with_states else {}
    if wrong := [key for key in wanted if index.fingerprint.get(key) != wanted[key]]:
        told = "; ".join(f"{key} is {wanted[key]}, there {index.fingerprint.get(key)}" for key in wrong)
        raise ValueError(
            f"{config.cached_latents} was made with something else: {told}; run scripts/encode.py for this recipe"
        )
    states = ", with text states" if with_states else ""
    say(
        f"latents: {len(train):,} of {index.augmentations} variants in {config.cached_latents}{states}; {len(test):,} held out"
    )
    return train, test, model_dir.read_text(config.cached_latents / VOCABULARY_FILE).split()


def resolve_vae(config: TrainLDMConfig) -> Path | None:
    """The model folder of the VAE; None for diffusion in pixels."""
    if config.vae == "none":
        return None
    if config.vae == "latest":
        return latest_model("vae", config.run.parent, script=training_command(config, "vae"))
    return Path(config.vae)


def training_command(config: TrainLDMConfig, stage: str) -> str:
    """The command that trains another stage of this recipe, beside this run."""
    beside = config.config.with_name(f"{stage}.yaml") if config.config else None
    recipe = f" --config {beside}" if beside and beside.is_file() and config.config != DEFAULT else ""
    return f"accelerate launch scripts/train_{stage}.py{recipe} --run {config.run.parent / stage}"


def drop_captions(dropped: Tensor | None, values: Tensor, empty: Tensor) -> Tensor:
    """Values of captions (b, ...) with those of an empty one (1, ...) where the caption is dropped (b,)."""
    if dropped is None:
        return values
    where = dropped.to(values.device).view(-1, *[1] * (values.ndim - 1))
    return torch.where(where, empty.to(values.device), values)


def describe_text(text: Text | None) -> str:
    """Which towers they are."""
    return " and ".join(encoder.model_id for encoder in text.encoders) if text else "none"


def check_unet_dims(config: TrainLDMConfig, vae: VAE | None, text: Text | None) -> None:
    """ValueError unless the U-Net fits the latents and the text."""
    wanted = {
        "cond_channels": 0,
        "in_channels": vae.config.latent_channels if vae else config.data.channels,
        "context_dim": text.width if text else 0,
        "pooled_dim": text.pooled_dim if text else 0,
    }
    for name, value in wanted.items():
        if getattr(config.unet, name) != value:
            flag = f"--unet.{name.replace('_', '-')} {value}"
            raise ValueError(
                f"unet.{name} is {getattr(config.unet, name)}, the autoencoder and text need {value}: {flag}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(TrainLDMConfig, argv, default=DEFAULT, description=__doc__)
    with exit_on_user_error():
        train(config)


if __name__ == "__main__":
    main()
