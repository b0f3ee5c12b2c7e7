"""Caching latents, token ids and text embeddings on disk, so that train_ldm needs neither images nor VAE."""

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field
from tqdm import tqdm

from ldm.cli import ScriptConfig
from ldm.config import changed_values, check_equal
from ldm.data import DataConfig, ImageTextDataset, latents, open_splits
from ldm.data.batch_sampler import SampleKey
from ldm.data.sources.base import Split, short_hash
from ldm.io.atomic import check_folder, write_text
from ldm.io.model_dir import latest_model, read_text
from ldm.io.tensors import sha256, weights_sha256
from ldm.pipeline.load import load_vae
from ldm.precision import place
from ldm.stages.start import pixel_notes
from ldm.text import TextConditioner, TextConfig, load_text_encoder
from ldm.text.tokenizer import tokenizer_hash, vocabulary
from ldm.training.distributed import disconnect_at_end, peer_errors, start_accelerator
from ldm.training.lock import only_writer

SPLITS: tuple[Split, ...] = ("train", "test")
SAMPLE_CAPTIONS = 64


class CacheLatentsConfig(ScriptConfig):
    """Settings of cache_latents."""

    out: Path = Path("runs/characters/latents")
    """folder for the latents"""
    data: DataConfig = DataConfig()
    vae: str = "latest"
    """a VAE, alone or in a whole model: a model folder, a diffusers folder or a single file; `latest`: the newest
    finished train_vae run next to `out`"""
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
    with disconnect_at_end(accelerator), peer_errors(accelerator, config.timeout, "start cache_latents.py again"):
        check_folder(config.out, "--out")
        with only_writer(config.out, accelerator):
            LatentWriter(config, accelerator).run()


