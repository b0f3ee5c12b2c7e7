"""Two processes train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import STAGES, copy_stages_before, losses, tensors_of

from ldm.data import shapes
from ldm.data.images import split_by_name

WORKER = Path(__file__).with_name("distributed_worker.py")
MODULE = {"clip": "clip", "vae": "vae", "ldm": "unet"}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(stage: str, tiny_runs: Path, tmp_path: Path) -> None:
    """Same losses to 1e-5 and weights for all three stages, with accumulation on top where the loss allows it."""
    copy_stages_before(stage, tiny_runs, tmp_path)
    launch(stage, tmp_path / stage, 2, [] if stage == "clip" else ["--accumulate", "2"])
    want, found = losses(tiny_runs / stage), losses(tmp_path / stage)
    assert max(abs(found[step] / want[step] - 1) for step in want) < 1e-5
    one, two = tensors_of(tiny_runs / stage, 4), tensors_of(tmp_path / stage, 4)
    assert one.keys() == two.keys()
    # Weights whose gradient is zero but for rounding (the bias of attention's keys) move by Adam's whole step, so the
    # weights are compared as one vector and not one by one.
    ours = [name for name in one if name.startswith(f"{MODULE[stage]}/")]
    ones, twos = (torch.cat([tensors[name].flatten() for name in ours]) for tensors in (one, two))
    assert ((ones - twos).norm() / ones.norm()).item() < 1e-4


def test_images_that_one_process_can_not_read_are_counted_by_all(tmp_path: Path) -> None:
    """Each process meets some of them; the list at the end, and the share that is allowed, are of all."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        shapes.render(shapes.scenes("train")[number], 16, seed=number).save(photos / f"{number:02}.png")
    for number in (7, 8, 21, 29):
        (photos / f"{number:02}.png").write_bytes(b"no image")
    read = ["--data.source", str(photos), "--steps", "10", "--log-every", "5"]
    told = launch("clip", tmp_path / "a", 2, [*read, "--data.max-unreadable", "0.5"])
    bad = [index for index in split_by_name([f"{i:02}.png" for i in range(40)], "train") if index in (7, 8, 21, 29)]
    assert f"train split: {len(bad)} images could not be read" in told and len(bad) > 2
    assert all(f"{index:02}.png: no PNG" in told for index in bad)
    told = launch("clip", tmp_path / "b", 2, [*read, "--data.max-unreadable", "0.06"], status=1)
    assert "above the 6.0% that data.max_unreadable allows" in told


def launch(stage: str, run: Path, processes: int, flags: list[str], *, status: int = 0) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join(str(p) for p in (WORKER.parent, WORKER.parents[1] / "scripts"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, str(WORKER), stage, str(run), str(processes), *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr
