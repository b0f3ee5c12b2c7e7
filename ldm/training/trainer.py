"""TODO."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ldm.config import config_diff, write_yaml
from ldm.data.batch_sampler import SampleKey
from ldm.data.loader import Batches, _next_batch, batch_sampler_for_rank, make_loader
from ldm.io.atomic import disk_errors, write_text
from ldm.io.tensors import load_strict
from ldm.rng import StepRNG
from ldm.training import checkpoint
from ldm.training.anomalies import AnomalyMonitor
from ldm.training.config import TrainingConfig
from ldm.training.distributed import _has_launcher, is_peer_failure
from ldm.training.ema import EMA
from ldm.training.fsdp import apply_fsdp, full_tensor
from ldm.training.logger import RunLogger
from ldm.training.schedule import learning_rate
from ldm.training.stage import Batch, Stage, Trainable
from ldm.training.stop import STOP_SIGNALS, STOPPED_FILE


def fit(config: TrainingConfig, accelerator: Accelerator, stage: Stage) -> Path:
    """Train until `config.steps`, or a signal, and return the folder of the finished model.

    ValueError: nothing to resume, a run folder in use, a checkpoint of another run, a loss that is not finite.
    """
    trainer = Trainer(config, accelerator, stage)
    order = batch_sampler_for_rank(config, accelerator, stage, start=trainer.step)
    trainer.samples_of = order.indices
    return trainer.run(make_loader(config, accelerator, stage, order))


class Trainer:
    """The state of a run: prepared modules, optimizers, averages and the number of the next step."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, stage: Stage) -> None:
        self.config, self.accelerator, self.players, self.hooks = config, accelerator, stage.trainables, stage.hooks
        self.identity = {"seed": config.seed, "batch_size": config.batch_size, **stage.fingerprint}
        self.folder = config.run / "checkpoints"
        self.step = 0
        self.mesh = self._mesh()
        layout = torch.contiguous_format if config.fsdp else torch.channels_last  # FSDP2 takes no other
        for player in self.players:
            player.module.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
        self.modules = {p.name: apply_fsdp(p.module, self.mesh) if self.mesh else p.module for p in self.players}
        self.optimizers = {
            name: accelerator.prepare_optimizer(self._optimizer(module)) for name, module in self.modules.items()
        }
        self.ema = {name: EMA(module, config.ema_decay) for name, module in self.modules.items()}
        self.health = {p.name: AnomalyMonitor(limit=config.max_nonfinite_steps) for p in self.players}
        self._resume_or_start()
        self.prepared = {
            name: accelerator.prepare_model(module, evaluation_mode=self.mesh is not None)  # without DDP around it
            for name, module in self.modules.items()
        }
        self.stop_signal: int | None = None
        self.launcher = os.getppid() if _has_launcher() else None
        self.samples_of: Callable[[int], list[int]] = lambda step: []
        self.report: dict[str, Tensor] = {}

    def _mesh(self) -> DeviceMesh | None:
        """All processes in a row, if they share out the weights."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("accelerate's own FSDP is not used here: launch without --use-fsdp and pass --fsdp")
        if not self.config.fsdp or self.accelerator.num_processes == 1:
            return None
        if self.accelerator.scaler is not None:
            raise ValueError("shard: not with fp16, whose scaled gradients it does not share; take bf16")
        return init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))

    def _optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        trained = [p for p in module.parameters() if p.requires_grad]
        config = self.config
        return torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def run(self, batches: Batches) -> Path:
        """Take all remaining steps."""
        with self.open_logs(self.config.steps):
            with self._signals():
                while self.step < self.config.steps:
                    self.train_step(batches)
                    self._after_step()
                    if wish := self._stop_requested():
                        self.save()
                        self._on_rank0(lambda: write_text(self.config.run / STOPPED_FILE, f"step {self.step}\n"))
                        self.logs.print(f"stopped at step {self.step}; continue with --resume latest")
                        raise SystemExit(128 + wish)
            return self._finish()

    @contextmanager
    def open_logs(self, steps: int) -> Iterator[None]:
        """What steps need around them: open logs, and a ValueError when another process is gone."""
        self.logs = RunLogger(self.config.run, self.accelerator, steps=steps, start=self.step)
        try:
            yield
        except RuntimeError as error:
            if not is_peer_failure(self.accelerator, error):
                raise
            raise ValueError(
                f"another process did not answer within {self.config.timeout} s at step {self.step}, or is gone: look "
                "at what it said; --resume latest goes on from the last checkpoint"
            ) from None
        finally:
            self.logs.close()

    def train_step(self, batches: Batches) -> None:
        """One optimizer step of each player; `report` then holds its losses and the norms of its gradients."""
        rounds = [_next_batch(batches) for _ in range(self.config.grad_accum_steps)]
        self.report = {}
        for player in self.players:
            self._optimizer_step(player, rounds)
        self.step += 1

    def _optimizer_step(self, player: Trainable, rounds: list[tuple[list[SampleKey], Batch]]) -> None:
        module, optimizer = self.prepared[player.name], self.optimizers[player.name]
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, (keys, batch) in enumerate(rounds):
            last = number == len(rounds) - 1
            positions = [key.position for key in keys]
            draws = StepRNG(self.config.seed, self.step, positions, self.config.batch_size, self.accelerator.device)
            with nullcontext() if last else self.accelerator.no_sync(module):
                with self.accelerator.autocast():
                    terms = player.loss(module, _to_device(batch, self.accelerator.device), draws)
                self.accelerator.backward(terms["loss"] / len(rounds))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(rounds)
        norm = full_tensor(self.accelerator.clip_grad_norm_(module.parameters(), self.config.max_grad_norm))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        # With fp16 the scaler skips steps whose gradient overflows, which is how it finds its scale.
        judged = norm if self.accelerator.scaler is None else self.accelerator.reduce(sums["loss"], "sum")
        skip = self.health[player.name].record(self.step + 1, sums["loss"], judged)
        if self.accelerator.scaler is None:
            optimizer.optimizer.found_inf = skip
        optimizer.step()
        self.ema[player.name].update(self.step)
        prefix = "" if player is self.players[0] else f"{player.name}_"
        self.report |= {prefix + name: value for name, value in sums.items()} | {prefix + "gradient_norm": norm}

    def _report_anomalies(self) -> None:
        """Tell which steps were skipped and which losses jumped; ValueError when too many in a row were skipped."""
        for name, health in self.health.items():
            found = health.collect(lambda values: self.accelerator.reduce(values, "mean"))
            if found.skipped:
                steps = ", ".join(map(str, found.skipped))
                self.logs.print(f"{name}: the gradient was not finite, skipped: step {steps}; {health.skipped} so far")
                self.logs.write_json(self.step, {"skipped": found.skipped, "player": name})
            for step, loss in found.spikes.items():
                samples = self.samples_of(step - 1)
                self.logs.print(f"{name}: the loss jumped to {loss:.4g} at step {step}; its samples are in log.jsonl")
                self.logs.write_json(step, {"spike": loss, "samples": samples, "player": name})
            if found.nonfinite_run:
                first, last = found.nonfinite_run
                kept = checkpoint.latest(self.folder)
                remedy = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
                raise ValueError(
                    f"loss or gradient is not finite at step {first}, and at all up to {last}, which were skipped; "
                    f"{remedy}: try a lower --learning-rate or float32"
                )

    def _after_step(self) -> None:
        config, step = self.config, self.step
        self.logs.step(step)
        if step % config.log_every == 0 or step == config.steps:
            self.hooks.check()
        if step % config.log_every == 0:
            self._report_anomalies()
            values = {name: self._mean(value) for name, value in self.report.items()}
            values["learning_rate"] = learning_rate(config, step - 1)
            self.logs.train(step, values, batch_size=config.batch_size)
        last = step == config.steps
        if step % config.validate_every == 0 or last:
            self.with_ema_weights(lambda: self.logs.write(step, self.hooks.validate()))
        if step % config.sample_every == 0 or last:
            self.with_ema_weights(self._sample)
        if step % config.checkpoint_every == 0 or last:
            self.save()

    def _sample(self) -> None:
        image = self.hooks.sample()
        if image is not None:
            self.logs.image(self.step, image)

    def with_ema_weights(self, action: Callable[[], Any]) -> None:
        """Run on the main process with the averaged weights in place, in eval mode."""
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            for player in self.players:
                if self.mesh:
                    player.module.to(self.accelerator.device if main else "meta")  # it waited on the CPU
                    self.ema[player.name].copy_to(player.module)
                elif main:
                    stack.enter_context(self.ema[player.name].swapped_in())
                player.module.eval()
            if main:
                with torch.no_grad():
                    action()
        for player in self.players:
            player.module.train()
            if self.mesh and main:
                player.module.to("cpu")
        self.accelerator.wait_for_everyone()
        self.logs.restart_clock(self.step)

    def _mean(self, value: Tensor) -> float:
        return self.accelerator.reduce(value.detach().float().clone(), "mean").item()

    def _finish(self) -> Path:
        folder = self.config.run / "model"
        self.with_ema_weights(lambda: self.hooks.save_model(folder))
        return folder

    # Saving and resuming.

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self._report_anomalies()
        tensors: dict[str, checkpoint.Tensors] = {}
        for name, module in self.modules.items():
            tensors[name] = module.state_dict()
            tensors[f"{name}_ema"] = self.ema[name].shadow
            tensors[f"{name}_optimizer"] = checkpoint.optimizer_tensors(self.optimizers[name], _trainable_names(module))
        progress: dict[str, Any] = {"fingerprint": self.identity}
        progress["skipped"] = {name: health.skipped for name, health in self.health.items()}
        if self.accelerator.scaler is not None:  # fp16
            progress["scaler"] = self.accelerator.scaler.state_dict()
        kept, parts = self.config.keep_checkpoints, self.mesh is not None
        checkpoint.save_checkpoint(
            self.folder, self.step, tensors, progress, keep=kept, on_main=self._on_rank0, parts=parts
        )
        self.logs.restart_clock(self.step)

    def _resume_or_start(self) -> None:
        config = self.config
        if config.resume:
            path, damaged = self._on_rank0(lambda: checkpoint.resolve(str(config.resume), self.folder))
            for line in damaged:
                self.accelerator.print(f"{line}, going on from the one before")
            self.restore(path)
        elif (found := checkpoint.latest(self.folder)) is not None:
            raise ValueError(
                f"{config.run} already holds {found.name}: go on with --resume latest, or choose another --run"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (config.run / STOPPED_FILE).unlink(missing_ok=True)
            told = config.run / "config.yaml"
            if config.resume and told.is_file():
                self._log_config_diff(told)
            write_yaml(told, config)
            self.accelerator.print(f"configuration: {told}")
        settings = {
            "tensorboard": {"purge_step": self.step + 1},  # what a run that was killed told past its checkpoint
            "wandb": {"name": str(config.run), "config": config.to_dict()},
        }
        with disk_errors(config.run / "tensorboard"):
            self.accelerator.init_trackers("ldm", init_kwargs=settings)

    def _log_config_diff(self, told: Path) -> None:
        try:
            if changed := config_diff(told, self.config):
                self.accelerator.print(f"resumed with other settings than before: {'; '.join(changed)}")
        except ValueError as error:  # the checkpoint is what counts
            self.accelerator.print(f"{error}; which settings changed is not known")

    def _on_rank0(self, action: Callable[[], Any]) -> Any:
        """Do something on the main process; its result, or its ValueError, is that of all."""
        result: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                result = [action()]
            except ValueError as error:
                result = [error]
        result = broadcast_object_list(result)
        if isinstance(result[0], ValueError):
            raise result[0]
        return result[0]

    def restore(self, path: Path) -> None:
        """Go back, or on, to a checkpoint; ValueError when it is of another run."""
        groups = [group for name in self.modules for group in (name, f"{name}_ema", f"{name}_optimizer")]
        tensors, progress = checkpoint.load_checkpoint(path, groups, self.mesh)
        for key, value in self.identity.items():
            before = progress["fingerprint"].get(key)
            if before != value:
                raise ValueError(
                    f"{path} was made with {key} {before}, this run has {value}: resume with the same {key}"
                )
        if progress["step"] > self.config.steps:
            raise ValueError(
                f"{path} is at step {progress['step']}, past the {self.config.steps} steps asked for (--steps)"
            )
        for name, module in self.modules.items():
            buffers = {
                key: full_tensor(tensors[name][key]) for key, _ in module.named_buffers() if key in tensors[name]
            }
            load_strict(module, tensors[name] | buffers, path)
            checkpoint.restore_optimizer(self.optimizers[name], _trainable_names(module), tensors[f"{name}_optimizer"])
            for key, value in tensors[f"{name}_ema"].items():
                self.ema[name].shadow[key].copy_(value)
        if self.accelerator.scaler is not None and "scaler" in progress:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        for name, health in self.health.items():
            health.skipped = progress["skipped"][name]
        self.step = progress["step"]

    # Signals.

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn Ctrl-C, and what schedulers announce the end with, into a wish to stop after the step.

        A second Ctrl-C stops at once.
        """

        def wish(number: int, _: FrameType | None) -> None:
            if self.stop_signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self.stop_signal = number

        old = {number: signal.signal(number, wish) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop_requested(self) -> int:
        """The signal that asked any process to stop, or 0: all of them save the same step, and end with one code.

        `accelerate launch` hands no signal on to a single process, which sees that its launcher is gone.
        """
        gone = self.launcher not in (None, os.getppid())
        wish = self.stop_signal or (int(signal.SIGTERM) if gone else 0)
        if self.accelerator.num_processes == 1:
            return wish
        return int(self.accelerator.gather(torch.tensor([wish], device=self.accelerator.device)).max())


def _trainable_names(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
