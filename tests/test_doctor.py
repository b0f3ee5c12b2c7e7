"""The doctor finds a sound run sound, and each thing that is broken."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import doctor
import pytest
import torch
from helpers import copy_stages_before, examine_tiny, tiny_flags, write_photos
from ranks import FSDP, Harm, launch, rank_environment

from ldm.data.batch_sampler import SampleKey
from ldm.planning import checks
from ldm.planning.checks import DoctorCheck
from ldm.stages import CLIPStage, DiffusionStage, VAEStage, split_stage
from ldm.training.config import TrainingConfig
from ldm.training.optimizer import learning_rate
from ldm.training.state import TrainingState

CHECKS = (
    "devices and precision",
    "gradients identical across ranks",
    "samples disjoint across ranks",
    "learning rate at the end",
    "resume is bit-exact",
    "loss decreases",
    "memory headroom",
    "images/s",
    "time to finish",
    "disk space",
)
environment = pytest.fixture(scope="module", autouse=True)(rank_environment)
LONG = ["--steps", "4000", "--validate-every", "1000", "--sample-every", "1000", "--checkpoint-every", "1000"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 12, caption="a photo of the old garden, number {}")


class Usage(NamedTuple):
    """What `shutil.disk_usage` gives."""

    total: int
    used: int
    free: int


def states(output: str) -> dict[str, str]:
    """ok or FAILED of each check in a report."""
    lines = [line for line in output.splitlines() if line.startswith(("ok ", "FAILED "))]
    return {line[8:42].strip(): line.split()[0] for line in lines}


def failing(output: str) -> list[str]:
    return [name for name, state in states(output).items() if state == "FAILED"]


@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_a_sound_run_is_found_sound_and_nothing_of_it_is_touched(
    stage: str, tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_stages_before(stage, tiny_runs, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    doctor.main([stage, *tiny_flags(stage, tmp_path / stage, *LONG)])
    output = capsys.readouterr().out
    assert tuple(states(output)) == CHECKS and failing(output) == [], output
    assert "20 steps of 8 samples over 1 rank, none repeated" in output
    assert "bit-equal: weights and averages" in output and "for 4,000 steps" in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [["--grad-accum-steps", "2"], FSDP], ids=["accumulate", "sharded"])
def test_two_processes_are_found_sound(flags: list[str], tmp_path: Path) -> None:
    output = launch("doctor vae", tmp_path / "vae", 2, [*LONG, *flags])
    assert tuple(states(output)) == CHECKS and failing(output) == [], output
    assert output.count("images/s   ") == 1, "the main process alone reports"
    assert "2 ranks on cpu" in output and "bit-equal on 2 ranks" in output
    assert ("gathered from their shards" in output) == ("--fsdp" in flags)
    assert "20 steps of 8 samples over 2 ranks, none repeated" in output
    assert not (tmp_path / ".vae-doctor").exists()


def test_a_tower_that_learns_nothing_is_found(photos: Path, tmp_path: Path) -> None:
    """Few images, a larger batch, and captions that are cut to one text: the loss stays at ln 16."""
    flags = [*LONG, "--data.source", str(photos), "--batch-size", "16", "--clip.context-length", "6"]
    flags += ["--learning-rate", "1e-3"]
    found = {check.name: check for check in examine_tiny("clip", tmp_path / "clip", *flags)}
    disjoint, loss = found["samples disjoint across ranks"], found["loss decreases"]
    assert not disjoint.ok and not loss.ok
    assert "of 9 training images" in disjoint.value and "none repeated" not in disjoint.value
    assert "--batch-size 8" in disjoint.fix
    assert "ignoring the input gives 2.7726" in loss.value and "cut to equal texts" in loss.fix


def test_two_processes_with_the_same_and_slow_data_or_other_gradients_are_found(tmp_path: Path) -> None:
    output = launch("doctor vae", tmp_path / "vae", 2, LONG, harm=Harm("twin", 0, 0), codes=[1, 1])
    assert failing(output) == ["samples disjoint across ranks", "images/s"], output
    assert "data are slower than training" in output, "the first process waits for the second alone"
    assert "80 repeated" in output and "launch with accelerate or torchrun" in output
    output = launch("doctor vae", tmp_path / "vae", 2, LONG, harm=Harm("apart", 1, 19), codes=[1, 1])
    assert "gradients identical across ranks" in failing(output) and "start all ranks with one launcher" in output


def test_what_is_broken_in_one_process_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is nearly full, a restore that is not exact, a learning rate that is no more."""
    restore = TrainingState.restore

    def inexact(state: TrainingState, path: Path) -> None:
        restore(state, path)
        with torch.no_grad():
            next(state.modules["vae"].parameters()).mul_(1 + 1e-6)

    monkeypatch.setattr(TrainingState, "restore", inexact)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(SystemExit, match="1"):
        doctor.main(
            ["vae", *tiny_flags("vae", tmp_path / "vae", *LONG, "--learning-rate", "1e-30"), "--warmup-steps", "5000"]
        )
    output = capsys.readouterr().out
    wrong = ["learning rate at the end", "resume is bit-exact", "loss decreases", "disk space"]
    assert failing(output) == wrong, output
    for remedy in (
        "--warmup-steps 200 or more --steps",
        "please report",
        "--warmup-steps 5, with which",
        "--keep-checkpoints 1",
    ):
        assert remedy in output
    assert not any(tmp_path.iterdir())


