"""Trains one tiny stage under torchrun; started by test_distributed.py."""

import sys
from pathlib import Path

from accelerate import Accelerator
from conftest import train

if __name__ == "__main__":
    stage, run, processes, *flags = sys.argv[1:]
    assert Accelerator().num_processes == int(processes), "the processes did not find each other"
    train(stage, Path(run), *flags)
