"""Some real steps of a run, in a folder that goes again, and what they measure: for scripts/doctor.py."""

import math
import shutil
import socket
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.data.batch_sampler import SampleKey
from ldm.data.loader import Batches, batch_sampler_for_rank, make_loader
from ldm.planning import checks
from ldm.planning.checks import DoctorCheck
from ldm.planning.device import peak_memory, synchronize, total_memory
from ldm.training import checkpoint
from ldm.training.config import TrainingConfig
from ldm.training.fsdp import full_tensor
from ldm.training.stage import Stage
from ldm.training.trainer import Trainer

DOCTOR_STEPS, MIN_DOCTOR_STEPS = 20, 4  # real steps, and how many a run must have
UNTIMED_STEPS, OVERFIT_STEPS = 5, 10  # steps that are left out of the rate; how often the last one is taken at the end
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run_doctor(config: TrainingConfig, accelerator: Accelerator, stage: Stage, *, found: list[DoctorCheck]) -> Path:
    """Takes the place of `fit`: some steps in `config.run`, which is removed; what they show is added to `found`.

    ValueError: what `fit` says, fewer than four steps, and a step that the memory does not hold.
    """
    if config.steps < MIN_DOCTOR_STEPS:
        raise ValueError(f"steps: the doctor looks at {MIN_DOCTOR_STEPS} steps at least")
    _remove(config.run, accelerator)  # what a killed one left
    accelerator.wait_for_everyone()
    try:
        examination = DoctorRun(Trainer(config, accelerator, stage), stage)
        with examination.trainer.open_logs(examination.steps):
            found += broadcast_object_list(examination.checks())  # each has clocks of its own
    except torch.OutOfMemoryError:
        raise ValueError(
            f"memory: a step of {config.batch_size} images does not fit: try --grad-accum-steps {2 * config.grad_accum_steps}, "
            "--gradient-checkpointing, or --fsdp on several GPUs"
        ) from None
    finally:
        _remove(config.run, accelerator)
    return config.run