def test_a_learning_rate_that_ends_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.schedule(TrainingConfig(lr_schedule="cosine")).ok
    early = lambda config, step: learning_rate(config, 4 * step)  # noqa: E731  # stepped by each of 4 processes
    monkeypatch.setattr(checks, "learning_rate", early)
    check = checks.schedule(TrainingConfig(lr_schedule="linear"))
    assert not check.ok and "it is 0 from step 251 on" in check.fix


CONFIG = TrainingConfig(steps=1000, batch_size=4)
SECONDS: dict[str, Any] = {"step": 1.0, "validate": 1.0, "sample": 1.0, "save": 1.0, "model": 1.0}
TWO = [[[SampleKey(0, 0, 0), SampleKey(1, 0, 1)]], [[SampleKey(2, 0, 2), SampleKey(0, 1, 3)]]]
AGAIN = [
    [[SampleKey(0, 0, 0), SampleKey(1, 0, 1)]],
    [[SampleKey(0, 0, 2), SampleKey(1, 0, 3)]],
]  # a bucket of two images
JUDGED = [
    (
        checks.devices(["a cuda:0", "a cuda:1"], "GPU", "bfloat16", on_gpu=True, gpus=2),
        checks.devices(["a cuda:0", "a cuda:0"], "GPU", "bfloat16", on_gpu=True, gpus=2),
        "--num_processes",
    ),
    (
        checks.devices(["a cpu"], "cpu", "float32", on_gpu=False, gpus=0),
        checks.devices(["a cpu"], "cpu", "float32", on_gpu=False, gpus=1),
        "without --cpu",
    ),
    (
        checks.data_disjoint(TWO, batch_size=4, images=9),
        checks.data_disjoint([TWO[0], TWO[0]], batch_size=4, images=9),
        "launch with",
    ),
    (
        checks.data_disjoint(AGAIN, batch_size=4, images=4),
        checks.data_disjoint([AGAIN[0], AGAIN[0]], batch_size=4, images=4),
        "launch with",
    ),
    (
        checks.data_disjoint(AGAIN, batch_size=4, images=4),
        checks.data_disjoint(AGAIN, batch_size=4, images=3),
        "--batch-size 2, or more images",
    ),
    (
        checks.loss_decreases(5, [5, 4.6], CONFIG, step=200, chance=4.85),
        checks.loss_decreases(5, [4.8522, 4.8521], CONFIG, step=200, chance=4.85),
        "nothing is learned: are captions equal",
    ),
    (
        checks.loss_decreases(2, [2, 1.999], TrainingConfig(warmup_steps=5000), step=20, chance=2),
        checks.loss_decreases(2, [2, 1.999], TrainingConfig(warmup_steps=100), step=20, chance=2),
        "nothing is learned",
    ),
    (checks.resume_exact(1e-3, on_gpu=True), checks.resume_exact(1e-3, on_gpu=False), "report it"),
    (checks.resume_exact(0.0, on_gpu=False), checks.resume_exact(1.0, on_gpu=True), "report it"),
    (
        checks.loss_decreases(1, [2, 3, 1], CONFIG, step=200),
        checks.loss_decreases(2, [2, 1, 3], CONFIG, step=200),
        "lower --learning",
    ),
    (
        checks.loss_decreases(2, [2, 1], CONFIG, step=20),
        checks.loss_decreases(2, [2, float("nan")], CONFIG, step=20),
        "--warmup-steps 5",
    ),
    (
        checks.loss_decreases(2, [2, 1], CONFIG, step=20),
        checks.loss_decreases(0.9, [2, 1], CONFIG, step=20),
        "lower --learning-rate",
    ),
    (
        checks.memory(89, 100, checks.STEP, 2, on_gpu=True),
        checks.memory(91, 100, checks.STEP, 2, on_gpu=True),
        "--grad-accum-steps 4 (smaller micro-batches), --gradient-checkpointing",
    ),
    (
        checks.memory(89, 100, "validation", 1, on_gpu=True),
        checks.memory(91, 100, "validation", 1, on_gpu=True),
        "a smaller network",
    ),
    (checks.throughput(1.0, 0.4, CONFIG), checks.throughput(1.0, 0.6, CONFIG), "--num-workers 2"),
    (
        checks.time_to_finish(SECONDS, CONFIG),
        checks.time_to_finish(SECONDS | {"sample": 1e3}, CONFIG),
        "--sample-every",
    ),
    (checks.disk(100, 50, 350, CONFIG), checks.disk(100, 50, 349, CONFIG), "--keep-checkpoints 1"),
]


