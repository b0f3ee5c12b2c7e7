"""Two processes train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import STAGES, losses, tensors_of

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(stage: str, tiny_runs: Path, tmp_path: Path) -> None:
    """Same losses and weights to 1e-5 for all three stages, with accumulation on top where the loss allows it."""
    for other in STAGES[: STAGES.index(stage)]:
        (tmp_path / other).symlink_to(tiny_runs / other)
    flags = [] if stage == "clip" else ["--accumulate", "2"]
    launch(stage, tmp_path / stage, 2, flags)
    want, found = losses(tiny_runs / stage), losses(tmp_path / stage)
    assert max(abs(found[step] / want[step] - 1) for step in want) < 1e-5
    one, two = tensors_of(tiny_runs / stage, 4), tensors_of(tmp_path / stage, 4)
    assert one.keys() == two.keys()
    # Adam divides by the root of tiny second moments, so single weights may part more than the losses do.
    relative = [
        (one[n] - two[n]).norm() / one[n].norm().clamp_min(1e-3) for n in one if n.startswith(f"{STAGE_MODULE[stage]}/")
    ]
    assert max(relative) < 1e-3


STAGE_MODULE = {"clip": "clip", "vae": "vae", "ldm": "unet"}


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
