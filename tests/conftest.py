"""Fixtures that all tests share: tiny finished runs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from pathlib import Path

import pytest
import torch
from helpers import STAGE_NAMES, train

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished clip, vae and ldm runs."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in STAGE_NAMES:
        train(stage, folder / stage)
    return folder


@pytest.fixture
def tiny_model(tiny_runs: Path) -> Path:
    """The model folder of the finished tiny pipeline."""
    return tiny_runs / "ldm/model"
