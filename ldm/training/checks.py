"""What measured numbers say of a run: whether each is well, and what to do where it is not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.data.order import Key
from ldm.training.loop import TrainingConfig, learning_rate
from ldm.training.machine import in_bytes, in_time

ROOM, WAITING, ASIDE = 0.9, 0.5, 0.5  # largest shares: of the memory; of a step, for data; of the run, beside steps
AWAY = 2  # how many times its first value a loss may be after some steps
EQUAL = 1e-6  # largest relative difference between gradients that count as equal
ROUNDING = 0.02  # of the learning rate: how far a GPU's kernels may round weights apart in one step


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    value: str
    remedy: str  # what to do where it is not well

    def line(self) -> str:
        """What people read: one line, and a second one with the remedy where it failed."""
        told = f"{'ok' if self.ok else 'FAILED':6}  {self.name:24}  {self.value}"
        return told if self.ok else f"{told}\n{'':8}{'what to do':24}  {self.remedy}"


def devices(places: Sequence[str], kind: str, precision: str, *, on_gpu: bool, gpus: int) -> Check:
    """`places`: machine and device of each process; `gpus`: how many this machine has."""
    value, remedy = f"{_processes(len(places))} on {kind}, {precision}", ""
    if gpus and not on_gpu:
        remedy = f"{gpus} GPUs are idle: launch without --cpu and without ACCELERATE_USE_CPU"
    elif on_gpu and len(set(places)) < len(places):
        remedy = "processes share a GPU: --num_processes must be the number of GPUs"
    elif on_gpu and precision == "float32":
        value += " (accelerate launch --mixed_precision bf16 is faster)"
    return Check("devices and precision", not remedy, value, remedy)


def gradients(sums: Tensor, *, split: bool) -> Check:
    """`sums`: (processes, gradients, 2), sum and norm of each averaged gradient as each process sees it."""
    apart = ((sums - sums[0]).abs().max() / sums[0].abs().max().clamp_min(1e-30)).item()
    told = "bit-equal" if apart == 0 else f"apart by {apart:.1e} of the largest"
    value = f"{told} on {_processes(len(sums))}, {sums.shape[1]} tensors"
    if split:
        value += ", put together from their parts"
    remedy = "start all processes with one launcher and the same versions; a loss must call its module's forward"
    return Check("gradients on all ranks", apart <= EQUAL, value, remedy)


def disjoint(seen: Sequence[Sequence[Sequence[Key]]], *, batch_size: int) -> Check:
    """`seen`: of each process, of each step, the keys of its samples.

    A bucket that has fewer images than a step gives some of them again, but each place in the step once.
    """
    steps = [{key for keys in step for key in keys} for step in zip(*seen, strict=True)]
    twice = sum(batch_size - len(step) for step in steps)
    value = f"{len(steps)} steps of {batch_size} samples over {_processes(len(seen))}, {twice or 'none'} taken twice"
    remedy = "each process must know its rank: launch with accelerate or torchrun, not one by one"
    return Check("data of the ranks", twice == 0, value, remedy)


def schedule(config: TrainingConfig) -> Check:
    """Where the learning rate goes in all the steps that are asked for."""
    rates = [learning_rate(config, step) for step in range(config.steps)]
    top = max(range(config.steps), key=lambda step: rates[step])
    stopped = next((step for step, rate in enumerate(rates) if rate <= 0), None)
    value = f"{rates[-1]:.1e} at step {config.steps:,} ({config.decay}), highest {rates[top]:.1e} at step {top + 1:,}"
    remedy = ""
    if stopped is not None:
        remedy = f"it is 0 from step {stopped + 1:,} on, so nothing is learned from there: change --decay or --steps"
    elif config.warmup >= config.steps:
        remedy = f"the warm-up is not over at the end: --warmup {config.steps // 20} or more --steps"
    return Check("learning rate at the end", not remedy, value, remedy)


def resumed(difference: float | None, *, on_gpu: bool) -> Check:
    """`difference`: root mean square between a step and the same after save and load, in learning rates.

    None where all bits are equal, which they must be but on a GPU, some kernels of which add in any order.
    """
    name, remedy = "step after save and load", "a resumed run would go another way: please report it with this line"
    if difference is None:
        return Check(name, True, "bit-equal: weights and averages", remedy)
    allowed = ROUNDING if on_gpu else 0.0
    value = f"weights or averages differ by {difference:.1e} of a step (allowed: {allowed})"
    return Check(name, difference <= allowed, value, remedy)


def falls(first: float, losses: Sequence[float], config: TrainingConfig, *, step: int) -> Check:
    """`losses`: of one step that is taken again and again, with the same samples, noise and learning rate.

    `first` is that of step 1, with other samples: a loss that more than doubles from there runs away.
    """
    value = f"{first:.5g} at step 1; {losses[0]:.5g} -> {losses[-1]:.5g} when step {step} is taken {len(losses)} times"
    remedy = "lower --learning-rate, and look at the data with scripts/data.py check"
    if losses[0] > AWAY * first:
        return Check("loss falls", False, value, remedy)
    if step < config.warmup:
        share = learning_rate(config, step - 1) / config.learning_rate
        value += f", at {share:.2g} of the learning rate (warm-up)"
        remedy = f"try --warmup {step // 4}, with which the rate has risen by then; if it fails again, {remedy}"
    return Check("loss falls", losses[-1] < losses[0], value, remedy)


def memory(peak: int, total: int, *, on_gpu: bool) -> Check:
    """Bytes at the peak of steps, validation, samples and saving, against what there is."""
    owner = "the GPU" if on_gpu else "the machine"
    value = f"{in_bytes(peak)} at the peak ({peak / total:.0%}), {owner} has {in_bytes(total)}"
    remedy = "--accumulate 2 (smaller micro-batches), --gradient-checkpointing, or --shard on several GPUs"
    return Check("memory head-room", peak <= ROOM * total, value, remedy)


def rate(seconds: float, waiting: float, config: TrainingConfig) -> Check:
    """Seconds of a step, and the share of it that data were waited for."""
    value = f"{config.batch_size / seconds:,.1f} ({seconds:.3g} s a step), {waiting:.0%} of the time for data"
    remedy = f"data are slower than training: --workers {2 * config.workers or 2}, or scripts/encode.py and --latents"
    return Check("images/s", waiting <= WAITING, value, remedy)


def finish(seconds: Mapping[str, float], config: TrainingConfig) -> Check:
    """Time to finish, from the seconds of one "step", "validate", "sample", "save" and "model"."""
    steps = config.steps * seconds["step"]
    every = {"validate": config.validate_every, "sample": config.sample_every, "save": config.checkpoint_every}
    aside = sum(seconds[name] * -(-config.steps // often) for name, often in every.items()) + seconds["model"]
    share = aside / (steps + aside)
    value = f"{in_time(steps + aside)} for {config.steps:,} steps, {share:.0%} of it to validate, sample and save"
    remedy = "most of the time is not training: raise --validate-every, --sample-every and --checkpoint-every"
    return Check("time to finish", share <= ASIDE, value, remedy)


def disk(one: int, model: int, free: int, config: TrainingConfig) -> Check:
    """Bytes of a checkpoint and of the finished model, against what is free where the run will be."""
    kept = config.keep_checkpoints + 1  # a new one is written before the oldest goes
    needed = kept * one + model
    value = f"{in_bytes(needed)} ({kept} checkpoints of {in_bytes(one)}, model) of {in_bytes(free)} free"
    remedy = f"free {in_bytes(needed - free)}, or --keep-checkpoints 1, or --run on another disk"
    return Check("disk needed", needed <= free, value, remedy)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