def _remove(run: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        shutil.rmtree(run, ignore_errors=True)


class DoctorRun:
    """Takes the steps, as the loop does, and measures. All processes must do the same."""

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self.trainer, self.stage = trainer, stage
        self.config, self.accelerator = trainer.config, trainer.accelerator
        self.device = self.accelerator.device
        self.on_gpu = self.device.type == "cuda"
        self.steps = min(DOCTOR_STEPS, self.config.steps)
        self.model = self.config.run / "finished"  # no `model`, which `latest` would find
        self.seen: list[list[SampleKey]] = []  # by this process, in each micro-batch
        self.waited = 0.0  # seconds, for data

    def checks(self) -> list[DoctorCheck]:
        """Everything, in the order in which people read it."""
        config = self.config
        first, step, waiting = self._take_steps()
        sums = self._gradients()
        seconds = {"step": step, **self._hooks(), "save": self._seconds(self.trainer.save)}
        memory, disk = self._memory(), self._disk()
        difference = self._check_resume()
        return [
            self._devices(),
            checks.gradients_synced(sums, split=self.trainer.mesh is not None),
            self._disjoint(),
            checks.schedule(config),
            checks.resume_exact(difference, on_gpu=self.on_gpu),
            checks.loss_decreases(first, self._overfit_one_batch(), config, step=self.steps),
            memory,
            checks.throughput(step, waiting, config),
            checks.time_to_finish(seconds, config),
            disk,
        ]

    # What is done.

    def _batches(self, step: int) -> Batches:
        order = batch_sampler_for_rank(self.config, self.accelerator, self.stage, start=step)
        return make_loader(self.config, self.accelerator, self.stage, order)

    def _timed_batches(self, batches: Batches) -> Batches:
        """The same batches; keeps their keys and the time that they took."""
        while True:
            begin = time.perf_counter()
            keys, batch = next(batches)
            self.waited += time.perf_counter() - begin
            self.seen.append(keys)
            yield keys, batch

    def _take_steps(self) -> tuple[float, float, float]:
        """All steps but the last; returns the loss of the first, the seconds of one, and the share that data took.

        That is of the process that waited longest: the others wait for it, and not for data.
        """
        watched, start, stop = (
            self._timed_batches(self._batches(0)),
            min(UNTIMED_STEPS, self.steps // 4),
            self.steps - 1,
        )
        self._step(watched)
        first = self._loss()
        for _ in range(1, start):
            self._step(watched)
        synchronize(self.device)
        begin, self.waited = time.perf_counter(), 0.0
        for _ in range(start, stop):
            self._step(watched)
        synchronize(self.device)
        spent = time.perf_counter() - begin
        return first, spent / (stop - start), max(gather_object([self.waited / spent]))

    def _loss(self) -> float:
        """Of the step that was taken, over all processes."""
        return self._sum(self.trainer.report["loss"].item()) / self.accelerator.num_processes

    def _step(self, batches: Batches) -> None:
        self.trainer.train_step(batches)
        self.trainer.logs.step(self.trainer.step)

    def _check_resume(self) -> float | None:
        """The last step, back to the checkpoint before it, and the same step again.

        Returns the root mean square between both, in learning rates; None where all bits are equal.
        """
        saved = checkpoint.latest(self.trainer.folder)
        assert saved is not None
        self._step(self._timed_batches(self._batches(self.trainer.step)))
        once = self._state()
        self.trainer.restore(saved)
        self._step(self._batches(self.trainer.step))
        twice = self._state()
        if not self._sum(float(any(not torch.equal(a, b) for a, b in zip(once, twice, strict=True)))):
            return None
        square = self._sum(sum((a - b).double().square().sum().item() for a, b in zip(once, twice, strict=True)))
        rate = self.trainer.optimizers[self.trainer.players[0].name].param_groups[0]["lr"]
        return math.sqrt(square / self._sum(sum(one.numel() for one in once))) / max(rate, 1e-30)

    def _overfit_one_batch(self) -> list[float]:
        """Take the last step again and again: its samples, noise and learning rate stay, so its loss must fall."""
        losses = []
        rounds = list(islice(self._batches(self.steps - 1), self.config.grad_accum_steps))
        for _ in range(OVERFIT_STEPS):
            self.trainer.step = self.steps - 1
            self._step(iter(rounds))
            losses.append(self._loss())
        return losses

    def _state(self) -> list[Tensor]:
        """Copies of weights and averages: of the main process, or of its part for each where they are split."""
        if self.trainer.mesh is None and not self.accelerator.is_main_process:
            return []
        weights = [p.detach() for module in self.trainer.modules.values() for p in module.parameters()]
        averages = [tensor for ema in self.trainer.ema.values() for tensor in ema.shadow.values()]
        return [(t.to_local() if isinstance(t, DTensor) else t).to("cpu", copy=True) for t in weights + averages]

    def _hooks(self) -> dict[str, float]:
        """Validate, sample and write the model once, as the run will; seconds of each."""
        trainer, hooks = self.trainer, self.trainer.hooks
        actions: dict[str, Callable[[], object]] = {"validate": hooks.validate, "sample": hooks.sample}
        actions["model"] = lambda: hooks.save_model(self.model)
        return {name: self._seconds(trainer.with_ema_weights, action) for name, action in actions.items()}

    def _seconds(self, action: Callable[..., object], *arguments: object) -> float:
        begin = time.perf_counter()
        action(*arguments)
        synchronize(self.device)
        return time.perf_counter() - begin

    def _sum(self, value: float) -> float:
        """Of all processes."""
        return sum(gather_object([value]))

    # What is measured.

    def _devices(self) -> DoctorCheck:
        places = gather_object([f"{socket.gethostname()} {self.device}"])
        precision = PRECISIONS.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        return checks.devices(
            places, self._device_name(), precision, on_gpu=self.on_gpu, gpus=torch.cuda.device_count()
        )

    def _device_name(self) -> str:
        if self.on_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} of {torch.get_num_threads()} threads each"

    def _gradients(self) -> Tensor:
        """Sum and norm of each gradient of the last step, as each process sees it: (processes, gradients, 2)."""
        sums = torch.cat([sums_of_gradients(module) for module in self.trainer.modules.values()])
        return self.accelerator.gather(sums[None])

    def _disjoint(self) -> DoctorCheck:
        each = self.config.grad_accum_steps
        own = [list(chain(*self.seen[i : i + each])) for i in range(0, len(self.seen), each)]
        return checks.data_disjoint(gather_object([own]), batch_size=self.config.batch_size)

    def _memory(self) -> DoctorCheck:
        """The fullest GPU, or the sum of the processes on the fullest machine."""
        used: dict[str, int] = {}
        place = f"{socket.gethostname()} {self.device}"
        for name, peak in gather_object([(place, peak_memory(self.device))]):
            used[name] = used.get(name, 0) + peak
        return checks.memory(max(used.values()), total_memory(self.device), on_gpu=self.on_gpu)

    def _disk(self) -> DoctorCheck:
        saved, model = (_size(folder) for folder in (self.trainer.folder, self.model))
        free = shutil.disk_usage(self.config.run.parent).free + saved + model
        return checks.disk(saved, model, free, self.config)


def sums_of_gradients(module: nn.Module) -> Tensor:
    """(gradients, 2): sum and norm of each; one that is split is put together, so all processes must call this."""
    found = [full_tensor(p.grad).float() for p in module.parameters() if p.grad is not None]
    return torch.stack([torch.stack([gradient.sum(), gradient.norm()]) for gradient in found])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
