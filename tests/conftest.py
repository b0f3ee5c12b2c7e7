"""Tiny recipes that all tests share: three stages that train in seconds."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import functools
import importlib
from pathlib import Path

import pytest
import torch

from ldm.data.sources import shapes

torch.set_num_threads(1)
shapes.load = functools.partial(shapes.load, count=320)  # not 10,000 pictures, where a test does not ask for a number

COMMON = "--steps 4 --batch-size 8 --warmup-steps 1 --data.resolution 16 --checkpoint-every 2 --log-every 1"
TINY = {
    "clip": "--clip.context-length 24 --clip.width 32 --clip.num-layers 1 --clip.num-heads 2 --clip.embed-dim 16",
    "vae": "--vae.base-channels 32 --vae.latent-channels 4",
    "ldm": "--sample-steps 2 --unet.patch-size 1 --unet.model-channels 32 --unet.channel-mult 1 2 --unet.transformer-depth 0 1 "
    "--unet.num-heads 2 2 --unet.in-channels 4 --unet.context-dim 32 --unet.pooled-dim 16",
}


def train(stage: str, run: Path, *flags: str) -> Path:
    """Run a training script in this process on the tiny recipe; returns the model folder.

    Only that script is imported: train_clip takes seconds to import, for open_clip.
    """
    importlib.import_module(f"train_{stage}").main(["--run", str(run), *COMMON.split(), *TINY[stage].split(), *flags])
    return run / "model"


def examine(stage: str, run: Path, *flags: str) -> None:
    """Run the doctor in this process on the tiny recipe; its exit status is 1 when something is not well."""
    importlib.import_module("doctor").main([stage, "--run", str(run), *COMMON.split(), *TINY[stage].split(), *flags])


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished clip, vae and ldm runs."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("clip", "vae", "ldm"):
        train(stage, folder / stage)
    return folder


@pytest.fixture
def tiny_model(tiny_runs: Path) -> Path:
    """The model folder of the finished tiny pipeline."""
    return tiny_runs / "ldm/model"
