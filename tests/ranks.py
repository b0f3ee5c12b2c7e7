"""Starts several ranks that train a tiny stage, examine one, cache latents or train a toy; also run under torchrun."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cache_latents
import datasets
import pytest
from accelerate import PartialState
from helpers import OnStep, examine_tiny, toy, toy_config, toy_gan, train

from ldm.data.batch_sampler import EpochBatchSampler
from ldm.training.stage import Batch, Networks, Stage
from ldm.training.trainer import Trainer

FSDP = ["--fsdp", "--gradient-checkpointing"]
FORKS = multiprocessing.get_context("forkserver")  # its processes have all imports from the start
FORKS.set_forkserver_preload(["ranks"])
ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join(str(path) for path in (ROOT / "tests", ROOT / "scripts", ROOT))


class Harm(NamedTuple):
    """What befalls one rank at a step.

    It gets a signal, a gradient that is not finite ("poison"), or that is not what the others have ("apart"), a
    minute's sleep ("hang"), a disk that takes no file of more than a kilobyte ("full"), or, from the first step on,
    late, the samples of rank 0 ("twin").
    """

    what: str
    rank: int
    step: int


class Harmed:
    """A stage that harms its rank."""

    def __init__(self, stage: Stage, harm: Harm | None) -> None:
        self.stage, self.harm = stage, harm
        self.rank = PartialState().process_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def open_data(self, accelerator: Any) -> None:
        """That of the stage, or the samples of rank 0."""
        self.stage.open_data(accelerator)
        if self.harm and self.harm.what == "twin":
            self.data = TwinData(self.stage.data, self.rank)

    def loss(self, name: str, networks: Networks, batch: Batch, rng: Any) -> Any:
        """That of the stage; poisoned, it is NaN."""
        terms = self.stage.loss(name, networks, batch, rng)
        if self.harm == ("poison", self.rank, rng.step + 1):
            terms["loss"] = terms["loss"] * float("nan")
        return terms


class TwinData:
    """Data of rank 0 for all ranks, of which the others are slow."""

    def __init__(self, data: Any, rank: int) -> None:
        self.data = data
        self.delay = 0.2 if rank else 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> Any:
        time.sleep(self.delay if key.position == 0 else 0)
        return self.data[key]

    def make_batch_sampler(self, **cut: Any) -> EpochBatchSampler:
        """That of rank 0."""
        sampler: EpochBatchSampler = self.data.make_batch_sampler(**{**cut, "rank": 0})
        return sampler


def harming(harm: Harm | None, ranks: int) -> OnStep:
    """Does to this rank what happens after a step."""

    def on_step(trainer: Trainer) -> None:
        assert trainer.accelerator.num_processes == ranks, "the ranks did not find each other"
        if harm is None or (harm.rank, harm.step) != (trainer.accelerator.process_index, trainer.state.step):
            return
        if harm.what == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif harm.what == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(60)
        elif harm.what == "full":
            fill_disk()
        elif harm.what == "apart":
            for module in trainer.state.modules.values():
                next(module.parameters()).grad.add_(1e-3)  # type: ignore[union-attr]

    return on_step


def work(ranks: int, job: str, run_dir: Path, flags: list[str], harm: Harm | None = None) -> None:
    """Do a job in the process group that the environment names.

    `job`: a stage, "doctor STAGE", "cache_latents", or "gan", whose flags are NAME=VALUE.
    """
    harms: dict[str, Any] = {"on_step": harming(harm, ranks), "wrap": lambda stage: Harmed(stage, harm)}
    if job == "cache_latents":
        if harm == ("full", int(os.environ["RANK"]), 0):
            fill_disk()
        cache_latents.main(["--out", str(run_dir), *flags])
        assert PartialState().num_processes == ranks, "the ranks did not find each other"
    elif job == "gan":
        values = dict(flag.split("=") for flag in flags)
        result = toy(toy_config(run_dir, trackers=(), **values), stage=toy_gan, on_step=harms["on_step"])
        raise SystemExit(result.exit_status)
    elif job.startswith("doctor "):
        checks = examine_tiny(job.removeprefix("doctor "), run_dir, *flags, **harms)
        if os.environ["RANK"] == "0":
            print("\n".join(check.line() for check in checks))
        raise SystemExit(int(not all(check.ok for check in checks)))
    else:
        train(job, run_dir, *flags, **harms)


def fill_disk() -> None:
    """Let the system refuse to write more than a kilobyte to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def work_as(rank: int, port: int, output: Path, ranks: int, environment: dict[str, str], *job: Any) -> None:
    """`work` as the given rank of a group that meets at a port of this machine; what it prints goes to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), **environment}
    datasets.config.HF_DATASETS_CACHE = environment.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    work(ranks, *job)


def launch(
    job: str,
    run_dir: Path,
    ranks: int,
    flags: Sequence[str],
    *,
    harm: Harm | None = None,
    codes: Sequence[int] | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """What several ranks print that do a job together; their exit codes must be the given ones, or 0.

    When one fails, the others get five seconds to follow before SIGTERM, as a launcher would send.
    """
    port, outputs = free_port(), [run_dir.parent / f"{run_dir.name}-{rank}.txt" for rank in range(ranks)]
    job_arguments = (job, run_dir, list(flags), harm)
    group = [
        FORKS.Process(target=work_as, args=(rank, port, outputs[rank], ranks, environment or {}, *job_arguments))
        for rank in range(ranks)
    ]
    for process in group:
        process.start()
    while all(process.exitcode in (None, 0) for process in group) and any(process.is_alive() for process in group):
        time.sleep(0.05)
    for process in group:
        process.join(5)
        process.terminate()
        process.join()
    output = "".join(file.read_text() for file in outputs)
    assert [process.exitcode for process in group] == list(codes or [0] * ranks), output[-3000:]
    return output


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def rank_environment() -> Iterator[None]:
    """What ranks find when they start: for a module's autouse fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


if __name__ == "__main__":
    job, run_dir, ranks = sys.argv[1:]
    work(int(ranks), job, Path(run_dir), [])
