"""The one training loop: given players, batches and a loss for each player, it steps, logs, saves and resumes."""

import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    is_wandb_available,
    set_seed,
)
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, Dataset

from ldm.config import ScriptConfig, changes, write_yaml
from ldm.data import CaptionedImages
from ldm.data.order import Key, Order
from ldm.files import disk_errors, write_text
from ldm.keyed import Draws
from ldm.training import checkpoint
from ldm.training.ema import EMA
from ldm.training.health import Health
from ldm.training.logs import Logs
from ldm.training.sharding import sharded, whole
from ldm.weights import fill

Batch = Mapping[str, Any]
Batches = Iterator[tuple[list[Key], Batch]]
STOPPED = "stopped"  # file of a run that a signal ended, for schedulers: launchers change the exit code
LOST = re.compile("timed? ?out|connection (closed|reset)|peer", re.IGNORECASE)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class TrainingConfig(ScriptConfig):
    """What all training scripts share."""

    run: Path = Path("runs/untitled")
    """folder for everything that the run writes"""
    steps: int = Field(1000, ge=1)
    """optimizer steps"""
    batch_size: int = Field(64, ge=1)
    """images in an optimizer step, over all processes and micro-batches"""
    accumulate: int = Field(1, ge=1)
    """micro-batches in an optimizer step"""
    seed: int = 0
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(100, ge=0)
    """steps in which the learning rate rises from 0"""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """how the learning rate goes on after the warm-up; cosine and linear end at 0"""
    max_norm: float = Field(1.0, gt=0)
    """a gradient with a larger norm is scaled down to it"""
    max_skipped: int = Field(10, ge=0)
    """steps in a row that may be skipped, since their gradient is not finite, before the run stops"""
    ema: float = Field(0.999, ge=0, lt=1)
    """decay of the averaged weights, which validation, samples and the final model use"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    shard: bool = False
    """split weights, averages and the optimizer's state over the processes (FSDP2): less memory, more traffic"""
    workers: int = Field(0, ge=0)
    """processes that load data"""
    timeout: int = Field(1800, ge=1, le=10**8)
    """seconds after which a process that waits for another one, or for data, gives up"""
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(500, ge=1)
    sample_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """where scalars go beside log.jsonl"""
    resume: str | None = None
    """`latest`, or the folder of a checkpoint"""


@dataclass(frozen=True)
class Player:
    """A module, with an optimizer of its own, and the loss that this optimizer minimizes.

    `loss(module, batch, draws)` returns scalar tensors by name and minimizes "loss". It is given the prepared module
    and must call it through its forward. A VAE has one player; with a discriminator there are two, stepped in turn.
    """

    name: str
    module: nn.Module
    loss: Callable[[nn.Module, Batch, Draws], dict[str, Tensor]]


@dataclass(frozen=True)
class Hooks:
    """What a stage does beside training; called with the averaged weights in place, on the main process only.

    But `check` is called on every process, at every line of the log; a ValueError of it ends the run.
    """

    validate: Callable[[], dict[str, float]]
    sample: Callable[[], Image.Image | None]
    save_model: Callable[[Path], None]
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Stage:
    """What is trained, and on what.

    `identity` is what a checkpoint must agree on to be resumed: whatever decides the data, their order and the model.
    `order` makes the order of the samples: see `Order` for what it is given.
    """

    players: list[Player]
    data: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    hooks: Hooks
    identity: dict[str, Any]
    order: Callable[..., Order]


Fit = Callable[[TrainingConfig, Accelerator, Stage], Path]  # `fit`, or what takes its place


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's engine, with precision and devices as `accelerate launch` was told."""
    if "wandb" in config.trackers and not is_wandb_available():
        raise ValueError("trackers: wandb is not installed; `pip install wandb` or leave it out")
    folders = ProjectConfiguration(str(config.run), logging_dir=str(config.run / "tensorboard"))
    accelerator = Accelerator(
        log_with=list(config.trackers) or None, project_config=folders, kwargs_handlers=[patience(config.timeout)]
    )
    set_seed(config.seed)  # initial weights; every later draw is keyed
    if accelerator.device.type == "cpu":
        _share_cores()
    return accelerator