class LatentWriter:
    """The frozen networks and both splits of one call."""

    def __init__(self, config: CacheLatentsConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        vae_path = find_vae(config.vae, config.out.parent, "accelerate launch scripts/train_vae.py")
        towers, script = (config.text, config.second_text), "accelerate launch scripts/train_clip.py"
        text = load_text_encoder(towers, config.out.parent, script)
        if text is None:
            raise ValueError("text.model none: pass the text tower that train_ldm will have")
        self.vae, self.text = place(load_vae(vae_path), accelerator.device), text.to(accelerator.device)
        config.data.check_channels(self.vae.config.image_channels)
        self.sets = dict(zip(SPLITS, open_splits(config.data, seed=config.seed), strict=True))
        self.fingerprint = latents_fingerprint(config.data, config.seed, weights_sha256(self.vae), self.text)
        self.fingerprint |= items_fingerprint(self.sets)
        captions = "\n".join(itertools.chain.from_iterable(data.captions for data in self.sets.values()))
        self.fingerprint |= {"captions": short_hash(captions)}
        self.fingerprint |= text_fingerprint(self.text) if config.text_embeddings else {}

    @torch.no_grad()
    def run(self) -> None:
        """Write the missing files, then the index; ValueError: images that are all of one colour."""
        config, accelerator = self.config, self.accelerator
        notes = [] if self.sets["train"].is_sharded else pixel_notes(self.sets["train"])
        cut = self.text.read_ahead(*(data.captions for data in self.sets.values()))
        accelerator.print("\n".join(filter(None, [self.sets["train"].describe(), *notes, cut])))
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
        cut = "\n".join(dict.fromkeys(filter(None, gather_object([self.text.tokenizer.report()]))))  # of all ranks
        if accelerator.is_main_process:
            self._write_index(cut)
            size = sum((config.out / name).stat().st_size for _, name, _, _ in files)
            accelerator.print(f"{config.out}: {len(files)} files, {size / 2**20:,.1f} MiB")
            accelerator.print("\n".join(filter(None, [self.sets["train"].report(), cut])))
        accelerator.wait_for_everyone()

    def _files(self, split: Split) -> list[Any]:
        data, size, augmentations = self.sets[split], self.config.images_per_file, self.config.augmentations_per_image
        return latents.LatentFileLayout(split, len(data), size, augmentations=augmentations, groups=data.groups).files()

    def _write_index(self, cut_captions: str) -> None:
        config, train, test = self.config, self.sets["train"], self.sets["test"]
        index = latents.LatentIndex(
            fingerprint=self.fingerprint,
            source=config.data.source,
            images_per_file=config.images_per_file,
            augmentations=config.augmentations_per_image,
            rows={split: len(self.sets[split]) for split in SPLITS},
            groups_sha256=latents.save_groups(config.out, train.groups),
            sample_captions=[test.caption(SampleKey(i, 0, i)) for i in range(min(SAMPLE_CAPTIONS, len(test)))],
            cut_captions=cut_captions,
        )
        write_text(config.out / latents.VOCABULARY_FILE, "\n".join(vocabulary(train.captions)))
        write_text(config.out / latents.INDEX_FILE, json.dumps(index.to_dict()))


def find_vae(vae: str, runs_dir: Path, command: str) -> Path:
    """What `--vae` names; `latest` is the newest finished model folder below `runs_dir`, made by `command`."""
    return latest_model("vae", runs_dir, script=command) if vae == "latest" else Path(vae)


def open_latents(
    folder: Path, data: DataConfig, seed: int, vae_sha256: str | None, text: TextConditioner | None
) -> tuple[latents.LatentDataset, latents.LatentDataset, list[str]]:
    """Both splits of a folder of cached latents, and the words of its captions.

    ValueError when it was made from other images, with another VAE or another tokenizer.
    """
    if vae_sha256 is None or text is None:
        raise ValueError("cached_latents: they were made with a VAE and a text tower; leave out `none` for both")
    train, test = (latents.LatentDataset(folder, split, seed=seed) for split in SPLITS)
    made_from, remedy = train.index.fingerprint, "run scripts/cache_latents.py for this recipe"
    source = str(train.index.source or made_from["data"].get("source"))
    same_place = os.path.normpath(source) == os.path.normpath(data.source)
    if not same_place and (data.drawn or DataConfig(source=source).drawn):
        other = f"{folder} has data.source {source}, here {data.source}"
        raise ValueError(f"{other}: pass --data.source {source}, or {remedy}")
    expected = latents_fingerprint(data, seed, vae_sha256, text)
    expected |= text_fingerprint(text) if "text_sha256" in made_from else {}
    check_equal(expected, made_from, folder, remedy)
    if not same_place:  # perhaps the same images, elsewhere
        found = items_fingerprint(dict(zip(SPLITS, open_splits(data, seed=seed), strict=True)))
        if changed_values(found, made_from):
            raise ValueError(f"{folder} was made from other images than those of {data.source}: {remedy}")
    return train, test, read_text(folder / latents.VOCABULARY_FILE).split()


def latents_fingerprint(data: DataConfig, seed: int, vae_sha256: str, text: TextConditioner) -> dict[str, Any]:
    """What decides the latents of images under a VAE, and the token ids of their captions."""
    return {
        "data": data.fingerprint(),
        "seed": seed,
        "vae_sha256": vae_sha256,
        "tokenizer_sha256": tokenizer_hash(text.tokenizer),
    }


def items_fingerprint(sets: Mapping[Split, ImageTextDataset]) -> dict[str, dict[str, Any]]:
    """The hashes of the images of each split."""
    hashes = {split: data.fingerprint() for split, data in sets.items()}
    return {name: {split: own[name] for split, own in hashes.items() if name in own} for name in latents.ITEM_HASHES}


def text_fingerprint(text: TextConditioner | None) -> dict[str, Any]:
    """What decides the text embeddings of captions: weights and settings of each tower."""
    fingerprint: dict[str, Any] = {}
    for prefix, encoder in zip(("", "second_"), text.encoders if text else (), strict=False):
        values = {"text_sha256": sha256(encoder.weights), **encoder.config.fingerprint()}
        fingerprint |= {prefix + key: value for key, value in values.items()}
    return fingerprint
