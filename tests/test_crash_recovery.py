"""Runs that are killed at random moments lose nothing but the steps since their last checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("crash_worker.py")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")
def test_200_kills_change_no_bit(tmp_path: Path) -> None:
    """SIGKILL, also while a checkpoint is written: what goes on ends as the run that was never killed."""
    counts = kill(tmp_path, 200)
    assert counts["killed"] == 200 and counts["writing"] >= 1 and counts["finished"] >= 1, counts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")
def test_20_kills_while_latents_are_cached_change_no_byte(tiny_runs: Path, tmp_path: Path) -> None:
    """Also while a file is written: a second call ends with the files of one that was never killed, and no other."""
    counts = kill(tmp_path, 20, tiny_runs)
    assert counts["killed"] == 20 and counts["writing"] >= 1 and counts["finished"] >= 1, counts


def kill(*arguments: object) -> dict[str, int]:
    """What the worker counted."""
    paths = os.pathsep.join(str(p) for p in (WORKER.parent, WORKER.parents[1] / "scripts", WORKER.parents[1]))
    done = subprocess.run(
        [sys.executable, str(WORKER), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
