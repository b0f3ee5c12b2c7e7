"""Training loop: each trainable takes one optimizer step per iteration; also logging, checkpointing, resuming."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from ldm.commands import resume_command
from ldm.config import config_diff, read_yaml, write_yaml
from ldm.data.batch_sampler import EpochBatchSampler
from ldm.data.loader import Batches, load_batches
from ldm.io.atomic import disk_errors, write_text
from ldm.io.tensors import NonFiniteError
from ldm.ranks import ONE_RANK
from ldm.rng import StepRNG
from ldm.training import checkpoint
from ldm.training.config import TrainingConfig
from ldm.training.distributed import disconnect_at_end, make_accelerator, on_rank0, peer_errors, ranks_of
from ldm.training.ema import copy_params, trained_parameters
from ldm.training.fsdp import full_tensor, no_sync, reshard
from ldm.training.items import check_items, write_items
from ldm.training.lock import only_writer
from ldm.training.logger import RunLogger
from ldm.training.optimizer import gradient_norm, learning_rate, step_clipped
from ldm.training.stage import Stage, Trainable
from ldm.training.state import TrainingState, check_resumable
from ldm.training.stop import STOPPED_FILE, StopRequest

MAX_LISTED = 10  # skipped steps that the end of a run names


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
        fingerprint = fingerprint_without_samples(config, stage)
        fingerprint["data"] = {**fingerprint.get("data", {}), **stage.data.fingerprint()}
        self.state = TrainingState(config, accelerator, stage, fingerprint)
        self._resume_or_start()
        self.networks = self.state.prepare_networks()
        uses_ddp = accelerator.num_processes > 1 and self.state.mesh is None
        self.frees_gradients = not uses_ddp  # those of DDP stay in its buckets
        self.losses: dict[str, Tensor] = {}  # of the last step, with the norms of its gradients

    # The loop.

    def run(self, on_step: Callable[["Trainer"], None]) -> FitResult:
        """Take all remaining steps, or stop where a signal asks for it; `on_step` is called after each."""
        with self.open_logs(self.config.steps), self.state.writing():
            result = self._take_steps(on_step)
        self._print_end(result)
        return result

    def _take_steps(self, on_step: Callable[["Trainer"], None]) -> FitResult:
        stop = StopRequest(timeout=self.config.timeout)
        with stop.listening():
            self._catch_up()
            batches = self.batches(start=self.state.step)
            while self.state.step < self.config.steps:
                self.train_step(batches)
                on_step(self)
                self._log_save_validate()
                if self._go_back():
                    batches = self.batches(start=self.state.step)
                if signal := stop.poll():
                    return self._stopped(signal)
            self._finish_saving()
        if signal := stop.last_answer():
            return self._stopped(signal)
        return self._finished()

    def train_step(self, batches: Batches) -> None:
        """One optimizer step of each trainable."""
        micro_batches = [next(batches) for _ in range(self.config.grad_accum_steps)]
        self.losses = {}
        for trainable in self.stage.trainables:
            if self.state.step >= trainable.start:
                with self._others_frozen(trainable.name):
                    self._optimizer_step(trainable, micro_batches)
        self.stage.after_step(lambda values: self.accelerator.reduce(values, "mean"))
        self.state.step += 1

    @contextmanager
    def _others_frozen(self, name: str) -> Iterator[None]:
        """Only the parameters of one network require a gradient, so its loss leaves none in the others."""
        others = [self.state.modules[other] for other in self.state.modules if other != name]
        parameters = [p for module in others for p in trained_parameters(module).values()]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _optimizer_step(self, trainable: Trainable, micro_batches: list[Any]) -> None:
        name, state, accelerator = trainable.name, self.state, self.accelerator
        optimizer = state.optimizers[name]
        optimizer.zero_grad(set_to_none=self.frees_gradients)

        # Forward and backward. Gradients are averaged over the ranks in the last micro-batch.
        terms: dict[str, Tensor] = {}
        for index, (keys, batch) in enumerate(micro_batches):
            positions = [key.position for key in keys]
            rng = StepRNG(self.config.seed, state.step, positions, self.config.batch_size, accelerator.device)
            with ExitStack() as stack:
                for other, network in self.networks.items():
                    if other != name or index < len(micro_batches) - 1:
                        stack.enter_context(no_sync(accelerator, network))
                with accelerator.autocast():
                    losses = self.stage.loss(name, self.networks, batch, rng)
                accelerator.backward(losses["loss"] / len(micro_batches))
            for key, value in losses.items():
                terms[key] = terms.get(key, 0) + value.detach() / len(micro_batches)

        # The norm of the gradient; a step whose gradient is not finite is skipped on all ranks.
        if accelerator.scaler is not None:  # accelerate's own clipping would unscale the gradients of all networks
            accelerator.scaler.unscale_(optimizer.optimizer)
        parameters = list(trained_parameters(state.modules[name]).values())
        norm, max_norm = full_tensor(gradient_norm(parameters)), self.config.max_grad_norm
        # With fp16 the scaler skips steps whose gradient overflows, which is how it finds its scale.
        checked = norm if accelerator.scaler is None else accelerator.reduce(terms["loss"], "sum")
        nonfinite = state.monitors[name].record(state.step + 1, terms["loss"], checked)

        # Update weights and averages.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, state.step, group["initial_lr"])
        if accelerator.scaler is None:
            step_clipped(optimizer.optimizer, parameters, norm, max_norm, nonfinite)
        else:
            clip_grads_with_norm_(parameters, max_norm, norm)
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
        """Open logs around the steps, and tell at the end what was skipped or left out.

        A collective that fails since another rank is gone is a ValueError.
        """
        self.logs = RunLogger(self.config.run, self.accelerator, steps=steps, start=self.state.step)
        try:
            with closing(self.logs), peer_errors(self.accelerator, self.config.timeout, self.logs.remedy):
                yield
        finally:
            self._report_skipped()
            for part in (self.stage.data, self.stage.held_out, self.stage):
                if report := part.report():
                    self.accelerator.print(report)

    def _log_save_validate(self) -> None:
        config, step = self.config, self.state.step
        last = step == config.steps
        self.logs.step(step)
        if step % config.log_every == 0 or last:
            self.stage.data.sync(gather_object)
        if step % config.log_every == 0:
            self._report_anomalies()
            self.state.finish_saving(wait=False)
            values = self._means(self.losses)
            values["learning_rate"] = self.state.optimizers[self.stage.trainables[0].name].param_groups[0]["lr"]
            self.logs.train(step, values, batch_size=config.batch_size)
        if step % config.checkpoint_every == 0 or last:
            self.save()  # first, so that an error in what follows loses no step
        self._validate_and_sample()

    def _validate_and_sample(self, *, validated: bool = False, sampled: bool = False) -> None:
        """What is due at this step and not done yet."""
        config, step = self.config, self.state.step
        last = step == config.steps
        if (step % config.validate_every == 0 or last) and not validated:
            with self.logs.doing("validating"):
                self.validate()
        if (step % config.sample_every == 0 or last) and not sampled:
            with self.logs.doing("sampling"):
                self.with_ema_weights(lambda: self.logs.image(step, self.stage.sample()))

    def _catch_up(self) -> None:
        """Validate and sample where a run was killed after the checkpoint that it goes on from, and before them."""
        step, logs = self.state.step, self.logs
        if step:
            done = on_rank0(self.accelerator, lambda: (logs.validation[0] == step, logs.sample_file(step).is_file()))
            self._validate_and_sample(validated=done[0], sampled=done[1])
            self._go_back()

    def _go_back(self) -> bool:
        """Whether the stage's watchdog sends training back to its last good checkpoint, and, if so, go there.

        ValueError: there is none, or it was sent back too often.
        """
        watchdog, state, step = self.stage.watchdog, self.state, self.state.step
        if watchdog is None or not (step % self.config.validate_every == 0 or step == self.config.steps):
            return False
        if not watchdog.observe(*on_rank0(self.accelerator, lambda: self.logs.validation)):
            return False
        self._report_anomalies()
        state.finish_saving()
        complaint, seen = watchdog.complaint(), watchdog.state_dict()
        path = on_rank0(self.accelerator, lambda: checkpoint.go_back(state.folder, watchdog.good_step))
        if path is None:
            remedy = f"lower --checkpoint-every, so that there is one by step {watchdog.good_step}, and start again"
            raise ValueError(f"{complaint}, and there is no checkpoint to go back to: {remedy}")
        state.restore(path)
        watchdog.load_state_dict(seen)
        watchdog.go_back(state.step)
        state.save(replace=True)  # with the lower weight, so that a resumed run takes the same course
        state.finish_saving()
        self.logs.start_from(state.step)
        self.logs.print(f"{complaint}: back to {path.name}, with {watchdog.factor:g} of the weight")
        self.logs.write_json(state.step, {"went_back_from": step, "weight_factor": watchdog.factor})
        return True

    def _report_anomalies(self) -> None:
        """Log skipped steps and loss spikes; ValueError when too many consecutive steps were skipped."""
        for name, monitor in self.state.monitors.items():
            anomalies = monitor.collect(lambda values: self.accelerator.reduce(values, "mean"))
            if anomalies.skipped:
                steps, so_far = ", ".join(map(str, anomalies.skipped)), len(monitor.skipped)
                self.logs.print(f"{name}: non-finite gradient, skipped step {steps} ({so_far} skipped so far)")
                self.logs.write_json(self.state.step, {"skipped": anomalies.skipped, "trainable": name})
            for step, loss in anomalies.spikes.items():
                samples = self._batch_sampler(0).indices(step - 1)
                self.logs.print(f"{name}: loss spike: {loss:.4g} at step {step}; its samples are in log.jsonl")
                self.logs.write_json(step, {"spike": loss, "samples": samples, "trainable": name})
            if anomalies.nonfinite_run:
                first, last = anomalies.nonfinite_run
                steps = f"non-finite loss or gradient at steps {first}-{last} (all skipped)"
                raise ValueError(f"{steps}; {self.state.last_good()}")

    def _report_skipped(self) -> None:
        """At the end of a run: how many steps changed nothing, and which."""
        for name, monitor in self.state.monitors.items():
            if count := len(monitor.skipped):
                steps = ", ".join(map(str, monitor.skipped[:MAX_LISTED])) + ", ..." * (count > MAX_LISTED)
                of = f"{count:,} of {self.state.step:,} steps skipped for a non-finite gradient: {steps}"
                self.logs.print(f"{name}: {of}; log.jsonl has all; a lower --learning-rate or float32 may help")

    def validate(self) -> None:
        """Validate with the averaged weights, and log it: each rank its part, but where weights are sharded rank 0."""
        everywhere = self.state.mesh is None
        ranks = ranks_of(self.accelerator) if everywhere else ONE_RANK
        step = self.state.step
        self.with_ema_weights(lambda: self.logs.validate(step, self.stage.validate(ranks)), everywhere=everywhere)

    def with_ema_weights(self, action: Callable[[], Any], *, everywhere: bool = False) -> None:
        """Run on rank 0, or on all, with the averaged weights in place, in eval mode, without gradients."""
        rank0 = self.accelerator.is_main_process
        takes_part = rank0 or everywhere
        if self.frees_gradients:
            for optimizer in self.state.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        with ExitStack() as stack:
            for trainable in self.stage.trainables:
                ema = self.state.ema[trainable.name]
                if self.state.mesh:  # gather into the original module, which waited on the CPU
                    trainable.module.to(self.accelerator.device if rank0 else "meta")
                    copy_params(ema.shadow, trainable.module)
                elif takes_part:
                    stack.enter_context(ema.swapped_in())
                trainable.module.eval()
            if takes_part:
                with torch.no_grad():
                    action()
        for trainable in self.stage.trainables:
            trainable.module.train()
            if self.state.mesh and rank0:
                trainable.module.to("cpu")
        self.accelerator.wait_for_everyone()
        self.logs.restart_clock(self.state.step)

    def _means(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Of all ranks, in one transfer."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self._report_anomalies()
        with self.logs.doing("saving a checkpoint"):
            self.state.save()
        self.logs.restart_clock(self.state.step)

    # Start and end.

    def _resume_or_start(self) -> None:
        config = self.config
        if saved := on_rank0(self.accelerator, lambda: checkpoint.peek(config.resume, self.state.folder)):
            path, progress = saved
            check_items(path, progress, self.state.fingerprint, self.stage.data.item_names())
            self.state.resume(str(config.resume))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (config.run / STOPPED_FILE).unlink(missing_ok=True)
            if saved:
                self._print_changes(path.parent.parent / "config.yaml")
            write_yaml(config.run / "config.yaml", config.model_copy(update={"resume": None}))
            write_items(config.run, self.stage.data.item_names())
            self.accelerator.print(f"configuration: {config.run / 'config.yaml'}")
        settings = {
            "tensorboard": {"purge_step": self.state.step + 1},  # what a killed run wrote past its checkpoint
            "wandb": {"name": str(config.run), "config": config.to_dict()},
        }
        with disk_errors(config.run / "tensorboard"):
            self.accelerator.init_trackers("ldm", init_kwargs=settings)

    def _print_changes(self, file: Path) -> None:
        """Which settings are not those of the recipe, and which are not those of the run so far, `file`."""
        config, recipe = self.config, self.config.config
        try:
            if recipe and recipe.is_file():
                settings = type(config).from_dict(read_yaml(recipe), source=str(recipe))
                if changed := config_diff(settings.to_dict(), config):
                    self.accelerator.print(f"resumed with {recipe}, but {changed}")
            if changed := config_diff(read_yaml(file), config):
                self.accelerator.print(f"config changed since the checkpoint: {changed}")
        except ValueError as error:  # the checkpoint is what counts
            self.accelerator.print(f"{error}; what changed is unknown")

    def _stopped(self, signal: int) -> FitResult:
        self.save()
        self._finish_saving()
        step = self.state.step
        on_rank0(self.accelerator, lambda: write_text(self.config.run / STOPPED_FILE, f"step {step}\n"))
        return FitResult(step, None, signal)

    def _finished(self) -> FitResult:
        folder = self.config.run / "model"
        try:
            with self.logs.doing("saving the model"):
                self.with_ema_weights(lambda: self.stage.save(folder))
        except NonFiniteError as error:  # what `save` measures, as the weights are those of the checkpoint
            raise ValueError(f"{error}; {self.state.last_good()}") from None
        return FitResult(self.state.step, folder)

    def _finish_saving(self) -> None:
        with self.logs.doing("saving a checkpoint"):
            self.state.finish_saving()

    def _print_end(self, result: FitResult) -> None:
        """What the run made, how good it was at its last validation, and the command that goes on from here."""
        if result.model is None:
            command = resume_command(self.config.run)
            self.accelerator.print(f"stopped at step {result.step}; go on with: {command}")
            return
        step, values = self.logs.validation
        measured = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        after = f"; at step {step}: {measured}" if values else ""
        self.accelerator.print(f"finished after {result.step} steps: {result.model}{after}")
        if unknown := ", ".join(name for name, value in values.items() if math.isnan(value)):
            remedy = "the model is of no use; start again with a lower --learning-rate"
            self.accelerator.print(f"warning: {unknown}: NaN, as the weights have grown too large: {remedy}")
        if command := self.stage.next_command():
            self.accelerator.print(f"next: {command}")


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
    return Trainer(config, accelerator, stage).run(on_step)


# A stage class, and what takes a built stage: `fit`, or the doctor.

Config = TypeVar("Config", bound=TrainingConfig, contravariant=True)
Result = TypeVar("Result")


class Buildable(Protocol[Config]):
    """A stage class: makes and loads networks as the configuration says."""

    def build(self, config: Config, accelerator: Accelerator) -> Stage: ...


def train(
    stage_class: Buildable[Config],
    config: Config,
    *,
    fit: Callable[[Config, Accelerator, Stage], Result] = fit,  # type: ignore[assignment]
) -> Result:
    """Build a stage and run it, with `fit` or with what takes its place; what needs no data is checked first."""
    accelerator = make_accelerator(config)
    with disconnect_at_end(accelerator), only_writer(config.run, accelerator):
        saved = on_rank0(accelerator, lambda: checkpoint.peek(config.resume, config.run / "checkpoints"))
        stage = stage_class.build(config, accelerator)
        if saved:
            path, progress = saved
            check_resumable(path, progress, config, fingerprint_without_samples(config, stage))
        stage.open_data(accelerator)
        return fit(config, accelerator, stage)


def fingerprint_without_samples(config: TrainingConfig, stage: Stage) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed, as far as it is known before any data are opened."""
    return {"seed": config.seed, "batch_size": config.batch_size, **stage.fingerprint()}