def patience(seconds: int) -> InitProcessGroupKwargs:
    """How long processes wait for each other, as accelerate wants to be told."""
    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def gather_of(accelerator: Accelerator) -> Callable[[list[int]], list[int]]:
    """A function that joins the lists of all processes."""
    return lambda own: gather_object(own) if accelerator.num_processes > 1 else own


def is_lost(accelerator: Accelerator, error: RuntimeError) -> bool:
    """Whether a collective operation failed since another process is gone; torch has no type for that."""
    return accelerator.num_processes > 1 and LOST.search(str(error)) is not None


def _launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _share_cores() -> None:
    """Undo the one thread a process that launchers set where they find no GPU: share out all cores."""
    if _launched() and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, from 0."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup, 1))
    done = min(1.0, max(0.0, (step - config.warmup) / max(config.steps - config.warmup, 1)))
    if config.decay == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate * (1 - done) if config.decay == "linear" else rate


def fit(config: TrainingConfig, accelerator: Accelerator, stage: Stage) -> Path:
    """Train until `config.steps`, or a signal, and return the folder of the finished model.

    ValueError: nothing to resume, a run folder in use, a checkpoint of another run, a loss that is not finite.
    """
    trainer = Trainer(config, accelerator, stage)
    order = order_of(config, accelerator, stage, start=trainer.step)
    trainer.samples_of = order.indices
    return trainer.run(batches_of(config, accelerator, stage, order))


def order_of(config: TrainingConfig, accelerator: Accelerator, stage: Stage, *, start: int) -> Order:
    """Which samples this process takes from step `start` on."""
    cut = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "start": start,
        "accumulate": config.accumulate,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
    }
    return stage.order(**cut)


