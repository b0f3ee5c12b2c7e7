"""The loop's promises: resuming, accumulating, stopping, failing."""

import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import (
    STAGE_NAMES,
    OnStep,
    Toy,
    ToyData,
    assert_same,
    copy_stages_before,
    full_disk,
    losses,
    signal_at,
    tensors_of,
    toy,
    toy_config,
    train,
)
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ldm.data.batch_sampler import EpochBatchSampler, SampleKey
from ldm.data.sources.base import ShardReadError
from ldm.io.tensors import save_weights
from ldm.ranks import Ranks
from ldm.rng import StepRNG
from ldm.training import checkpoint, distributed
from ldm.training.config import TrainingConfig
from ldm.training.distributed import make_accelerator
from ldm.training.ema import EMA
from ldm.training.logger import RunLogger
from ldm.training.optimizer import gradient_norm, learning_rate, step_clipped
from ldm.training.stage import Trainable
from ldm.training.trainer import FitResult, Trainer


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_resuming_twice_in_mid_epoch_changes_no_bit(stage: str, tiny_runs: Path, tmp_path: Path) -> None:
    """Stopped after 1 and after 3 of 4 steps, and resumed, against the run that was never stopped."""
    run = tmp_path / stage
    copy_stages_before(stage, tiny_runs, tmp_path)
    for stop in (1, 3):
        with pytest.raises(SystemExit) as stopped:
            train(stage, run, *(["--resume", "latest"] if stop > 1 else []), on_step=signal_at(stop))
        assert stopped.value.code == 128 + signal.SIGTERM
    train(stage, run, "--resume", "latest")
    assert_same(tensors_of(tiny_runs / stage, 4), tensors_of(run, 4))
    assert losses(run) == losses(tiny_runs / stage)


