"""Trains one tiny stage under torchrun; started by test_distributed.py."""

import sys
from pathlib import Path

import torch.distributed
from accelerate import PartialState
from conftest import train

if __name__ == "__main__":
    stage, run, processes, *flags = sys.argv[1:]
    assert PartialState().num_processes == int(processes), "the processes did not find each other"
    train(stage, Path(run), *flags)
    torch.distributed.destroy_process_group()