@pytest.mark.parametrize(
    ("method", "message"),
    [("loss", "a step does not fit.*: --grad-accum-steps 2"), ("validate", "validation does not fit.*smaller network")],
)
def test_what_exceeds_the_memory_is_named(
    method: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exceed(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(VAEStage, method, exceed)
    with pytest.raises(ValueError, match=f"memory: {message}"):
        examine_tiny("vae", tmp_path / "vae")


def test_samples_of_few_images_are_counted_as_repeated() -> None:
    assert "1 steps of 4 samples over 2 ranks, 2 repeated" in checks.data_disjoint(AGAIN, batch_size=4, images=4).value
    assert "2 repeated, of 2 training images" in checks.data_disjoint(AGAIN, batch_size=4, images=2).value


@pytest.mark.parametrize(("well", "wrong", "remedy"), JUDGED, ids=lambda value: getattr(value, "name", ""))
def test_what_numbers_say(well: DoctorCheck, wrong: DoctorCheck, remedy: str) -> None:
    assert well.ok and well.line().startswith("ok ") and "\n" not in well.line()
    assert not wrong.ok and wrong.line().startswith("FAILED ") and remedy in wrong.line().splitlines()[1]


def test_the_stage_is_named_or_follows_from_the_file() -> None:
    assert split_stage(["vae", "--steps", "9"]) == (VAEStage, ["--steps", "9"])
    assert split_stage(["--config", "configs/emoji/clip.yaml"])[0] == CLIPStage
    assert split_stage(["--config=configs/shapes/ddpm_pixels.yaml"])[0] == DiffusionStage


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--steps must be at least 4 for the doctor, not 3"):
        examine_tiny("vae", tmp_path / "vae", "--steps", "3")