def batches_of(config: TrainingConfig, accelerator: Accelerator, stage: Stage, order: Order) -> Batches:
    """The micro-batches of this process with the keys of their samples, loaded as the configuration says."""
    loader = DataLoader(
        KeyedDataset(stage.data),
        batch_sampler=order,
        collate_fn=KeyedCollate(stage.collate),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        worker_init_fn=_in_own_group,
        timeout=config.timeout if config.workers else 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


def _in_own_group(worker: int) -> None:
    """Spare a loading process the signals to the group of a run, which answers them itself and needs it until then."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class KeyedDataset(Dataset[tuple[Key, Any]]):
    """Hands each sample on together with its key."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitems__(self, keys: list[Key]) -> list[tuple[Key, Any]]:
        if isinstance(self.data, CaptionedImages):
            self.data.expect(keys)
        return [(key, self.data[key]) for key in keys]


class KeyedCollate:
    """Collates samples and keeps their keys."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[Key, Any]]) -> tuple[list[Key], Batch]:
        return [key for key, _ in samples], self.collate([sample for _, sample in samples])


class Trainer:
    """The state of a run: prepared modules, optimizers, averages and the number of the next step."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, stage: Stage) -> None:
        self.config, self.accelerator, self.players, self.hooks = config, accelerator, stage.players, stage.hooks
        self.identity = {"seed": config.seed, "batch_size": config.batch_size, **stage.identity}
        self.folder = config.run / "checkpoints"
        self.step = 0
        self.mesh = self._mesh()
        layout = torch.contiguous_format if config.shard else torch.channels_last  # FSDP2 takes no other
        for player in self.players:
            player.module.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
        self.modules = {p.name: sharded(p.module, self.mesh) if self.mesh else p.module for p in self.players}
        self.optimizers = {
            name: accelerator.prepare_optimizer(self._optimizer(module)) for name, module in self.modules.items()
        }
        self.ema = {name: EMA(module, config.ema) for name, module in self.modules.items()}
        self.health = {p.name: Health(limit=config.max_skipped) for p in self.players}
        self._resume_or_start()
        self.prepared = {
            name: accelerator.prepare_model(module, evaluation_mode=self.mesh is not None)  # without DDP around it
            for name, module in self.modules.items()
        }
        self.stop_signal: int | None = None
        self.launcher = os.getppid() if _launched() else None
        self.samples_of: Callable[[int], list[int]] = lambda step: []
        self.report: dict[str, Tensor] = {}

    def _mesh(self) -> DeviceMesh | None:
        """All processes in a row, if they share out the weights."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("accelerate's own FSDP is not used here: launch without --use_fsdp and pass --shard")
        if not self.config.shard or self.accelerator.num_processes == 1:
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
        with self.logging(self.config.steps):
            with self._signals():
                while self.step < self.config.steps:
                    self.train_step(batches)
                    self._after_step()
                    if wish := self._wish():
                        self.save()
                        self._on_main(lambda: write_text(self.config.run / STOPPED, f"step {self.step}\n"))
                        self.logs.say(f"stopped at step {self.step}; continue with --resume latest")
                        raise SystemExit(128 + wish)
            return self._finish()

    @contextmanager
    def logging(self, steps: int) -> Iterator[None]:
        """What steps need around them: open logs, and a ValueError when another process is gone."""
        self.logs = Logs(self.config.run, self.accelerator, steps=steps, start=self.step)
        try:
            yield
        except RuntimeError as error:
            if not is_lost(self.accelerator, error):
                raise
            raise ValueError(
                f"another process did not answer within {self.config.timeout} s at step {self.step}, or is gone: look "
                "at what it said; --resume latest goes on from the last checkpoint"
            ) from None
        finally:
            self.logs.close()

    def train_step(self, batches: Batches) -> None:
        """One optimizer step of each player; `report` then holds its losses and the norms of its gradients."""
        rounds = [_next(batches) for _ in range(self.config.accumulate)]
        self.report = {}
        for player in self.players:
            self._player_step(player, rounds)
        self.step += 1

    def _player_step(self, player: Player, rounds: list[tuple[list[Key], Batch]]) -> None:
        module, optimizer = self.prepared[player.name], self.optimizers[player.name]
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, (keys, batch) in enumerate(rounds):
            last = number == len(rounds) - 1
            positions = [key.position for key in keys]
            draws = Draws(self.config.seed, self.step, positions, self.config.batch_size, self.accelerator.device)
            with nullcontext() if last else self.accelerator.no_sync(module):
                with self.accelerator.autocast():
                    terms = player.loss(module, _to_device(batch, self.accelerator.device), draws)
                self.accelerator.backward(terms["loss"] / len(rounds))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(rounds)
        norm = whole(self.accelerator.clip_grad_norm_(module.parameters(), self.config.max_norm))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        # With fp16 the scaler skips steps whose gradient overflows, which is how it finds its scale.
        judged = norm if self.accelerator.scaler is None else self.accelerator.reduce(sums["loss"], "sum")
        skip = self.health[player.name].note(self.step + 1, sums["loss"], judged)
        if self.accelerator.scaler is None:
            optimizer.optimizer.found_inf = skip
        optimizer.step()
        self.ema[player.name].update(self.step)
        prefix = "" if player is self.players[0] else f"{player.name}_"
        self.report |= {prefix + name: value for name, value in sums.items()} | {prefix + "gradient_norm": norm}

    def _check_health(self) -> None:
        """Tell which steps were skipped and which losses jumped; ValueError when too many in a row were skipped."""
        for name, health in self.health.items():
            found = health.look(lambda values: self.accelerator.reduce(values, "mean"))
            if found.skipped:
                steps = ", ".join(map(str, found.skipped))
                self.logs.say(f"{name}: the gradient was not finite, skipped: step {steps}; {health.skipped} so far")
                self.logs.note(self.step, {"skipped": found.skipped, "player": name})
            for step, loss in found.spikes.items():
                samples = self.samples_of(step - 1)
                self.logs.say(f"{name}: the loss jumped to {loss:.4g} at step {step}; its samples are in log.jsonl")
                self.logs.note(step, {"spike": loss, "samples": samples, "player": name})
            if found.row:
                first, last = found.row
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
            self._check_health()
            values = {name: self._mean(value) for name, value in self.report.items()}
            values["learning_rate"] = learning_rate(config, step - 1)
            self.logs.train(step, values, batch_size=config.batch_size)
        last = step == config.steps
        if step % config.validate_every == 0 or last:
            self.with_averages(lambda: self.logs.write(step, self.hooks.validate()))
        if step % config.sample_every == 0 or last:
            self.with_averages(self._sample)
        if step % config.checkpoint_every == 0 or last:
            self.save()

    def _sample(self) -> None:
        image = self.hooks.sample()
        if image is not None:
            self.logs.picture(self.step, image)

    def with_averages(self, action: Callable[[], Any]) -> None:
        """Run on the main process with the averaged weights in place, in eval mode."""
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            for player in self.players:
                if self.mesh:
                    player.module.to(self.accelerator.device if main else "meta")  # it waited on the CPU
                    self.ema[player.name].gather(player.module)
                elif main:
                    stack.enter_context(self.ema[player.name].applied())
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
        self.with_averages(lambda: self.hooks.save_model(folder))
        return folder

    # Saving and resuming.

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self._check_health()
        tensors: dict[str, checkpoint.Tensors] = {}
        for name, module in self.modules.items():
            tensors[name] = module.state_dict()
            tensors[f"{name}_ema"] = self.ema[name].shadow
            tensors[f"{name}_optimizer"] = checkpoint.optimizer_tensors(self.optimizers[name], _trained(module))
        progress: dict[str, Any] = {"identity": self.identity}
        progress["skipped"] = {name: health.skipped for name, health in self.health.items()}
        if self.accelerator.scaler is not None:  # fp16
            progress["scaler"] = self.accelerator.scaler.state_dict()
        kept, parts = self.config.keep_checkpoints, self.mesh is not None
        checkpoint.save_checkpoint(
            self.folder, self.step, tensors, progress, keep=kept, on_main=self._on_main, parts=parts
        )
        self.logs.restart_clock(self.step)

    def _resume_or_start(self) -> None:
        config = self.config
        if config.resume:
            path, damaged = self._on_main(lambda: checkpoint.resolve(str(config.resume), self.folder))
            for line in damaged:
                self.accelerator.print(f"{line}, going on from the one before")
            self.restore(path)
        elif (found := checkpoint.latest(self.folder)) is not None:
            raise ValueError(
                f"{config.run} already holds {found.name}: go on with --resume latest, or choose another --run"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (config.run / STOPPED).unlink(missing_ok=True)
            told = config.run / "config.yaml"
            if config.resume and told.is_file():
                self._tell_changes(told)
            write_yaml(told, config)
            self.accelerator.print(f"configuration: {told}")
        settings = {
            "tensorboard": {"purge_step": self.step + 1},  # what a run that was killed told past its checkpoint
            "wandb": {"name": str(config.run), "config": config.to_dict()},
        }
        with disk_errors(config.run / "tensorboard"):
            self.accelerator.init_trackers("ldm", init_kwargs=settings)

    def _tell_changes(self, told: Path) -> None:
        try:
            if changed := changes(told, self.config):
                self.accelerator.print(f"resumed with other settings than before: {'; '.join(changed)}")
        except ValueError as error:  # the checkpoint is what counts
            self.accelerator.print(f"{error}; which settings changed is not known")

    def _on_main(self, action: Callable[[], Any]) -> Any:
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
            before = progress["identity"].get(key)
            if before != value:
                raise ValueError(
                    f"{path} was made with {key} {before}, this run has {value}: resume with the same {key}"
                )
        if progress["step"] > self.config.steps:
            raise ValueError(
                f"{path} is at step {progress['step']}, past the {self.config.steps} steps asked for (--steps)"
            )
        for name, module in self.modules.items():
            buffers = {key: whole(tensors[name][key]) for key, _ in module.named_buffers() if key in tensors[name]}
            fill(module, tensors[name] | buffers, path)
            checkpoint.restore_optimizer(self.optimizers[name], _trained(module), tensors[f"{name}_optimizer"])
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

    def _wish(self) -> int:
        """The signal that asked any process to stop, or 0: all of them save the same step, and end with one code.

        `accelerate launch` hands no signal on to a single process, which sees that its launcher is gone.
        """
        gone = self.launcher not in (None, os.getppid())
        wish = self.stop_signal or (int(signal.SIGTERM) if gone else 0)
        if self.accelerator.num_processes == 1:
            return wish
        return int(self.accelerator.gather(torch.tensor([wish], device=self.accelerator.device)).max())


def _next(batches: Batches) -> tuple[list[Key], Batch]:
    """The next micro-batch; an error of a loading process comes without the traceback that torch wraps it in."""
    try:
        return next(batches)
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"loading data failed ({reason}): is there memory enough for --workers? go on with --resume latest"
        ) from None


def _trained(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