def test_the_log_of_a_killed_run_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    toy(toy_config(tmp_path / "whole"))
    toy(toy_config(tmp_path / "killed", steps=8))
    shutil.rmtree(tmp_path / "killed/checkpoints/step-000008")
    with (tmp_path / "killed/log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    toy(toy_config(tmp_path / "killed", resume="latest"))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1]


def test_a_run_whose_launcher_is_gone_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` hands no signal on; without it, a parent that changes means nothing."""
    parents = iter(range(100))
    monkeypatch.setattr(os, "getppid", lambda: max(0, next(parents) - 2))
    assert toy(toy_config(tmp_path / "alone")).exit_status == 0
    for launcher in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        parents = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setenv(launcher, "no")
            patch.delenv("OMP_NUM_THREADS", raising=False)
            result = toy(toy_config(tmp_path / launcher, checkpoint_every=8))
        assert result == FitResult(3, None, signal.SIGTERM) and result.exit_status == 128 + signal.SIGTERM
        assert [path.name for path in (tmp_path / launcher / "checkpoints").iterdir()] == ["step-000003"]
        assert (tmp_path / launcher / "STOPPED").read_text() == "step 3\n"


def test_a_signal_to_the_group_spares_the_loading_processes(tmp_path: Path) -> None:
    """The run, which such a signal asks to stop, needs them until the step is done."""
    group = os.getpgrp()

    class Detached(ToyData):
        def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
            if os.getpgrp() == group:
                raise ValueError("it would get the signal")
            return super().__getitem__(key)

    toy(toy_config(tmp_path, num_workers=1), data=Detached())


def test_other_settings_at_a_resume_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(toy_config(tmp_path, steps=6))
    assert f"configuration: {tmp_path}/config.yaml" in capsys.readouterr().out
    toy(toy_config(tmp_path, learning_rate=0.2, resume="latest"))
    assert "config changed since the checkpoint: steps: 6 -> 8; learning_rate: 0.1 -> 0.2\n" in capsys.readouterr().out
    toy(toy_config(tmp_path, learning_rate=0.2, resume="latest"))
    assert "config changed" not in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("")  # cut off when the power went
    toy(toy_config(tmp_path, resume="latest"))
    assert (
        "config.yaml: expected `key: value` lines, found NoneType; what changed is unknown" in capsys.readouterr().out
    )


def test_the_loss_scale_of_fp16_is_resumed(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    toy(toy_config(whole, keep_checkpoints=3), fp16=True)
    shutil.copytree(whole / "checkpoints/step-000003", run / "checkpoints/step-000003")
    toy(toy_config(run, resume="latest"), fp16=True)
    scales = [json.loads((r / "checkpoints/step-000008/progress.json").read_text())["scaler"] for r in (whole, run)]
    assert scales[0] == scales[1] and scales[0]["scale"] == 4.0 * 2**4  # doubled after every second step
    assert_same(tensors_of(whole, 8), tensors_of(run, 8))


def test_a_loss_of_another_process_that_is_not_finite_counts_with_fp16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "reduce", lambda self, tensor, how: tensor + (float("nan") if how == "sum" else 0))
    toy(toy_config(tmp_path, steps=1), fp16=True)
    assert "toy: non-finite gradient, skipped step 1 (1 skipped so far)" in capsys.readouterr().out


def test_the_frozen_networks_are_not_changed_by_training(tiny_runs: Path, tmp_path: Path) -> None:
    """In memory, after the last step; and no optimizer holds a tensor of theirs."""
    copy_stages_before("ldm", tiny_runs, tmp_path)
    trainers: list[Trainer] = []
    train("ldm", tmp_path / "ldm", on_step=trainers.append)
    frozen, optimizers = trainers[0].stage.frozen, trainers[0].state.optimizers
    weights = load_file(tiny_runs / "clip/model/open_clip_model.safetensors")
    tower = frozen["text"].encoders[0].tower.state_dict()  # type: ignore[union-attr, operator]
    assert_same({name: weights[name] for name in tower}, tower)
    assert_same(load_file(tiny_runs / "vae/model/vae.safetensors"), frozen["vae"].state_dict())
    trained = {id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]}
    held = [p for module in frozen.values() for p in module.parameters()]
    assert len(optimizers) == 1 and trained and not trained & {id(p) for p in held}
    assert not any(p.requires_grad or p.grad is not None for p in held)
    assert not any(module.training for part in frozen.values() for module in part.modules())


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_accumulation_equals_the_large_batch(stage: str, tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before(stage, tiny_runs, tmp_path)
    train(stage, tmp_path / stage, "--grad-accum-steps", "4")
    want, found = losses(tiny_runs / stage), losses(tmp_path / stage)
    assert found.keys() == want.keys()
    assert max(abs(found[step] / want[step] - 1) for step in want) < 1e-5


def test_clip_refuses_accumulation_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="contrastive loss compares all images of a batch"):
        train("clip", tmp_path / "clip", "--grad-accum-steps", "2")


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    message = (
        r"non-finite loss or gradient at steps 5-6 .*; the last good checkpoint is .*step-000003: try a lower --learn"
    )
    with pytest.raises(ValueError, match=message):
        toy(toy_config(tmp_path, max_nonfinite_steps=1), poison=range(5, 9))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_bad_step_between_two_log_lines_is_still_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non-finite .* at steps 2-2 .*; there is no checkpoint yet"):
        toy(toy_config(tmp_path, log_every=100, max_nonfinite_steps=0), poison=[2])


def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights and optimizer are what they were, and the run goes on, also after a resume."""
    toy(toy_config(tmp_path, steps=8, checkpoint_every=1, keep_checkpoints=9, max_nonfinite_steps=2), poison=[3, 4, 6])
    states = {step: tensors_of(tmp_path, step) for step in range(1, 9)}
    for before, after, same in ((2, 4, True), (4, 5, False), (5, 6, True), (6, 7, False)):
        live = [n for n in states[1] if not n.startswith("toy_ema")]
        assert all(torch.equal(states[before][n], states[after][n]) for n in live) == same
    assert "toy: non-finite gradient, skipped step 6 (3 skipped so far)" in capsys.readouterr().out
    notes = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "skipped" in line]
    assert [note["skipped"] for note in notes] == [[3], [4], [6]]
    shutil.rmtree(tmp_path / "checkpoints/step-000008")
    toy(toy_config(tmp_path, resume="latest"), poison=[8])
    assert "skipped step 8 (4 skipped so far)" in capsys.readouterr().out


def test_the_end_of_a_run_says_that_its_model_is_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are finite, but so large that the validation is not."""

    class Overflown(Toy):
        def validate(self, ranks: Ranks) -> dict[str, float]:
            return {"validation_a": float("nan"), "validation_b": 1.0}

    for stage, want in ((Overflown, ["validation_a"]), (Toy, [])):
        toy(toy_config(tmp_path / stage.__name__), stage=stage)
        said = re.findall("warning: (.*): NaN, .* lower --learning-rate", capsys.readouterr().out)
        assert said == want


def test_the_end_of_a_run_says_which_steps_were_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(toy_config(tmp_path, steps=6, log_every=100), poison=[2, 5])
    toy(toy_config(tmp_path, steps=8, log_every=100, resume="latest"), poison=[7])
    *_, first, second = (line for line in capsys.readouterr().out.splitlines() if "steps skipped" in line)
    assert first.startswith("toy: 2 of 6 steps skipped for a non-finite gradient: 2, 5;")
    assert second.startswith("toy: 3 of 8 steps skipped for a non-finite gradient: 2, 5, 7;")
    toy(toy_config(tmp_path / "sound"))
    assert "skipped" not in capsys.readouterr().out


def spoil(at: int, part: str) -> OnStep:
    """Put a NaN into the weights, or into their average, after a step."""

    def on_step(trainer: Trainer) -> None:
        tensors = trainer.state.ema["toy"].shadow.values() if part == "average" else trainer.stage.model.parameters()
        if trainer.state.step == at:
            next(iter(tensors)).data[0] = math.nan

    return on_step


@pytest.mark.parametrize(("part", "name"), [("weights", "toy/weight"), ("average", "toy_ema/weight")])
def test_what_is_not_finite_is_not_saved(part: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"step 6 has NaN .* in {name}.*not saved; .*last good .*step-000003"):
        toy(toy_config(tmp_path), on_step=spoil(6, part))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    with pytest.raises(ValueError, match="step 1 has NaN .*there is no checkpoint yet"):
        toy(toy_config(tmp_path / "first", checkpoint_every=1), on_step=spoil(1, part))


def test_a_model_with_statistics_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    class Measured(Toy):
        def save(self, folder: Path) -> None:
            self.model.register_buffer("measured", torch.tensor([math.nan]))
            save_weights(self.model, folder / "toy.safetensors")

    with pytest.raises(ValueError, match="toy.safetensors: 1 tensors .*: measured; the last good .*step-000008"):
        toy(toy_config(tmp_path), stage=Measured)
    assert not (tmp_path / "model").exists()


def test_a_loss_that_spikes_is_reported_with_its_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(toy_config(tmp_path, steps=130, checkpoint_every=130, log_every=20), jump=120)
    notes = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "spike" in line]
    assert [note["step"] for note in notes] == [120]
    assert notes[0]["samples"] == EpochBatchSampler(37, seed=0, batch_size=12).indices(119)
    assert "toy: loss spike: " in capsys.readouterr().out


class Dying(ToyData):
    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Sleeping(ToyData):
    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        time.sleep(60)
        raise AssertionError


def test_a_loading_process_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"DataLoader worker failed \(DataLoader worker .*lower --num-workers; restart"
    ):
        toy(toy_config(tmp_path, num_workers=1), data=Dying())


class Refusing(ToyData):
    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        raise ShardReadError("a.tar cannot be read (ValueError: cut off)")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_loading_process_is_that_of_the_data(tmp_path: Path, num_workers: int) -> None:
    with pytest.raises(ValueError, match=r"^a\.tar cannot be read \(ValueError: cut off\)$"):
        toy(toy_config(tmp_path, num_workers=num_workers), data=Refusing())


def test_data_that_never_comes_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"worker failed \(DataLoader timed out after 2 seconds\)"):
        toy(toy_config(tmp_path, num_workers=1, timeout=2), data=Sleeping())


def test_a_run_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    toy(toy_config(tmp_path))
    with pytest.raises(ValueError, match="already has step-000008: pass --resume latest, or choose another --run"):
        toy(toy_config(tmp_path))


def test_resume_needs_something_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint to resume from; start without --resume"):
        toy(toy_config(tmp_path / "new", resume="latest"))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"cannot resume from .*other: no manifest.json: pass a folder such as"):
        toy(toy_config(tmp_path / "new", resume=str(tmp_path / "other")))


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    toy(toy_config(tmp_path / "a"))
    saved = tmp_path / "a/checkpoints/step-000008"
    with pytest.raises(ValueError, match="has seed 0, here 1: they must match"):
        toy(toy_config(tmp_path / "b", seed=1, resume=str(saved)))
    with pytest.raises(ValueError, match="is at step 8, past --steps 4"):
        toy(toy_config(tmp_path / "b", steps=4, resume=str(saved)))
    manifest = json.loads((saved / "manifest.json").read_text())
    for text, message in (
        (
            json.dumps({**manifest, "format": "ldm-checkpoint-2"}),
            "written as ldm-checkpoint-2 by another version of ldm",
        ),
        ("{", "manifest.json or sha256.json is corrupt"),
        ("[]", "manifest.json or sha256.json is corrupt"),
        (json.dumps({**manifest, "bytes": {}}), "its files are not those of its manifest.json"),
    ):
        (saved / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=f"cannot resume from .*step-000008: {message}"):
            toy(toy_config(tmp_path / "b", resume=str(saved)))


@pytest.mark.parametrize("name", ["toy", "toy_optimizer", "toy_ema", "progress"])
@pytest.mark.parametrize("harm", ["cut", "bit", "gone"])
def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_used(
    name: str, harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(toy_config(tmp_path))
    want = {name: tensor.clone() for name, tensor in tensors_of(tmp_path, 8).items()}  # not the memory of the file
    want_losses = losses(tmp_path)
    file = next((tmp_path / "checkpoints/step-000008").glob(f"{name}.*"))
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "bit": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "gone": b""}[harm])
    if harm == "gone":
        file.unlink()
    with pytest.raises(ValueError, match="cannot resume from .*step-000008: .*; pass another checkpoint"):
        toy(toy_config(tmp_path, resume=str(file.parent)))
    toy(toy_config(tmp_path, resume="latest"))
    output = capsys.readouterr().out
    assert "step-000008: " in output and "renamed to corrupt-step-000008; falling back to the previous" in output
    assert_same(want, tensors_of(tmp_path, 8))
    assert losses(tmp_path) == want_losses


def test_a_corrupt_checkpoint_does_not_count_towards_keep_checkpoints(tmp_path: Path) -> None:
    """Not even where it is newer than all that the run writes after it."""
    toy(toy_config(tmp_path))
    (tmp_path / "checkpoints/step-000008/progress.json").write_text("")
    toy(toy_config(tmp_path, steps=7, keep_checkpoints=1, resume="latest"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["corrupt-step-000008", "step-000007"]


def test_going_back_takes_another_run(tmp_path: Path) -> None:
    """For of the checkpoints of two courses the newest would be the wrong one."""
    toy(toy_config(tmp_path / "a"))
    earlier = str(tmp_path / "a/checkpoints/step-000006")
    with pytest.raises(ValueError, match="has step-000008: pass --resume latest, or resume .*6 in another --run"):
        toy(toy_config(tmp_path / "a", learning_rate=0.2, resume=earlier))
    toy(toy_config(tmp_path / "b", resume=earlier))
    assert_same(tensors_of(tmp_path / "a", 8), tensors_of(tmp_path / "b", 8))


def test_a_disk_that_fails_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(toy_config(tmp_path))

    def failing(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "sha256", failing)
    found = checkpoint.find_corruption(tmp_path / "checkpoints/step-000008")
    assert found == "cannot be read ([Errno 5] Input/output error)"


def test_two_thousand_changed_checkpoints_are_never_taken_for_whole(tmp_path: Path) -> None:
    toy(toy_config(tmp_path))
    folder, draw = tmp_path / "checkpoints/step-000008", random.Random(0)
    files = {path: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != checkpoint.HASHES}
    assert checkpoint.find_corruption(folder) is None
    for number in range(2_000):
        path = draw.choice(list(files))
        whole = files[path]
        place = draw.randrange(len(whole))
        changed = whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
        path.write_bytes((changed, whole[:place], changed + b"x", b"")[number % 4])
        assert checkpoint.find_corruption(folder), f"{path.name} was changed at {place}"
        path.write_bytes(whole)
    (folder / "more").write_text("")
    assert checkpoint.find_corruption(folder) == "its files are not those of its manifest.json"


@pytest.mark.parametrize(("text", "corrupt"), [("", False), ('{"toy.safe', True), ("[]", False), ("[1]", True)])
def test_a_checkpoint_is_whole_without_hashes(text: str, corrupt: bool, tmp_path: Path) -> None:
    """But not with damaged ones."""
    toy(toy_config(tmp_path))
    (tmp_path / "checkpoints/step-000008/sha256.json").write_text(text)
    assert bool(checkpoint.find_corruption(tmp_path / "checkpoints/step-000008")) == corrupt
    with pytest.raises(ValueError, match="no manifest.json: pass a folder"):
        toy(toy_config(tmp_path / "other", resume=str(tmp_path / "checkpoints/step-000008/toy.safetensors")))


def sgd(parameters: list[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Plain gradient descent, which has no state, at a tenth of the configuration's learning rate."""
    return torch.optim.SGD(parameters, lr=0.1 * config.learning_rate)


class PlainToy(Toy):
    """A toy with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trainables = [Trainable("toy", self.model, sgd)]


def test_an_optimizer_has_its_own_learning_rate_and_may_have_no_state(tmp_path: Path) -> None:
    rates: list[float] = []

    def record(trainer: Trainer) -> None:
        rates.append(trainer.state.optimizers["toy"].param_groups[0]["lr"])

    settings = {"lr_schedule": "linear", "learning_rate": 1.0}
    toy(toy_config(tmp_path / "whole", keep_checkpoints=3, **settings), stage=PlainToy, on_step=record)
    assert rates == pytest.approx([0.05, 0.1, *(0.1 * (1 - step / 6) for step in range(6))])
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == pytest.approx(rates, rel=1e-5)
    shutil.copytree(tmp_path / "whole/checkpoints/step-000003", tmp_path / "again/checkpoints/step-000003")
    toy(toy_config(tmp_path / "again", resume="latest", **settings), stage=PlainToy)
    assert_same(tensors_of(tmp_path / "whole", 8), tensors_of(tmp_path / "again", 8))
    with pytest.raises(ValueError, match="has toy_optimizer SGD, here AdamW: they must match"):
        toy(toy_config(tmp_path / "other", resume=str(tmp_path / "whole/checkpoints/step-000003"), **settings))


def test_checkpoints_are_pruned_after_the_new_one_is_whole(tmp_path: Path) -> None:
    toy(toy_config(tmp_path, steps=12, checkpoint_every=2, keep_checkpoints=3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000008", "step-000010", "step-000012"]


def test_a_full_disk_keeps_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.save_tensors

    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        original(path, tensors)
        if "step-000006" in str(path):
            raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(
        ValueError,
        match=r"step-000006 .*File too large.*free some space.*, from step-000003",
    ):
        toy(toy_config(tmp_path))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    toy(toy_config(tmp_path, resume="latest"))
    uninterrupted = tmp_path / "again"
    toy(toy_config(uninterrupted))
    assert_same(tensors_of(tmp_path, 8), tensors_of(uninterrupted, 8))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of step 3 finds its disk after step 5, and holds what step 3 left all the same."""
    original, disk = checkpoint.save_tensors, threading.Event()

    def late(path: Path, tensors: dict[str, Tensor]) -> None:
        assert disk.wait(60)
        original(path, tensors)

    def on_step(trainer: Trainer) -> None:
        if trainer.state.step == 5:
            assert checkpoint.latest(tmp_path / "late/checkpoints") is None
            disk.set()

    toy(toy_config(tmp_path / "plain", keep_checkpoints=3))
    monkeypatch.setattr(checkpoint, "save_tensors", late)
    toy(toy_config(tmp_path / "late", keep_checkpoints=3), on_step=on_step)
    for step in (3, 6, 8):
        assert_same(tensors_of(tmp_path / "late", step), tensors_of(tmp_path / "plain", step))
        late_one, plain_one = (
            (tmp_path / name / f"checkpoints/step-{step:06}/progress.json").read_text() for name in ("late", "plain")
        )
        assert late_one == plain_one


def test_what_could_not_be_written_is_reported_beside_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_step(trainer: Trainer) -> None:
        if trainer.state.step == 4:
            raise KeyError("another error")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(KeyError, match="another error"):
        toy(toy_config(tmp_path), on_step=on_step)
    assert "warning: " in (shown := capsys.readouterr().out) and "step-000003 could not be written" in shown


def test_a_full_disk_keeps_the_old_weights_whole(tmp_path: Path) -> None:
    save_weights(nn.Linear(2, 1), tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    with full_disk(), pytest.raises(ValueError, match="w.safetensors could not be written .* free some space"):
        save_weights(nn.Linear(20, 1), tmp_path / "w.safetensors")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("w.safetensors", before)]


class Plain(Toy):
    """With an optimizer that knows no flag for non-finite gradients."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.trainables = [Trainable("toy", self.model, lambda p, config: torch.optim.SGD(p, lr=config.learning_rate))]


def test_a_non_finite_step_is_skipped_with_any_optimizer(tmp_path: Path) -> None:
    toy(toy_config(tmp_path, checkpoint_every=1, keep_checkpoints=9), stage=Plain, poison=[3])
    states = {step: load_file(tmp_path / f"checkpoints/step-{step:06d}/toy.safetensors") for step in (1, 2, 3, 4)}
    assert_same(states[2], states[3])
    assert all(not torch.equal(states[3][name], states[4][name]) for name in states[3])


class HalfFrozen(Toy):
    """Only the bias is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model.weight.requires_grad_(False)


def test_frozen_parameters_are_neither_averaged_nor_saved(tmp_path: Path) -> None:
    trainers: list[Trainer] = []
    toy(toy_config(tmp_path), stage=HalfFrozen, on_step=trainers.append)
    assert list(trainers[0].state.ema["toy"].shadow) == ["bias"]
    saved = {name for name in tensors_of(tmp_path, 8)}
    assert {"toy/bias", "toy_ema/bias"} <= saved and not any("weight" in name for name in saved)
    shutil.rmtree(tmp_path / "checkpoints/step-000008")
    want = trainers[0].stage.model.bias.clone()  # type: ignore[attr-defined]
    again: list[Trainer] = []
    toy(toy_config(tmp_path, resume="latest"), stage=HalfFrozen, on_step=again.append)
    assert torch.equal(want, again[0].stage.model.bias)  # type: ignore[attr-defined]


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10, learning_rate=2.0, lr_schedule="cosine")
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 9) == learning_rate(config, 10) == pytest.approx(2.0)
    assert learning_rate(config, 60) == pytest.approx(1.0)
    assert learning_rate(config, 110) == pytest.approx(0.0, abs=1e-12)
    linear = config.model_copy(update={"lr_schedule": "linear"})
    assert learning_rate(linear, 35) == pytest.approx(1.5)
    constant = config.model_copy(update={"lr_schedule": "constant"})
    assert learning_rate(constant, 109) == 2.0


def test_ema_warms_up_and_hands_the_weights_back() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    ema = EMA(module, 0.5)
    module.weight.data.fill_(1.0)
    want = 0.0
    for step in range(6):
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * 1.0
    assert ema.shadow["weight"].item() == pytest.approx(want)
    module.weight.data.fill_(7.0)
    with ema.swapped_in():
        assert module.weight.item() == pytest.approx(want)
    assert module.weight.item() == 7.0


def test_draws_do_not_depend_on_how_a_batch_is_cut() -> None:
    cpu = torch.device("cpu")
    whole = StepRNG(3, 5, range(6), 6, cpu)
    parts = [StepRNG(3, 5, positions, 6, cpu) for positions in ([0, 1], [2, 3, 4], [5])]
    assert torch.equal(whole.randn("noise", (2, 2)), torch.cat([p.randn("noise", (2, 2)) for p in parts]))
    assert torch.equal(whole.rand("time"), torch.cat([p.rand("time") for p in parts]))
    assert not torch.equal(whole.rand("time"), whole.rand("dropout"))
    assert not torch.equal(whole.rand("time"), StepRNG(3, 6, range(6), 6, cpu).rand("time"))
    many = StepRNG(0, 0, range(4000), 4000, cpu)
    noise, uniform = many.randn("noise", (4,)), many.rand("time")
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03
    assert abs(uniform.mean().item() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1].item()) < 4 / math.sqrt(4000)


def test_wandb_is_asked_for_only_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.utils, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="wandb is not installed"):
        make_accelerator(toy_config(tmp_path, trackers=("wandb",)))


def test_trackers_get_the_project_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {}
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, project, **more: settings.update(more, project=project)
    )
    toy(toy_config(tmp_path))
    assert settings["project"] == "ldm"
    assert settings["init_kwargs"]["wandb"]["name"] == str(tmp_path)
    assert settings["init_kwargs"]["wandb"]["config"]["learning_rate"] == 0.1


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=1.0, fused=True), partial(torch.optim.SGD, lr=1.0)])
@pytest.mark.parametrize(("max_norm", "moved"), [(1.0, 1.0), (10.0, 5.0)])
def test_a_larger_gradient_is_scaled_down(make: Any, max_norm: float, moved: float) -> None:
    """In the optimizer's own kernel, or before it; one that is not finite moves nothing."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))]
    weights[0].grad, weights[1].grad = torch.tensor([0.0, 3.0]), torch.tensor([4.0])
    optimizer, norm = make(weights), gradient_norm(weights)
    assert norm.item() == 5
    step_clipped(optimizer, weights, norm, max_norm, torch.tensor(1.0))
    assert not weights[0].any() and not weights[1].any()
    step_clipped(optimizer, weights, norm, max_norm, torch.tensor(0.0))
    assert torch.cat([weights[0], weights[1]]).norm().item() == pytest.approx(moved, rel=1e-5)
    assert weights[2].item() == 1, "it has no gradient"


def test_gradients_are_clipped_and_reported(tmp_path: Path) -> None:
    toy(toy_config(tmp_path, max_grad_norm=1e-3, steps=1))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["gradient_norm"] > 1e-3  # before clipping
    moments = load_file(tmp_path / "checkpoints/step-000001/toy_optimizer.safetensors")
    first = torch.cat([t.flatten() for name, t in moments.items() if name.endswith("exp_avg")])
    assert first.norm().item() == pytest.approx(1e-3 * (1 - 0.9), rel=1e-3)


def test_accelerate_launch_leaves_all_cores_to_a_run_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets OMP_NUM_THREADS=1; what a person asked for stays."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(distributed, "launcher_environment", dict)  # whatever these tests were started with
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("ACCELERATE_DYNAMO_BACKEND", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.restore_num_threads()
    assert threads == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    distributed.restore_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    distributed.restore_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    distributed.restore_num_threads()
    assert threads == [6, 3]


class Painting(Toy):
    """A toy with a sample image."""

    def sample(self) -> Image.Image:
        return Image.new("RGB", (40, 24), (200, 30, 60))


def test_sample_grids_go_to_tensorboard(tmp_path: Path) -> None:
    toy(toy_config(tmp_path, sample_every=3), stage=Painting)
    events = EventAccumulator(str(tmp_path / "tensorboard/ldm"), size_guidance={"images": 0}).Reload()
    images = events.Images("samples/0") if "samples/0" in events.Tags()["images"] else events.Images("samples")
    assert [image.step for image in images] == [3, 6, 8]
    shown = Image.open(io.BytesIO(images[-1].encoded_image_string))
    saved = Image.open(tmp_path / "samples/step-000008.png")
    assert shown.convert("RGB").tobytes() == saved.tobytes() and shown.size == (40, 24)


def test_sample_grids_go_to_other_trackers(tmp_path: Path) -> None:
    """As W&B takes them: a list of images by name."""
    logged: list[tuple[dict[str, Any], int]] = []
    tracker = SimpleNamespace(name="wandb", log_images=lambda values, step: logged.append((values, step)))
    accelerator: Any = SimpleNamespace(trackers=[tracker], is_main_process=True, end_training=lambda: None)
    logs = RunLogger(tmp_path, accelerator, steps=2, start=0)
    logs.image(1, Painting().sample())
    logs.image(2, None)
    logs.close()
    [(values, step)] = logged
    assert step == 1 and values["samples"][0].shape == (24, 40, 3) and values["samples"].dtype == np.uint8
