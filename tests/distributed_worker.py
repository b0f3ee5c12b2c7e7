"""Trains one tiny stage under torchrun; started by test_distributed.py.

`--harm WHAT RANK STEP` lets one process get a signal, a gradient that is not finite, or lost for a minute at a step.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import train

from ldm.training.loop import Trainer


def harm(patch: pytest.MonkeyPatch, processes: int, what: str, rank: int, step: int) -> None:
    after, player_step = Trainer._after_step, Trainer._player_step

    def after_step(self: Trainer) -> None:
        assert self.accelerator.num_processes == processes, "the processes did not find each other"
        if self.accelerator.process_index == rank and self.step == step:
            if what == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            elif what == "hang":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(60)
        after(self)

    def poisoned_step(self: Trainer, player, rounds) -> None:  # type: ignore[no-untyped-def]
        if what == "poison" and self.accelerator.process_index == rank and self.step + 1 == step:
            rounds = [(positions, {**batch, "image": batch["image"] * float("nan")}) for positions, batch in rounds]
        player_step(self, player, rounds)

    patch.setattr(Trainer, "_after_step", after_step)
    patch.setattr(Trainer, "_player_step", poisoned_step)


if __name__ == "__main__":
    stage, run, processes, *flags = sys.argv[1:]
    what, rank, step = "nothing", "0", "0"
    if "--harm" in flags:
        place = flags.index("--harm")
        what, rank, step = flags[place + 1 : place + 4]
        del flags[place : place + 4]
    with pytest.MonkeyPatch.context() as patch:
        harm(patch, int(processes), what, int(rank), int(step))
        try:
            train(stage, Path(run), *flags)
        except SystemExit as stopped:
            print(f"rank {os.environ['RANK']} ends with {stopped.code}", flush=True)
            raise
