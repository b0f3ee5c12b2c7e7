"""Measure how long waiting threads should spin: results/spinning.json, which docs/training.md builds on.

    python benchmarks/spinning.py

A training step of configs/shapes/vae.yaml under several values of GOMP_SPINCOUNT, on an idle machine and beside one
busy process. One training runs for each value; they take turns, so what else the machine does reaches all of them.
Ratios are to a step on the idle machine with the library's own value; each is the median of the rounds.
"""

import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from commit import commit

from ldm.cli import exit_on_user_error
from ldm.config import read_yaml
from ldm.stages.vae import TrainVAEConfig, VAEStage
from ldm.training.trainer import Trainer, fit, train

ROOT = Path(__file__).parents[1]
OWN = "300000"  # of libgomp, in gcc 13: where nothing is set
VALUES = ("0", "1000", "3000", "10000", OWN)
ROUNDS, STEPS = 11, 15
RESULT = "seconds of a step: "
FAR = 10**6  # steps


def work(run: Path) -> None:
    """Train, but before each block of steps wait for a line on stdin; print the median seconds of a step after it."""
    values = read_yaml(ROOT / "configs/shapes/vae.yaml")
    never = {name: FAR for name in ("steps", "validate_every", "sample_every", "checkpoint_every")}
    times: list[float] = []

    def on_step(trainer: Trainer) -> None:
        times.append(time.perf_counter())
        if len(times) == STEPS + 1:
            seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
            print(f"{RESULT}{seconds}", flush=True)
            if not sys.stdin.readline():
                raise SystemExit
            times.clear()

    train(VAEStage, TrainVAEConfig.from_dict({**values, **never, "run": run}, source="vae.yaml"),
          fit=partial(fit, on_step=on_step))  # fmt: skip


@contextmanager
def training(value: str) -> Iterator[subprocess.Popen[str]]:
    """A process that trains under a value, when it has taken its first block of steps."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, __file__, f"{folder}/run"],
            env={**os.environ, "GOMP_SPINCOUNT": value},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            read_seconds(process)
            yield process
        finally:
            process.kill()
            process.wait()


def read_seconds(process: subprocess.Popen[str]) -> float:
    """What a training prints after a block of steps."""
    assert process.stdout is not None
    return next(float(line.removeprefix(RESULT)) for line in process.stdout if line.startswith(RESULT))


def take_block(process: subprocess.Popen[str]) -> float:
    """Let a training take a block of steps; returns the median seconds of a step."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return read_seconds(process)


@contextmanager
def busy_process() -> Iterator[None]:
    """One process that takes all the time of a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure() -> dict[str, dict[str, float]]:
    """For each value the median ratios, and the median seconds."""
    idle: dict[str, list[float]] = {value: [] for value in VALUES}
    busy: dict[str, list[float]] = {value: [] for value in VALUES}
    with ExitStack() as stack:
        trainings = {value: stack.enter_context(training(value)) for value in VALUES}
        for _ in range(ROUNDS):
            for value, process in trainings.items():
                idle[value].append(take_block(process))
                with busy_process():
                    busy[value].append(take_block(process))
    middle = statistics.median
    return {
        value: {
            "idle": round(middle(a / b for a, b in zip(idle[value], idle[OWN], strict=True)), 3),
            "busy": round(middle(a / b for a, b in zip(busy[value], idle[OWN], strict=True)), 3),
            "idle_seconds": round(middle(idle[value]), 4),
            "busy_seconds": round(middle(busy[value]), 4),
        }
        for value in VALUES
    }


def main() -> None:
    """Measure, and write results/spinning.json."""
    if len(sys.argv) > 1:  # a training of its own
        with exit_on_user_error():
            work(Path(sys.argv[1]))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends all processes
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit(),
    }
    path = ROOT / "benchmarks/results/spinning.json"
    path.write_text(json.dumps({**machine, "rounds": ROUNDS, "values": measure()}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
