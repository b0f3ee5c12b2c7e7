"""Two processes train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import STAGES, copy_stages_before, losses, tensors_of

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


def launch(stage: str, run: Path, processes: int, flags: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join(str(p) for p in (WORKER.parent, WORKER.parents[1] / "scripts"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, str(WORKER), stage, str(run), str(processes), *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
