"""Runs that are killed at random moments lose nothing but the steps since their last checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("killed_worker.py")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")
def test_200_kills_change_no_bit(tmp_path: Path) -> None:
    """SIGKILL, also while a checkpoint is written: what goes on ends as the run that was never killed."""
    paths = os.pathsep.join(str(p) for p in (WORKER.parent, WORKER.parents[1] / "scripts"))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] == 200 and told["writing"] >= 1 and told["finished"] >= 1, told
