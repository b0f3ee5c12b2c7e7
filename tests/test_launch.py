"""Launchers: which ranks there are, who writes a folder, and a launcher that waits."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cache_latents
import psutil
import pytest
import torch
from accelerate import Accelerator, PartialState
from helpers import examine_tiny, latent_flags, train

from ldm.stages import STAGES
from ldm.training import distributed
from ldm.training.distributed import TORCH_VARIABLES, launcher_environment, read_ranks
from ldm.training.lock import only_writer

ROOT = Path(__file__).parents[1]
RANK = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    open(f"{sys.argv[1]}/saved-{os.environ.get('RANK', 0)}", "w").close()
    sys.exit(f"error: one line of {number}" if sys.argv[2] == "say" else 128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
open(f"{sys.argv[1]}/ready-{os.environ.get('RANK', 0)}", "w").close()
time.sleep(60)
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of a launcher is set; what the code sets is restored."""
    names = [name for names in distributed.LAUNCHER_VARIABLES for name in names]
    for name in (*names, "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def set_all(patch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set environment variables."""
    for name, value in variables.items():
        patch.setenv(name, value)


MPI = {"SIZE": "4", "RANK": "1", "LOCAL_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        {f"OMPI_COMM_WORLD_{name}": value for name, value in MPI.items()},
        {f"MV2_COMM_WORLD_{name}": value for name, value in MPI.items()},
        {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "1"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4"},
    ],
    ids=["torchrun", "openmpi", "mvapich", "mpich", "srun"],
)
def test_the_ranks_of_any_launcher_are_found(variables: dict[str, str], alone: pytest.MonkeyPatch) -> None:
    set_all(alone, **variables)
    assert read_ranks() == 4
    assert [os.environ[name] for name in TORCH_VARIABLES] == ["1", "4", "1", "4"]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_one_process_needs_no_launcher(alone: pytest.MonkeyPatch) -> None:
    assert read_ranks() == 1
    set_all(alone, SLURM_NTASKS="8", SLURM_PROCID="0")  # of a batch script, which runs once
    assert read_ranks() == 1
    set_all(alone, TORCHELASTIC_RUN_ID="x", WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1")
    assert read_ranks() == 1


def test_ranks_that_cannot_meet_are_refused(alone: pytest.MonkeyPatch) -> None:
    set_all(alone, SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1", SLURM_STEP_TASKS_PER_NODE="2(x2)")
    with pytest.raises(ValueError, match="MASTER_ADDR is not set: .* host name of rank 0 for all 4 ranks"):
        read_ranks()
    set_all(alone, WORLD_SIZE="2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK is not set: .*scripts/launch.py"):
        read_ranks()


def test_accelerate_that_starts_one_of_several_is_refused(alone: pytest.MonkeyPatch) -> None:
    """It sets the address at which several would meet; a person may have set it, too, for all programs."""
    set_all(alone, ACCELERATE_DYNAMO_BACKEND="no", MASTER_ADDR="127.0.0.1")
    alone.setattr(distributed, "launcher_environment", lambda: {"MASTER_ADDR": "127.0.0.1"})
    assert read_ranks() == 1
    alone.setattr(distributed, "launcher_environment", dict)
    with pytest.raises(ValueError, match="--num_processes: .* one process, .*launch.py --num_processes N"):
        read_ranks()


def test_the_environment_of_the_launcher_is_what_it_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setenv("LDM_SET_LATER", "1")
    assert launcher_environment() == psutil.Process().environ() and "LDM_SET_LATER" not in launcher_environment()
    monkeypatch.setattr(os, "getppid", lambda: 2**22 + 1)
    assert launcher_environment() == {}


def test_a_number_of_threads_that_a_person_set_stays(alone: pytest.MonkeyPatch) -> None:
    """`accelerate launch` sets 1 itself where nothing is set."""
    threads: list[int] = []
    alone.setattr(torch, "set_num_threads", threads.append)
    set_all(alone, ACCELERATE_DYNAMO_BACKEND="no", OMP_NUM_THREADS="1")
    alone.setattr(distributed, "launcher_environment", lambda: {"OMP_NUM_THREADS": "1"})
    distributed.restore_num_threads()
    alone.setattr(distributed, "launcher_environment", dict)
    for flag in ("--num_cpu_threads_per_process", "--num-cpu-threads-per-process=1"):
        alone.setattr(distributed, "launcher_command", lambda flag=flag: ["accelerate", "launch", flag, "1"])
        distributed.restore_num_threads()
    assert threads == []
    alone.setattr(distributed, "launcher_command", lambda: ["accelerate", "launch", "--cpu"])
    distributed.restore_num_threads()
    assert len(threads) == 1


@pytest.mark.parametrize(("error", "parted"), [(None, 1), (ValueError("bad"), 1), (RuntimeError("of this rank"), 0)])
def test_ranks_part_after_what_happens_to_all(
    error: Exception | None, parted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *_: calls.append(None))
    with suppress(ValueError, RuntimeError), distributed.disconnect_at_end(Accelerator()):
        if error:
            raise error
    assert len(calls) == parted


def test_a_refused_training_parts_the_ranks(tiny_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *_: calls.append(None))
    with pytest.raises(SystemExit, match="already has step-000004"):
        train("vae", tiny_runs / "vae")
    assert len(calls) == 1


# One writer.


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    with only_writer(tmp_path, Accelerator()):
        with pytest.raises(SystemExit, match=f"{tmp_path} is written by process {os.getpid()} on .*: wait or stop"):
            train("vae", tmp_path)
        assert not (tmp_path / "config.yaml").exists()
    train("vae", tmp_path, "--steps", "1")
    assert not list(tmp_path.glob(".lock*"))


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    """Neither its own nor those above it, but what was there stays."""
    resume = ["--resume", "latest", "--config", str(STAGES["vae"].default)]
    with pytest.raises(SystemExit, match="has no checkpoint to resume from"):
        train("vae", tmp_path / "runs/mine/vae", *resume)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file/vae could not be written .*pass a writable folder"):
        train("vae", tmp_path / "file/vae")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_doctor_leaves_the_folder_of_another_one(tmp_path: Path) -> None:
    other = tmp_path / ".vae-doctor"
    with only_writer(other, Accelerator()):
        (other / "log.jsonl").touch()
        with pytest.raises(ValueError, match=rf"{other} is written by process {os.getpid()}"):
            examine_tiny("vae", tmp_path / "vae")
        assert (other / "log.jsonl").exists() and (other / ".lock").exists()
    examine_tiny("vae", tmp_path / "runs/vae")
    assert [path.name for path in tmp_path.iterdir()] == [".vae-doctor"]


def test_latents_have_one_writer(tiny_runs: Path, tmp_path: Path) -> None:
    with (
        only_writer(tmp_path, Accelerator()),
        pytest.raises(SystemExit, match="is written by process .*another folder"),
    ):
        cache_latents.main(["--out", str(tmp_path), *latent_flags(tiny_runs)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a run")
def test_a_writer_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    if not (child := os.fork()):
        with only_writer(tmp_path, Accelerator()):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock-holder").is_file()
    with only_writer(tmp_path, Accelerator()):
        pass


# Our own launcher.


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_the_launcher_waits_for_a_save_and_ends_as_the_run_does(ranks: int, number: int, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the launcher alone."""
    (tmp_path / "rank.py").write_text(RANK)
    count = [] if ranks == 1 else ["--num_processes", str(ranks), "--main_process_port", "0"]
    command = ["scripts/launch.py", "--cpu", *count, str(tmp_path / "rank.py"), str(tmp_path)]
    words = ["say"] if ranks == 1 else ["exit"]
    launcher = subprocess.Popen(
        [sys.executable, *command, *words], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(ranks)):
        assert time.monotonic() < end and launcher.poll() is None
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(launcher.pid, number)
    assert launcher.stderr is not None
    shown = launcher.stderr.read()
    assert launcher.wait() == (1 if ranks == 1 else 128 + number)
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(ranks))
    assert "Traceback" not in shown and (ranks > 1 or shown.endswith(f"error: one line of {number}\n"))
