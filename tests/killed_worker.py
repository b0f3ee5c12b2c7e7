"""Starts short runs, kills each at a random moment and goes on; started by test_killed.py.

Each run is a fork of this process, which has imported everything and holds no thread, so a start takes milliseconds.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # what the first optimizer of a process imports: with it here, no fork pays for it
from test_training import losses, tensors_of, toy, toy_config

from ldm.training import checkpoint

STEPS, KILLS = 24, 200


def start(run: Path) -> int:
    """Fork a run that goes on where the last one was killed; returns its process id."""
    child = os.fork()
    if child:
        return child
    said = os.open(run.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    resume = "latest" if checkpoint.latest(run / "checkpoints") else None
    toy(toy_config(run, steps=STEPS, checkpoint_every=2, trackers=(), resume=resume))
    os._exit(0)


def main(folder: Path) -> None:
    """Print how many were killed, how many of them while they wrote a checkpoint, and how many runs were finished."""
    torch.set_num_threads(1)
    draw = random.Random(0)
    whole, window = folder / "whole", 0.2  # seconds; finds by itself how long a run takes on this machine
    assert os.waitpid(start(whole), 0)[1] == 0
    want, want_losses = tensors_of(whole, STEPS), losses(whole)
    killed = writing = finished = 0
    while killed < KILLS or (folder / f"run-{finished}").exists():
        run = folder / f"run-{finished}"
        child = start(run)
        if killed < KILLS:
            time.sleep(draw.uniform(0, window))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            window *= 1.1
            writing += any((run / "checkpoints").glob(".writing-*"))
            continue
        window *= 0.8
        assert status == 0, f"a run did not go on after it was killed: {run.with_suffix('.txt').read_text()}"
        found = tensors_of(run, STEPS)
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
        assert losses(run) == want_losses
        finished += 1
    print(json.dumps({"killed": killed, "writing": writing, "finished": finished}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
