"""Training loop: each trainable takes one optimizer step per iteration; also logging, checkpointing, resuming."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ldm.config import config_diff, write_yaml
from ldm.data.batch_sampler import EpochBatchSampler
from ldm.data.loader import Batches, load_batches
from ldm.io.atomic import disk_errors, write_text
from ldm.rng import StepRNG
from ldm.training import checkpoint
from ldm.training.config import TrainingConfig
from ldm.training.distributed import make_accelerator, on_rank0, peer_errors
from ldm.training.ema import copy_params
from ldm.training.fsdp import full_tensor, reshard
from ldm.training.lock import only_writer
from ldm.training.logger import RunLogger
from ldm.training.optimizer import learning_rate, step_if_finite
from ldm.training.stage import Stage, Trainable
from ldm.training.state import TrainingState
from ldm.training.stop import STOPPED_FILE, StopRequest


class FitResult(NamedTuple):
    """Why a training ended: it was finished, or a signal asked it to stop."""

    step: int
    model: Path | None  # folder of the finished model
    signal: int = 0

    @property
    def exit_status(self) -> int:
        """What a script exits with: 0, or 128 + the signal."""
        return 128 + self.signal if self.signal else 0


class Trainer:
    """Takes the steps of a stage. All ranks must do the same."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, stage: Stage) -> None:
        self.config, self.accelerator, self.stage = config, accelerator, stage
        fingerprint = {"seed": config.seed, "batch_size": config.batch_size, **stage.fingerprint()}
        self.state = TrainingState(config, accelerator, stage.trainables, fingerprint)
        self._resume_or_start()
        self.networks = self.state.prepare_networks()
        self.losses: dict[str, Tensor] = {}  # of the last step, with the norms of its gradients

    # The loop.

    def run(self, on_step: Callable[["Trainer"], None]) -> FitResult:
        """Take all remaining steps, or stop where a signal asks for it; `on_step` is called after each."""
        stop, batches = StopRequest(timeout=self.config.timeout), self.batches(start=self.state.step)
        with self.open_logs(self.config.steps):
            with stop.listening():
                while self.state.step < self.config.steps:
                    self.train_step(batches)
                    on_step(self)
                    self._log_validate_save()
                    if signal := stop.poll():
                        return self._stopped(signal)
            if signal := stop.last_answer():
                return self._stopped(signal)
            return self._finished()

    def train_step(self, batches: Batches) -> None:
        """One optimizer step of each trainable."""
        micro_batches = [next(batches) for _ in range(self.config.grad_accum_steps)]
        self.losses = {}
        for trainable in self.stage.trainables:
            self._optimizer_step(trainable, micro_batches)
        self.state.step += 1

    def _optimizer_step(self, trainable: Trainable, micro_batches: list[Any]) -> None:
        name, state, accelerator = trainable.name, self.state, self.accelerator
        optimizer = state.optimizers[name]
        optimizer.zero_grad(set_to_none=True)

        # Forward and backward. DDP averages gradients over the ranks in the last micro-batch, FSDP2 in each.
        terms: dict[str, Tensor] = {}
        for index, (keys, batch) in enumerate(micro_batches):
            positions = [key.position for key in keys]
            rng = StepRNG(self.config.seed, state.step, positions, self.config.batch_size, accelerator.device)
            with ExitStack() as stack:
                for other, network in self.networks.items():
                    if other != name or index < len(micro_batches) - 1:
                        stack.enter_context(accelerator.no_sync(network))
                with accelerator.autocast():
                    losses = self.stage.loss(name, self.networks, batch, rng)
                accelerator.backward(losses["loss"] / len(micro_batches))
            for key, value in losses.items():
                terms[key] = terms.get(key, 0) + value.detach() / len(micro_batches)

        # Clip the gradient; a step whose gradient is not finite is skipped on all ranks.
        if accelerator.scaler is not None:  # accelerate's own clipping would unscale the gradients of all networks
            accelerator.scaler.unscale_(optimizer.optimizer)
        norm = full_tensor(clip_grad_norm_(state.modules[name].parameters(), self.config.max_grad_norm))
        # With fp16 the scaler skips steps whose gradient overflows, which is how it finds its scale.
        checked = norm if accelerator.scaler is None else accelerator.reduce(terms["loss"], "sum")
        nonfinite = state.monitors[name].record(state.step + 1, terms["loss"], checked)

        # Update weights and averages.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, state.step, group["initial_lr"])
        if accelerator.scaler is None:
            step_if_finite(optimizer.optimizer, nonfinite)
        else:
            optimizer.step()
        state.ema[name].update(state.step)
        for module in state.modules.values():
            reshard(module)
        prefix = "" if trainable is self.stage.trainables[0] else f"{name}_"
        self.losses |= {prefix + key: value for key, value in terms.items()} | {f"{prefix}gradient_norm": norm}

    # What the loop calls around the steps.

    def batches(self, *, start: int) -> Batches:
        """The micro-batches of this rank from step `start` on."""
        config = self.config
        return load_batches(
            self.stage.data,
            self._batch_sampler(start),
            num_workers=config.num_workers,
            timeout=config.timeout,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _batch_sampler(self, start: int) -> EpochBatchSampler:
        return self.stage.data.make_batch_sampler(
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            start=start,
            grad_accum_steps=self.config.grad_accum_steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    @contextmanager
    def open_logs(self, steps: int) -> Iterator[None]:
        """Open logs around the steps; a collective that fails since another rank is gone is a ValueError."""
        self.logs = RunLogger(self.config.run, self.accelerator, steps=steps, start=self.state.step)
        remedy = "restart with --resume latest"
        with closing(self.logs), peer_errors(self.accelerator, self.config.timeout, remedy):
            yield

    def _log_validate_save(self) -> None:
        config, step = self.config, self.state.step
        last = step == config.steps
        self.logs.step(step)
        if step % config.log_every == 0 or last:
            self.stage.data.sync(gather_object)
        if step % config.log_every == 0:
            self._report_anomalies()
            values = {name: self._mean(value) for name, value in self.losses.items()}
            values["learning_rate"] = self.state.optimizers[self.stage.trainables[0].name].param_groups[0]["lr"]
            self.logs.train(step, values, batch_size=config.batch_size)
        if step % config.validate_every == 0 or last:
            self.with_ema_weights(lambda: self.logs.write(step, self.stage.validate()))
        if step % config.sample_every == 0 or last:
            self.with_ema_weights(lambda: self.logs.image(step, self.stage.sample()))
        if step % config.checkpoint_every == 0 or last:
            self.save()

    def _report_anomalies(self) -> None:
        """Log skipped steps and loss spikes; ValueError when too many consecutive steps were skipped."""
        for name, monitor in self.state.monitors.items():
            anomalies = monitor.collect(lambda values: self.accelerator.reduce(values, "mean"))
            if anomalies.skipped:
                steps = ", ".join(map(str, anomalies.skipped))
                self.logs.print(f"{name}: non-finite gradient, skipped step {steps} ({monitor.skipped} skipped so far)")
                self.logs.write_json(self.state.step, {"skipped": anomalies.skipped, "trainable": name})
            for step, loss in anomalies.spikes.items():
                samples = self._batch_sampler(0).indices(step - 1)
                self.logs.print(f"{name}: loss spike: {loss:.4g} at step {step}; its samples are in log.jsonl")
                self.logs.write_json(step, {"spike": loss, "samples": samples, "trainable": name})
            if anomalies.nonfinite_run:
                first, last = anomalies.nonfinite_run
                saved = checkpoint.latest(self.state.folder)
                remedy = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
                raise ValueError(
                    f"non-finite loss or gradient at steps {first}-{last} (all skipped); {remedy}: try a lower "
                    "--learning-rate or float32"
                )

    def with_ema_weights(self, action: Callable[[], Any]) -> None:
        """Run on rank 0 with the averaged weights in place, in eval mode, without gradients."""
        rank0 = self.accelerator.is_main_process
        with ExitStack() as stack:
            for trainable in self.stage.trainables:
                ema = self.state.ema[trainable.name]
                if self.state.mesh:  # gather into the original module, which waited on the CPU
                    trainable.module.to(self.accelerator.device if rank0 else "meta")
                    copy_params(ema.shadow, trainable.module)
                elif rank0:
                    stack.enter_context(ema.swapped_in())
                trainable.module.eval()
            if rank0:
                with torch.no_grad():
                    action()
        for trainable in self.stage.trainables:
            trainable.module.train()
            if self.state.mesh and rank0:
                trainable.module.to("cpu")
        self.accelerator.wait_for_everyone()
        self.logs.restart_clock(self.state.step)

    def _mean(self, value: Tensor) -> float:
        return self.accelerator.reduce(value.detach().float().clone(), "mean").item()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self._report_anomalies()
        self.state.save()
        self.logs.restart_clock(self.state.step)

    # Start and end.

    def _resume_or_start(self) -> None:
        config = self.config
        if config.resume:
            self.state.resume(config.resume)
        elif (found := checkpoint.latest(self.state.folder)) is not None:
            raise ValueError(f"{config.run} already has {found.name}: pass --resume latest, or choose another --run")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (config.run / STOPPED_FILE).unlink(missing_ok=True)
            file = config.run / "config.yaml"
            if config.resume and file.is_file():
                self._log_config_diff(file)
            write_yaml(file, config)
            self.accelerator.print(f"configuration: {file}")
        settings = {
            "tensorboard": {"purge_step": self.state.step + 1},  # what a killed run wrote past its checkpoint
            "wandb": {"name": str(config.run), "config": config.to_dict()},
        }
        with disk_errors(config.run / "tensorboard"):
            self.accelerator.init_trackers("ldm", init_kwargs=settings)

    def _log_config_diff(self, file: Path) -> None:
        try:
            if changed := config_diff(file, self.config):
                self.accelerator.print(f"config changed since the checkpoint: {'; '.join(changed)}")
        except ValueError as error:  # the checkpoint is what counts
            self.accelerator.print(f"{error}; the changes since the checkpoint are unknown")

    def _stopped(self, signal: int) -> FitResult:
        self.save()
        step = self.state.step
        on_rank0(self.accelerator, lambda: write_text(self.config.run / STOPPED_FILE, f"step {step}\n"))
        self.logs.print(f"stopped at step {step}; restart with --resume latest")
        self.state.finish_hashing()
        return FitResult(step, None, signal)

    def _finished(self) -> FitResult:
        folder = self.config.run / "model"
        self.with_ema_weights(lambda: self.stage.save(folder))
        self.state.finish_hashing()
        return FitResult(self.state.step, folder)


def fit(
    config: TrainingConfig,
    accelerator: Accelerator,
    stage: Stage,
    *,
    on_step: Callable[[Trainer], None] = lambda trainer: None,
) -> FitResult:
    """Train until `config.steps`, or a signal.

    ValueError: nothing to resume, a run folder in use, a checkpoint of another run, a loss that is not finite.
    """
    with only_writer(config.run, accelerator):
        return Trainer(config, accelerator, stage).run(on_step)


# A stage class, and what takes a built stage: `fit`, or the doctor.

Config = TypeVar("Config", bound=TrainingConfig, contravariant=True)
Result = TypeVar("Result")


class Buildable(Protocol[Config]):
    """A stage class: opens data and frozen networks as the configuration says."""

    def build(self, config: Config, accelerator: Accelerator) -> Stage: ...


def train(
    stage_class: Buildable[Config],
    config: Config,
    *,
    fit: Callable[[Config, Accelerator, Stage], Result] = fit,  # type: ignore[assignment]
) -> Result:
    """Build a stage and run it, with `fit` or with what takes its place."""
    accelerator = make_accelerator(config)
    stage = stage_class.build(config, accelerator)
    try:
        return fit(config, accelerator, stage)
    finally:
        for data in (stage.data, stage.held_out):
            if report := data.report():
                accelerator.print(report)
