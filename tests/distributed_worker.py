"""Trains one tiny stage, or encodes, as one of several processes; started by test_distributed.py, or under torchrun."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import encode
import pytest
import train_vae  # noqa: F401
from accelerate import PartialState
from helpers import train

from ldm.data.batch_sampler import EpochBatchSampler
from ldm.data.loader import Batches, batch_sampler_for_rank, make_loader
from ldm.planning import doctor
from ldm.training.trainer import Trainer

Script = Callable[..., object]  # conftest's `train` or `examine`


class Harm(NamedTuple):
    """What befalls one process at a step.

    It gets a signal, a gradient that is not finite ("poison"), or that is not what the others have ("apart"), a
    minute's sleep ("hang"), a disk that takes no file of more than a kilobyte ("full"), or, from the first step on,
    late, the samples of the first process ("twin").
    """

    what: str
    rank: int
    step: int


def work(
    processes: int, stage: str, run: Path, flags: list[str], harm: Harm | None = None, script: Script = train
) -> None:
    """Train, look at a training, or encode to the folder `run`, in the process group that the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        after, player_step = Trainer._after_step, Trainer._optimizer_step

        def befalls(trainer: Trainer, what: str, step: int) -> bool:
            assert trainer.accelerator.num_processes == processes, "the processes did not find each other"
            return harm == (what, trainer.accelerator.process_index, step)

        def after_step(trainer: Trainer) -> None:
            if befalls(trainer, "signal", trainer.step):
                os.kill(os.getpid(), signal.SIGUSR1)
            elif befalls(trainer, "hang", trainer.step):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(60)
            elif befalls(trainer, "full", trainer.step):
                fill_disk()
            after(trainer)

        def poisoned_step(trainer: Trainer, player, rounds) -> None:  # type: ignore[no-untyped-def]
            if befalls(trainer, "poison", trainer.step + 1):
                rounds = [(positions, {**batch, "image": batch["image"] * float("nan")}) for positions, batch in rounds]
            player_step(trainer, player, rounds)
            if befalls(trainer, "apart", trainer.step + 1):
                next(trainer.modules[player.name].parameters()).grad.add_(1e-3)

        def twin(config, accelerator, stage: Any, *, start: int) -> EpochBatchSampler:  # type: ignore[no-untyped-def]
            rank = 0 if harm and harm.what == "twin" else accelerator.process_index
            first = SimpleNamespace(process_index=rank, num_processes=processes)
            return batch_sampler_for_rank(config, first, stage, start=start)  # type: ignore[arg-type]

        patch.setattr(Trainer, "_after_step", after_step)
        patch.setattr(Trainer, "_player_step", poisoned_step)

        def late(config, accelerator, *more: Any) -> Batches:  # type: ignore[no-untyped-def]
            for batch in make_loader(config, accelerator, *more):
                time.sleep(0.2 if harm and harm.what == "twin" and accelerator.process_index else 0)
                yield batch

        patch.setattr(doctor, "order_of", twin)
        patch.setattr(doctor, "batches_of", late)
        if stage == "encode":
            if harm == ("full", int(os.environ["RANK"]), 0):
                fill_disk()
            encode.main(["--out", str(run), *flags])
            assert PartialState().num_processes == processes, "the processes did not find each other"
        else:
            script(stage, run, *flags)


def fill_disk() -> None:
    """Let the system refuse to write more than a kilobyte to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def work_as(rank: int, port: int, said: Path, processes: int, *more) -> None:  # type: ignore[no-untyped-def]
    """`work` as the given rank of a group that meets at a port of this machine; what it says goes to a file."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    work(processes, *more)


if __name__ == "__main__":
    stage, run, processes = sys.argv[1:]
    work(int(processes), stage, Path(run), [])
