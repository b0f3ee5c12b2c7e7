"""Compute latents and token ids once, so that train_ldm needs neither images nor VAE; a second call goes on."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import Field
from tqdm import tqdm

from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.data.latents import (
    INDEX_FILE,
    VOCABULARY_FILE,
    LatentFileLayout,
    LatentIndex,
    content_key,
    is_valid,
    list_latent_files,
    save_groups,
    write_latent_file,
)
from ldm.data.sources.shapes import Split
from ldm.io.atomic import write_text
from ldm.io.model_dir import latest_model
from ldm.pipeline.pipeline import latents_fingerprint, load_text_encoder, load_vae, text_fingerprint, vocabulary
from ldm.text import TextConfig, encode_for_cache
from ldm.training.distributed import is_peer_failure, make_gather, process_group_timeout

SPLITS: tuple[Split, ...] = ("train", "test")


class CacheLatentsConfig(ScriptConfig):
    """Settings of encode."""

    out: Path = Path("runs/shapes/latents")
    """folder for the latents"""
    data: DataConfig = DataConfig()
    vae: str = "latest"
    """model folder of a train_vae run; `latest`: the newest finished one beside `out`"""
    text: TextConfig = TextConfig()
    """whose tokenizer reads the captions"""
    second_text: TextConfig = TextConfig(model="none")
    """another tower, as in train_ldm, for its states"""
    text_embeddings: bool = False
    """also keep what the text towers say of each caption, so that none has to run while the U-Net is trained"""
    augmentations_per_image: int = Field(1, ge=1)
    """crops and flips of each training image; epoch e of a run takes variant e modulo this"""
    images_per_file: int = Field(4096, ge=1)
    """images in a file"""
    seed: int = 0
    """of crops and flips, as in train_ldm"""
    timeout: int = Field(6 * 3600, ge=1, le=10**8)
    """seconds after which a process that waits for the others to finish gives up"""


def encode(config: CacheLatentsConfig, accelerator: Accelerator) -> Path:
    """Write what is not written yet, over all processes, then the index; returns the folder."""
    folder = config.vae
    if folder == "latest":
        folder = str(latest_model("vae", config.out.parent, script="accelerate launch scripts/train_vae.py"))
    towers = (config.text, config.second_text)
    text = load_text_encoder(towers, config.out.parent, "accelerate launch scripts/train_clip.py")
    if text is None:
        raise ValueError("text.model none: name the text tower that train_ldm will have")
    vae, text = load_vae(Path(folder)).to(accelerator.device), text.to(accelerator.device)
    config.data.check_channels(vae.config.image_channels)
    sets = {split: open_dataset(config.data, split, seed=config.seed) for split in SPLITS}
    identity = latents_fingerprint(config.data, config.seed, Path(folder), text)
    identity |= {"items": {split: data.source.fingerprint() for split, data in sets.items()}}
    identity |= text_fingerprint(text) if config.text_embeddings else {}
    made = content_key(identity, config.images_per_file)
    accelerator.print(sets["train"].describe())
    jobs = [
        (split, *shard)
        for split, data in sets.items()
        for shard in list_latent_files(
            split,
            LatentFileLayout(len(data), config.images_per_file, data.groups),
            variants=config.augmentations_per_image,
        )
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not is_valid(config.out / job[1], made)]
    accelerator.wait_for_everyone()  # all have seen the same files
    accelerator.print(f"{len(jobs) - len(missing)} of {len(jobs)} files are there")

    @torch.no_grad()
    def latents(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return vae.encode(images.to(accelerator.device))

    states = partial(encode_for_cache, text) if config.text_embeddings else None
    own = missing[accelerator.process_index :: accelerator.num_processes]
    for split, name, variant, rows in tqdm(own, unit="file", disable=not accelerator.is_main_process):
        path = config.out / name
        write_latent_file(
            path, sets[split], variant, rows, encode=latents, tokenize=text.tokenize, keep=states, made=made
        )
    accelerator.wait_for_everyone()
    sets["train"].sync_unreadable(make_gather(accelerator))
    if accelerator.is_main_process:
        index = LatentIndex(
            fingerprint=identity,
            images_per_file=config.images_per_file,
            augmentations=config.augmentations_per_image,
            rows={split: len(sets[split]) for split in SPLITS},
            groups_sha256=save_groups(config.out, sets["train"].groups),
            sample_captions=[sets["test"].caption(SampleKey(i, 0, i)) for i in range(min(64, len(sets["test"])))],
        )
        write_text(config.out / VOCABULARY_FILE, "\n".join(vocabulary(sets["train"].captions)))
        write_text(config.out / INDEX_FILE, json.dumps(index.to_dict()))
        size = sum((config.out / name).stat().st_size for _, name, _, _ in jobs)
        print(f"{config.out}: {len(jobs)} files, {size / 2**20:,.1f} MiB")
        print(sets["train"].report())
    accelerator.wait_for_everyone()
    return config.out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(CacheLatentsConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        accelerator = Accelerator(kwargs_handlers=[process_group_timeout(config.timeout)])
        try:
            encode(config, accelerator)
        except RuntimeError as error:
            if not is_peer_failure(accelerator, error):
                raise
            raise ValueError("another process is gone: look at what it said, then start encode.py again") from None


if __name__ == "__main__":
    main()
