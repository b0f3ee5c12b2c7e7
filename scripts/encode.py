"""Compute latents and token ids once, so that train_ldm needs neither images nor VAE; a second call goes on."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import Field
from tqdm import tqdm

from ldm.config import ScriptConfig, errors_for_people, parse
from ldm.data import DataConfig, open_dataset
from ldm.data.order import Key
from ldm.data.shapes import Split
from ldm.data.shards import INDEX, WORDS, Index, Layout, is_whole, made_with, save_groups, shards_of, write_shard
from ldm.files import write_text
from ldm.folders import newest
from ldm.pipeline import find_text, identity_of_latents, identity_of_text, load_vae, words_in
from ldm.text import TextConfig, keep
from ldm.training.loop import gather_of, is_lost, patience

SPLITS: tuple[Split, ...] = ("train", "test")


class Encode(ScriptConfig):
    """Settings of encode."""

    out: Path = Path("runs/shapes/latents")
    """folder for the latents"""
    data: DataConfig = DataConfig()
    autoencoder: str = "latest"
    """model folder of a train_vae run; `latest`: the newest finished one beside `out`"""
    text: TextConfig = TextConfig()
    """whose tokenizer reads the captions"""
    second_text: TextConfig = TextConfig(model="none")
    """another tower, as in train_ldm, for its states"""
    text_states: bool = False
    """also keep what the text towers say of each caption, so that none has to run while the U-Net is trained"""
    variants: int = Field(1, ge=1)
    """crops and flips of each training image; epoch e of a run takes variant e modulo this"""
    shard_size: int = Field(4096, ge=1)
    """images in a file"""
    seed: int = 0
    """of crops and flips, as in train_ldm"""
    timeout: int = Field(6 * 3600, ge=1, le=10**8)
    """seconds after which a process that waits for the others to finish gives up"""


def encode(config: Encode, accelerator: Accelerator) -> Path:
    """Write what is not written yet, over all processes, then the index; returns the folder."""
    folder = config.autoencoder
    if folder == "latest":
        folder = str(newest("vae", config.out.parent, script="accelerate launch scripts/train_vae.py"))
    towers = (config.text, config.second_text)
    text = find_text(towers, config.out.parent, "accelerate launch scripts/train_clip.py")
    if text is None:
        raise ValueError("text.model none: name the text tower that train_ldm will have")
    vae, text = load_vae(Path(folder)).to(accelerator.device), text.to(accelerator.device)
    config.data.check_channels(vae.config.image_channels)
    sets = {split: open_dataset(config.data, split, seed=config.seed) for split in SPLITS}
    identity = identity_of_latents(config.data, config.seed, Path(folder), text)
    identity |= {"items": {split: data.source.digest() for split, data in sets.items()}}
    identity |= identity_of_text(text) if config.text_states else {}
    made = made_with(identity, config.shard_size)
    accelerator.print(sets["train"].describe())
    jobs = [
        (split, *shard)
        for split, data in sets.items()
        for shard in shards_of(split, Layout(len(data), config.shard_size, data.groups), variants=config.variants)
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not is_whole(config.out / job[1], made)]
    accelerator.wait_for_everyone()  # all have seen the same files
    accelerator.print(f"{len(jobs) - len(missing)} of {len(jobs)} files are there")

    @torch.no_grad()
    def latents(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return vae.encode(images.to(accelerator.device))

    states = partial(keep, text) if config.text_states else None
    own = missing[accelerator.process_index :: accelerator.num_processes]
    for split, name, variant, rows in tqdm(own, unit="file", disable=not accelerator.is_main_process):
        path = config.out / name
        write_shard(path, sets[split], variant, rows, encode=latents, tokenize=text.tokenize, keep=states, made=made)
    accelerator.wait_for_everyone()
    sets["train"].share_unreadable(gather_of(accelerator))
    if accelerator.is_main_process:
        index = Index(
            identity=identity,
            shard_size=config.shard_size,
            variants=config.variants,
            rows={split: len(sets[split]) for split in SPLITS},
            groups_sha256=save_groups(config.out, sets["train"].groups),
            shown=[sets["test"].caption(Key(i, 0, i)) for i in range(min(64, len(sets["test"])))],
        )
        write_text(config.out / WORDS, "\n".join(words_in(sets["train"].captions)))
        write_text(config.out / INDEX, json.dumps(index.to_dict()))
        size = sum((config.out / name).stat().st_size for _, name, _, _ in jobs)
        print(f"{config.out}: {len(jobs)} files, {size / 2**20:,.1f} MiB")
        print(sets["train"].report())
    accelerator.wait_for_everyone()
    return config.out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Encode, argv, default=None, description=__doc__)
    with errors_for_people():
        accelerator = Accelerator(kwargs_handlers=[patience(config.timeout)])
        try:
            encode(config, accelerator)
        except RuntimeError as error:
            if not is_lost(accelerator, error):
                raise
            raise ValueError("another process is gone: look at what it said, then start encode.py again") from None


if __name__ == "__main__":
    main()
