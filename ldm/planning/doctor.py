"""Some real steps of a run, in a temporary run folder, and what they measure: for scripts/doctor.py."""

import math
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ldm.data.batch_sampler import SampleKey
from ldm.data.loader import Batches
from ldm.io.atomic import new_folder
from ldm.planning import checks
from ldm.planning.checks import DoctorCheck
from ldm.planning.device import clock, peak_memory, total_memory
from ldm.rng import StepRNG
from ldm.training import checkpoint
from ldm.training.config import TrainingConfig
from ldm.training.distributed import training_precision
from ldm.training.fsdp import full_tensor, local_tensor
from ldm.training.lock import has_writer
from ldm.training.stage import Stage
from ldm.training.trainer import Buildable, Config, Trainer, train

DOCTOR_STEPS, MIN_DOCTOR_STEPS = 20, 4  # real steps, and how many a run must have
PEAK_FRACTION = 0.98  # of the memory at its peak: what first took so much is named
UNTIMED_STEPS, OVERFIT_STEPS = 5, 10  # left out of the rate; how often the last step is repeated at the end


def examine(stage_class: Buildable[Config], config: Config) -> list[DoctorCheck]:
    """Take a few steps of a run; ValueError: what `fit` raises, too few steps, and one too large for the memory."""
    if config.steps < MIN_DOCTOR_STEPS:
        raise ValueError(f"--steps must be at least {MIN_DOCTOR_STEPS} for the doctor, not {config.steps}")
    run = Path(os.path.abspath(config.run))  # next to it, or to a link, `latest` finds the stages before it
    folder = run.with_name(f".{run.name}-doctor")
    values = {"run": folder, "trackers": (), "resume": None}
    _remove(folder)  # what a killed one left
    with new_folder(folder.parent):
        try:
            return train(stage_class, config.model_copy(update=values), fit=run_doctor)
        finally:
            _remove(folder)


def run_doctor(config: TrainingConfig, accelerator: Accelerator, stage: Stage) -> list[DoctorCheck]:
    """In the place of `fit`: the checks of some steps in the folder `config.run`."""
    doctor = None
    try:
        doctor = DoctorRun(Trainer(config, accelerator, stage))
        with doctor.trainer.open_logs(doctor.steps), doctor.state.writing():
            found: list[DoctorCheck] = broadcast_object_list(doctor.checks())  # each rank has clocks of its own
            return found
    except torch.OutOfMemoryError:
        doing = doctor.doing if doctor else "loading the networks"
        remedy = checks.memory_remedy(doing, config.grad_accum_steps)
        raise ValueError(
            f"memory: {doing} does not fit, with batches of {config.batch_size} images: {remedy}"
        ) from None


def _remove(folder: Path) -> None:
    """On rank 0, before the ranks meet or after they parted, unless another doctor writes it."""
    if os.environ.get("RANK", "0") == "0" and not has_writer(folder):
        shutil.rmtree(folder, ignore_errors=True)


