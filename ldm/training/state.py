"""The state of a run, which a checkpoint holds: networks, optimizers, averages, and the number of steps taken."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ldm.config import check_equal
from ldm.io.tensors import load_strict, nonfinite
from ldm.precision import place
from ldm.training import checkpoint
from ldm.training.anomalies import AnomalyMonitor
from ldm.training.config import TrainingConfig
from ldm.training.distributed import on_rank0
from ldm.training.ema import EMA, trained_parameters
from ldm.training.fsdp import apply_fsdp, full_tensor, local_tensor
from ldm.training.stage import Stage, Trainable


class TrainingState:
    """Everything that the steps of a run change, by the name of each trainable."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        stage: Stage,
        fingerprint: dict[str, Any],
    ) -> None:
        self.config, self.accelerator, self.fingerprint, self.stage = config, accelerator, fingerprint, stage
        trainables = stage.trainables
        self.folder = config.run / "checkpoints"
        self.step = 0
        self.mesh = _mesh(config, accelerator)
        for trainable in trainables:
            if config.fsdp:  # FSDP2 accepts no other layout, and moves one block after the other to the device
                device = "cpu" if self.mesh else accelerator.device
                trainable.module.to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            else:
                place(trainable.module, accelerator.device)
        bf16 = accelerator.mixed_precision == "bf16"
        self.modules = {
            t.name: apply_fsdp(t.module, self.mesh, bf16=bf16) if self.mesh else t.module for t in trainables
        }
        self.optimizers = {t.name: self._make_optimizer(t) for t in trainables}
        self.ema = {name: EMA(module, config.ema_decay) for name, module in self.modules.items()}
        self.monitors = {name: AnomalyMonitor(limit=config.max_nonfinite_steps) for name in self.modules}
        self._saved_step: int | None = None
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._saving: Future[None] = Future()  # of rank 0
        self._is_saving = False

    def _make_optimizer(self, trainable: Trainable) -> AcceleratedOptimizer:
        optimizer = trainable.make_optimizer([*self._trained(trainable.name).values()], self.config)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the peak of its schedule
        self.fingerprint[f"{trainable.name}_optimizer"] = type(optimizer).__name__
        return self.accelerator.prepare_optimizer(optimizer)

    def prepare_networks(self) -> dict[str, nn.Module]:
        """The modules as they are called in training: within DDP, or sharded, under autocast."""
        without_ddp = self.mesh is not None
        return {
            name: self.accelerator.prepare_model(module, evaluation_mode=without_ddp)
            for name, module in self.modules.items()
        }

    def save(self, *, replace: bool = False) -> None:
        """Write a checkpoint of this step, if it was not just written; all ranks call this.

        Rank 0 copies the tensors to the memory of its CPU and writes them while training goes on; `finish_saving` waits
        for that. Sharded ones are written at once. With `replace` it takes the place of one of this step. The one to
        which the stage's watchdog would go back is not pruned. ValueError, with nothing written, where a tensor of any
        rank is not finite, and where the last checkpoint could not be written.
        """
        if self._saved_step == self.step and not replace:
            return
        self.finish_saving()
        tensors: dict[str, checkpoint.Tensors] = {}
        for name in self.modules:
            tensors[name] = self._tensors(name)
            tensors[f"{name}_ema"] = self.ema[name].shadow
            tensors[f"{name}_optimizer"] = checkpoint.optimizer_tensors(self.optimizers[name], [*self._trained(name)])
        self._check_finite(tensors)
        progress: dict[str, Any] = {"fingerprint": self.fingerprint}
        progress["skipped_steps"] = {name: [*monitor.skipped] for name, monitor in self.monitors.items()}
        progress["stage"] = self.stage.state_dict()
        if self.accelerator.scaler is not None:  # fp16
            progress["scaler"] = self.accelerator.scaler.state_dict()
        write = partial(
            checkpoint.save_checkpoint,
            self.folder,
            self.step,
            progress=progress,
            keep=self.config.keep_checkpoints,
            spare=self.stage.watchdog.good_step if self.stage.watchdog else 0,
            replace=replace,
        )
        if self.mesh:
            path = write(tensors, shards=self.accelerator)
            if self.accelerator.is_main_process:
                self._saving = self._writer.submit(checkpoint.add_hashes, path)
        elif self.accelerator.is_main_process:
            copies = {
                name: {
                    key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                    for key, tensor in group.items()
                }
                for name, group in tensors.items()
            }
            self._saving = self._writer.submit(lambda: checkpoint.add_hashes(write(copies)))
        self._saved_step, self._is_saving = self.step, True

    def _check_finite(self, tensors: dict[str, checkpoint.Tensors]) -> None:
        flat = {f"{name}/{key}": local_tensor(t) for name, group in tensors.items() for key, t in group.items()}
        if bad := gather_object(nonfinite(flat)):
            names = ", ".join(list(dict.fromkeys(bad))[:5])
            raise ValueError(f"step {self.step} has NaN or infinite numbers in {names}: not saved; {self.last_good()}")

    def last_good(self) -> str:
        """Which checkpoint is the last one, and what to do where numbers are not finite."""
        self.finish_saving()
        saved = checkpoint.latest(self.folder)
        found = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
        return f"{found}: try a lower --learning-rate or float32"

    def finish_saving(self, *, wait: bool = True) -> None:
        """Wait until the last checkpoint is written and has its hashes; without `wait` only see if it is by now.

        All ranks call this. ValueError where it could not be written.
        """

        def outcome() -> tuple[bool, BaseException | None]:
            done = wait or self._saving.done()
            return done, self._saving.exception() if done else None

        if self._is_saving:
            done, error = on_rank0(self.accelerator, outcome)
            self._is_saving = not done
            if error is not None:
                raise error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the steps: at the end, also after an error, the checkpoint that is being written is finished.

        Where another error ends the run, a warning reports what could not be written.
        """
        try:
            yield
        finally:
            self._writer.shutdown()
            if self._is_saving and self.accelerator.is_main_process and (error := self._saving.exception()):
                self.accelerator.print(f"warning: {error}")

    def resume(self, resume: str) -> None:
        """Go on from `latest`, or a checkpoint folder. ValueError when it is corrupt or of another run."""
        path, corrupt = checkpoint.resolve(resume, self.folder, self.accelerator)
        for line in corrupt:
            self.accelerator.print(f"{line}; falling back to the previous checkpoint")
        self.restore(path)

    def restore(self, path: Path) -> None:
        """Go back, or on, to a checkpoint; ValueError when it is of another run."""
        tensors, progress = checkpoint.load_checkpoint(path, self.mesh)
        check_resumable(path, progress, self.config, self.fingerprint)
        for name, module in self.modules.items():
            if name not in tensors:
                raise ValueError(f"{path} has no weights of {name}: it belongs to another kind of run")
            buffers = {
                key: full_tensor(tensors[name][key]) for key, _ in module.named_buffers() if key in tensors[name]
            }
            own = self._tensors(name)
            frozen = {key: value for key, value in module.state_dict().items() if key not in own}
            load_strict(module, frozen | tensors[name] | buffers, path)
            optimizer_tensors = tensors.get(f"{name}_optimizer", {})  # plain SGD has none
            checkpoint.restore_optimizer(self.optimizers[name], [*self._trained(name)], optimizer_tensors)
            for key, value in tensors[f"{name}_ema"].items():
                self.ema[name].shadow[key].copy_(value)
            self.monitors[name].skipped = progress.get("skipped_steps", {}).get(name, [])  # older ones have counts
        if self.accelerator.scaler is not None and "scaler" in progress:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.stage.load_state_dict(progress.get("stage", {}))
        self.step = progress["step"]

    def _trained(self, name: str) -> dict[str, nn.Parameter]:
        return trained_parameters(self.modules[name])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Trained parameters and buffers of a network, without its frozen parameters."""
        frozen = {key for key, p in self.modules[name].named_parameters() if not p.requires_grad}
        return {key: tensor for key, tensor in self.modules[name].state_dict().items() if key not in frozen}


def check_resumable(path: Path, progress: dict[str, Any], config: TrainingConfig, fingerprint: dict[str, Any]) -> None:
    """ValueError where a checkpoint is of another run, as far as `fingerprint` tells, or past the last step."""
    check_equal(fingerprint, progress["fingerprint"], path, "they must match to resume")
    if progress["step"] > config.steps:
        raise ValueError(f"{path} is at step {progress['step']}, past --steps {config.steps}: raise it")


def _mesh(config: TrainingConfig, accelerator: Accelerator) -> DeviceMesh | None:
    """All ranks in a row, if they shard the weights."""
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("accelerate's own FSDP is not used here: launch without --use_fsdp and pass --fsdp")
    if not config.fsdp or accelerator.num_processes == 1:
        return None
    if accelerator.scaler is not None:
        raise ValueError("--fsdp does not support fp16 loss scaling; use bf16")
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
