"""Starts short runs, kills each at a random moment and continues; started by test_crash_recovery.py.

Each run is a fork of this process, which has imported everything and holds no thread, so a start takes milliseconds.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimizer of a process imports: with it here, no fork pays for it
from accelerate import Accelerator
from helpers import contents, losses, tensors_of, toy, toy_config
from torch import Tensor

from ldm.data import DataConfig
from ldm.data.sources import shapes
from ldm.io import atomic
from ldm.stages.latents import CacheLatentsConfig, LatentWriter
from ldm.text import TextConfig
from ldm.training import checkpoint

STEPS = 24


def train(run: Path) -> None:
    """Go on with a toy run, or begin it."""
    resume = "latest" if checkpoint.latest(run / "checkpoints") else None
    toy(toy_config(run, steps=STEPS, checkpoint_every=2, trackers=(), resume=resume))


def trained(run: Path) -> dict[str, Any]:
    """What a finished run has: its weights as bytes, and its losses."""
    return {**{name: t.numpy().tobytes() for name, t in tensors_of(run, STEPS).items()}, "losses": losses(run)}


def latent_writer(stages: Path) -> Callable[[Path], Any]:
    """A function that caches latents with networks and images that all runs share, to a folder on a slow disk."""
    shapes.num_rows = lambda split, *, pairs=False: 60
    config = CacheLatentsConfig(
        vae=str(stages / "vae/model"),
        text=TextConfig(model=f"local-dir:{stages}/clip/model"),
        data=DataConfig(resolution=16),
        images_per_file=10,
    )
    writer = LatentWriter(config, Accelerator())
    atomic.save_file = slowly(atomic.save_file)

    def write(run: Path) -> Path:
        writer.config = config.model_copy(update={"out": run})
        return writer.run()

    return write


def slowly(save: Callable[..., None]) -> Callable[..., None]:
    """`save`, whose file is only half there for some milliseconds, so that kills meet it."""

    def save_in_halves(tensors: dict[str, Tensor], path: Path, *more: Any) -> None:
        save(tensors, path, *more)
        whole = path.read_bytes()
        for end in (len(whole) // 2, len(whole)):
            path.write_bytes(whole[:end])
            time.sleep(0.01)

    return save_in_halves


def start(work: Callable[[Path], None], run: Path) -> int:
    """Fork a run that goes on where the last one was killed; returns its process id."""
    child = os.fork()
    if child:
        return child
    said = os.open(run.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    work(run)
    os._exit(0)


def main(folder: Path, kills: int, work: Callable[[Path], None], finished_with: Callable[[Path], Any]) -> None:
    """Print how many were killed, how many of them while they wrote a file, and how many runs were finished."""
    torch.set_num_threads(1)
    draw = random.Random(0)
    whole, window = folder / "whole", 0.2  # seconds; finds by itself how long a run takes on this machine
    assert os.waitpid(start(work, whole), 0)[1] == 0, whole.with_suffix(".txt").read_text()
    want = finished_with(whole)
    killed = writing = finished = 0
    while killed < kills or (folder / f"run-{finished}").exists():
        run = folder / f"run-{finished}"
        child = start(work, run)
        if killed < kills:
            time.sleep(draw.uniform(0, window))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            window *= 1.1
            writing += any(run.rglob(".*"))
            continue
        window *= 0.8
        assert status == 0, f"a run did not go on after it was killed: {run.with_suffix('.txt').read_text()}"
        assert finished_with(run) == want
        finished += 1
    print(json.dumps({"killed": killed, "writing": writing, "finished": finished}))


if __name__ == "__main__":
    folder, kills, stages = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if stages:
        main(folder, kills, latent_writer(Path(stages[0])), contents)
    else:
        main(folder, kills, train, trained)