class DoctorRun:
    """Takes the steps, as the loop does, and measures. All ranks must do the same."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config, self.accelerator, self.state = trainer.config, trainer.accelerator, trainer.state
        self.device = self.accelerator.device
        self.on_gpu = self.device.type == "cuda"
        self.place = f"{socket.gethostname()} {self.device}"
        self.steps = min(DOCTOR_STEPS, self.config.steps)
        self.model = self.config.run / "finished"  # not `model`, which `latest` would find
        self.keys: list[list[SampleKey]] = []  # of this rank, in each micro-batch
        self.waited = 0.0  # seconds, for data
        self.doing = checks.STEP
        self.peaks: dict[str, int] = {}  # bytes, the largest until each of what was done had ended

    def checks(self) -> list[DoctorCheck]:
        """Everything, in the order of the report."""
        first, step, waiting = self._take_steps()
        self.peaks[self.doing] = peak_memory(self.device)
        sums = self._gradients()
        stage, with_ema_weights = self.trainer.stage, self.trainer.with_ema_weights
        seconds = {
            "step": step,
            "validate": self._seconds("validation", self.trainer.validate),
            "sample": self._seconds("sampling", partial(with_ema_weights, stage.sample)),
            "model": self._seconds("saving the model", partial(with_ema_weights, partial(stage.save, self.model))),
            "save": self._seconds("saving a checkpoint", self._save),
        }
        self.doing = checks.STEP
        memory, disk = self._memory(), self._disk()
        difference = self._check_resume()
        losses, chance = self._overfit_one_batch()
        return [
            self._devices(),
            checks.gradients_synced(sums, fsdp=self.state.mesh is not None),
            self._disjoint(),
            checks.schedule(self.config),
            checks.resume_exact(difference, on_gpu=self.on_gpu),
            checks.loss_decreases(first, losses, self.config, step=self.steps, chance=chance),
            memory,
            checks.throughput(step, waiting, self.config),
            checks.time_to_finish(seconds, self.config),
            disk,
        ]

    # Steps.

    def _timed_batches(self, batches: Batches) -> Batches:
        """The same batches; records their keys and the time that they took."""
        while True:
            begin = time.perf_counter()
            keys, batch = next(batches)
            self.waited += time.perf_counter() - begin
            self.keys.append(keys)
            yield keys, batch

    def _step(self, batches: Batches) -> None:
        self.trainer.train_step(batches)
        self.trainer.logs.step(self.state.step)

    def _loss(self) -> float:
        """Of the last step, over all ranks."""
        return fmean(gather_object([self.trainer.losses["loss"].item()]))

    def _take_steps(self) -> tuple[float, float, float]:
        """All steps but the last: the loss of the first, the seconds of one, and the largest fraction for data."""
        batches = self._timed_batches(self.trainer.batches(start=0))
        start, stop = min(UNTIMED_STEPS, self.steps // 4), self.steps - 1
        self._step(batches)
        first = self._loss()
        for _ in range(1, start):
            self._step(batches)
        begin, self.waited = clock(), 0.0
        for _ in range(start, stop):
            self._step(batches)
        spent = clock() - begin
        return first, spent / (stop - start), max(gather_object([self.waited / spent]))

    def _check_resume(self) -> float:
        """The last step twice from the same checkpoint: the root mean square between both, in learning rates."""
        saved = checkpoint.latest(self.state.folder)
        assert saved is not None
        self._step(self._timed_batches(self.trainer.batches(start=self.state.step)))
        once = self._weights()
        self.state.restore(saved)
        self._step(self.trainer.batches(start=self.state.step))
        square = sum((a - b).double().square().sum().item() for a, b in zip(once, self._weights(), strict=True))
        squares, counts = zip(*gather_object([(square, sum(tensor.numel() for tensor in once))]), strict=True)
        rate = next(iter(self.state.optimizers.values())).param_groups[0]["lr"]
        return math.sqrt(sum(squares) / sum(counts)) / max(rate, 1e-30)

    def _weights(self) -> list[Tensor]:
        """Copies of weights and averages: of rank 0, or the shards of each rank."""
        if self.state.mesh is None and not self.accelerator.is_main_process:
            return []
        tensors = [p.detach() for module in self.state.modules.values() for p in module.parameters()]
        tensors += [tensor for ema in self.state.ema.values() for tensor in ema.shadow.values()]
        return [local_tensor(t).to("cpu", copy=True) for t in tensors]

    def _overfit_one_batch(self) -> tuple[list[float], float | None]:
        """Repeat the last step: its samples, noise and learning rate stay, so its loss must fall.

        Returns these losses, and that of a network that ignores its input.
        """
        losses = []
        micro_batches = list(islice(self.trainer.batches(start=self.steps - 1), self.config.grad_accum_steps))
        for _ in range(OVERFIT_STEPS):
            self.state.step = self.steps - 1
            self._step(iter(micro_batches))
            losses.append(self._loss())
        return losses, self._chance_loss(micro_batches)

    def _chance_loss(self, micro_batches: list[Any]) -> float | None:
        """Of the first trainable in the last step, over all ranks."""
        config, stage, chances = self.config, self.trainer.stage, []
        for keys, batch in micro_batches:
            positions = [key.position for key in keys]
            rng = StepRNG(config.seed, self.steps - 1, positions, config.batch_size, self.device)
            chances.append(stage.chance_loss(stage.trainables[0].name, batch, rng))
        known = [chance for chance in gather_object(chances) if chance is not None]
        return fmean(known) if known else None

    # Measurements.

    def _save(self) -> None:
        self.state.save(replace=True)
        self.state.finish_saving()

    def _seconds(self, doing: str, action: Callable[[], object]) -> float:
        """Of an action, whose peak of memory is recorded, too."""
        self.doing = doing
        if getattr(self.config, "compile", False):
            action()  # which compiles
        begin = clock()
        action()
        seconds = clock() - begin
        self.peaks[doing] = peak_memory(self.device)
        return seconds

    def _devices(self) -> DoctorCheck:
        threads = f"{self.device.type} of {torch.get_num_threads()} threads each"
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else threads
        places, gpus = gather_object([self.place]), torch.cuda.device_count()
        return checks.devices(places, name, training_precision(self.accelerator), on_gpu=self.on_gpu, gpus=gpus)

    def _gradients(self) -> Tensor:
        """Sum and norm of each gradient of the last step, as each rank has it: (ranks, gradients, 2)."""
        parameters = [p for module in self.state.modules.values() for p in module.parameters()]
        gradients = (full_tensor(p.grad).float() for p in parameters if p.grad is not None)
        sums = torch.stack([torch.stack([gradient.sum(), gradient.norm()]) for gradient in gradients])
        return self.accelerator.gather(sums[None])

    def _disjoint(self) -> DoctorCheck:
        rounds = self.config.grad_accum_steps
        steps = [list(chain(*self.keys[i : i + rounds])) for i in range(0, len(self.keys), rounds)]
        images = len(self.trainer.stage.data)
        return checks.data_disjoint(gather_object([steps]), batch_size=self.config.batch_size, images=images)

    def _memory(self) -> DoctorCheck:
        """The fullest GPU, or the sum of the ranks on the fullest machine: with the copy that is written meanwhile."""
        if not self.on_gpu and not self.state.mesh and self.accelerator.is_main_process:
            self.peaks[checks.STEP] += _size(self.state.folder)
        used: Counter[str] = Counter()
        peak = max(self.peaks.values())
        for place, bytes_of_rank in gather_object([(self.place, peak)]):
            used[place] += bytes_of_rank
        doing = next(doing for doing, so_far in self.peaks.items() if so_far >= PEAK_FRACTION * peak)
        rounds = self.config.grad_accum_steps
        return checks.memory(max(used.values()), total_memory(self.device), doing, rounds, on_gpu=self.on_gpu)

    def _disk(self) -> DoctorCheck:
        saved, model = (_size(folder) for folder in (self.state.folder, self.model))
        free = shutil.disk_usage(self.config.run.parent).free + saved + model
        return checks.disk(saved, model, free, self.config)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
