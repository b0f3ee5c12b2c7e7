"""Caching latents, token ids and text embeddings on disk, so that train_ldm needs neither images nor VAE."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field
from tqdm import tqdm

from ldm.cli import ScriptConfig
from ldm.data import DataConfig, latents, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.data.sources.shapes import Split
from ldm.io.atomic import write_text
from ldm.io.model_dir import latest_model, read_text
from ldm.io.tensors import sha256
from ldm.pipeline.load import load_vae
from ldm.text import TextConditioner, TextConfig, load_text_encoder
from ldm.text.tokenizer import tokenizer_hash, vocabulary
from ldm.training.distributed import peer_errors, start_accelerator
from ldm.training.lock import only_writer

SPLITS: tuple[Split, ...] = ("train", "test")
SAMPLE_CAPTIONS = 64


class CacheLatentsConfig(ScriptConfig):
    """Settings of cache_latents."""

    out: Path = Path("runs/shapes/latents")
    """folder for the latents"""
    data: DataConfig = DataConfig()
    vae: str = "latest"
    """model folder of a train_vae run; `latest`: the newest finished one next to `out`"""
    text: TextConfig = TextConfig()
    """its tokenizer encodes the captions"""
    second_text: TextConfig = TextConfig(model="none")
    """a second tower, as in train_ldm, for its embeddings"""
    text_embeddings: bool = False
    """also cache the text embeddings of each caption, so that no tower has to run while the U-Net is trained"""
    augmentations_per_image: int = Field(1, ge=1)
    """crops and flips of each training image; epoch e of a run uses number e modulo this"""
    images_per_file: int = Field(4096, ge=1)
    seed: int = 0
    """of crops and flips, as in train_ldm"""
    timeout: int = Field(6 * 3600, ge=1, le=10**8)
    """seconds after which a rank that waits for the others to finish gives up"""


def cache_latents(config: CacheLatentsConfig) -> None:
    """Write what is not there yet, over all ranks, then the index."""
    accelerator = start_accelerator(config.timeout)
    with peer_errors(accelerator, config.timeout, "start cache_latents.py again"):
        writer = LatentWriter(config, accelerator)
        with only_writer(config.out, accelerator):
            writer.run()


class LatentWriter:
    """The frozen networks and both splits of one call."""

    def __init__(self, config: CacheLatentsConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        vae_folder = find_vae(config.vae, config.out.parent, "accelerate launch scripts/train_vae.py")
        towers, script = (config.text, config.second_text), "accelerate launch scripts/train_clip.py"
        text = load_text_encoder(towers, config.out.parent, script)
        if text is None:
            raise ValueError("text.model none: pass the text tower that train_ldm will have")
        self.vae, self.text = load_vae(vae_folder).to(accelerator.device), text.to(accelerator.device)
        config.data.check_channels(self.vae.config.image_channels)
        self.sets = {split: open_dataset(config.data, split, seed=config.seed) for split in SPLITS}
        self.fingerprint = latents_fingerprint(config.data, config.seed, vae_folder, self.text)
        self.fingerprint |= {"items": {split: data.source.fingerprint() for split, data in self.sets.items()}}
        self.fingerprint |= text_fingerprint(self.text) if config.text_embeddings else {}

    @torch.no_grad()
    def run(self) -> None:
        """Write the missing files, then the index."""
        config, accelerator = self.config, self.accelerator
        accelerator.print(self.sets["train"].describe())
        key = latents.content_key(self.fingerprint, config.images_per_file)
        files = [(split, *file) for split in SPLITS for file in self._files(split)]
        missing = [file for file in files if not latents.is_valid(config.out / file[1], key)]
        accelerator.wait_for_everyone()  # all have seen the same files
        accelerator.print(f"{len(files) - len(missing)} of {len(files)} files are there")
        share = missing[accelerator.process_index :: accelerator.num_processes]
        for split, name, augmentation, rows in tqdm(share, unit="file", disable=not accelerator.is_main_process):
            latents.write_latent_file(
                config.out / name,
                self.sets[split],
                augmentation,
                rows,
                encode=lambda images: self.vae.encode(images.to(accelerator.device)),
                tokenize=self.text.tokenizer,
                encode_text=self.text.encode_for_cache if config.text_embeddings else None,
                key=key,
            )
        accelerator.wait_for_everyone()
        self.sets["train"].sync(gather_object)
        if accelerator.is_main_process:
            self._write_index()
            size = sum((config.out / name).stat().st_size for _, name, _, _ in files)
            accelerator.print(f"{config.out}: {len(files)} files, {size / 2**20:,.1f} MiB")
            accelerator.print(self.sets["train"].report())
        accelerator.wait_for_everyone()

    def _files(self, split: Split) -> list[Any]:
        data, size, augmentations = self.sets[split], self.config.images_per_file, self.config.augmentations_per_image
        return latents.LatentFileLayout(split, len(data), size, augmentations=augmentations, groups=data.groups).files()

    def _write_index(self) -> None:
        config, train, test = self.config, self.sets["train"], self.sets["test"]
        index = latents.LatentIndex(
            fingerprint=self.fingerprint,
            images_per_file=config.images_per_file,
            augmentations=config.augmentations_per_image,
            rows={split: len(self.sets[split]) for split in SPLITS},
            groups_sha256=latents.save_groups(config.out, train.groups),
            sample_captions=[test.caption(SampleKey(i, 0, i)) for i in range(min(SAMPLE_CAPTIONS, len(test)))],
        )
        write_text(config.out / latents.VOCABULARY_FILE, "\n".join(vocabulary(train.captions)))
        write_text(config.out / latents.INDEX_FILE, json.dumps(index.to_dict()))


def find_vae(vae: str, runs_dir: Path, command: str) -> Path:
    """The model folder that `--vae` names; `latest` is the newest finished one below `runs_dir`, made by `command`."""
    if vae == "latest":
        return latest_model("vae", runs_dir, script=command)
    if not (Path(vae) / "vae.safetensors").is_file():
        raise ValueError(f"--vae {vae} has no vae.safetensors: pass RUN/model, or convert it with convert.py")
    return Path(vae)


def open_latents(
    folder: Path, data: DataConfig, seed: int, vae: Path | None, text: TextConditioner | None
) -> tuple[latents.LatentDataset, latents.LatentDataset, list[str]]:
    """Both splits of a folder of cached latents, and the words of its captions.

    ValueError when it was made from other data, with another VAE or another tokenizer.
    """
    if vae is None or text is None:
        raise ValueError("cached_latents: they were made with a VAE and a text tower; leave out `none` for both")
    train, test = (latents.LatentDataset(folder, split, seed=seed) for split in SPLITS)
    made_from = train.index.fingerprint
    expected = latents_fingerprint(data, seed, vae, text)
    expected |= text_fingerprint(text) if "text_sha256" in made_from else {}
    if wrong := [key for key in expected if made_from.get(key) != expected[key]]:
        differences = "; ".join(f"{key} is {made_from.get(key)}, expected {expected[key]}" for key in wrong)
        raise ValueError(f"{folder}: {differences}; run scripts/cache_latents.py for this recipe")
    return train, test, read_text(folder / latents.VOCABULARY_FILE).split()


def latents_fingerprint(data: DataConfig, seed: int, vae: Path, text: TextConditioner) -> dict[str, Any]:
    """What decides the latents of images under the VAE in a model folder, and the token ids of their captions."""
    return {
        "data": data.fingerprint(),
        "seed": seed,
        "vae_sha256": sha256(vae / "vae.safetensors"),
        "tokenizer_sha256": tokenizer_hash(text.tokenizer),
    }


def text_fingerprint(text: TextConditioner | None) -> dict[str, Any]:
    """What decides the text embeddings of captions: weights and settings of each tower."""
    fingerprint: dict[str, Any] = {}
    for prefix, encoder in zip(("", "second_"), text.encoders if text else (), strict=False):
        values = {"text_sha256": sha256(encoder.weights), **encoder.config.fingerprint()}
        fingerprint |= {prefix + key: value for key, value in values.items()}
    return fingerprint
