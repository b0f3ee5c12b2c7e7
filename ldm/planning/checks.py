"""What measured numbers say of a run: whether each is well, and what to do where it is not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.data.batch_sampler import SampleKey
from ldm.planning.device import format_bytes, format_duration
from ldm.training.config import TrainingConfig
from ldm.training.schedule import learning_rate

MAX_MEMORY_FRACTION, MAX_DATA_FRACTION, MAX_OVERHEAD_FRACTION = (
    0.9,
    0.5,
    0.5,
)  # largest shares: of the memory; of a step, for data; of the run, beside steps
MAX_LOSS_GROWTH = 2  # how many times its first value a loss may be after some steps
GRADIENT_TOLERANCE = 1e-6  # largest relative difference between gradients that count as equal
RESUME_TOLERANCE = 0.02  # of the learning rate: how far a GPU's kernels may round weights apart in one step


class DoctorCheck(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    value: str
    remedy: str  # what to do where it is not well

    def line(self) -> str:
        """What people read: one line, and a second one with the remedy where it failed."""
        told = f"{'ok' if self.ok else 'FAILED':6}  {self.name:24}  {self.value}"
        return told if self.ok else f"{told}\n{'':8}{'what to do':24}  {self.remedy}"


def devices(places: Sequence[str], kind: str, precision: str, *, on_gpu: bool, gpus: int) -> DoctorCheck:
    """`places`: machine and device of each process; `gpus`: how many this machine has."""
    value, remedy = f"{_processes(len(places))} on {kind}, {precision}", ""
    if gpus and not on_gpu:
        remedy = f"{gpus} GPUs are idle: launch without --cpu and without ACCELERATE_USE_CPU"
    elif on_gpu and len(set(places)) < len(places):
        remedy = "processes share a GPU: --num-processes must be the number of GPUs"
    elif on_gpu and precision == "float32":
        value += " (accelerate launch --mixed-precision bf16 is faster)"
    return DoctorCheck("devices and precision", not remedy, value, remedy)


def gradients_synced(sums: Tensor, *, split: bool) -> DoctorCheck:
    """`sums`: (processes, gradients, 2), sum and norm of each averaged gradient as each process sees it."""
    apart = ((sums - sums[0]).abs().max() / sums[0].abs().max().clamp_min(1e-30)).item()
    told = "bit-equal" if apart == 0 else f"apart by {apart:.1e} of the largest"
    value = f"{told} on {_processes(len(sums))}, {sums.shape[1]} tensors"
    if split:
        value += ", put together from their parts"
    remedy = "start all processes with one launcher and the same versions; a loss must call its module's forward"
    return DoctorCheck("gradients on all ranks", apart <= GRADIENT_TOLERANCE, value, remedy)


def data_disjoint(seen: Sequence[Sequence[Sequence[SampleKey]]], *, batch_size: int) -> DoctorCheck:
    """`seen`: of each process, of each step, the keys of its samples.

    A bucket that has fewer images than a step gives some of them again, but each place in the step once.
    """
    steps = [{key for keys in step for key in keys} for step in zip(*seen, strict=True)]
    twice = sum(batch_size - len(step) for step in steps)
    value = f"{len(steps)} steps of {batch_size} samples over {_processes(len(seen))}, {twice or 'none'} taken twice"
    remedy = "each process must know its rank: launch with accelerate or torchrun, not one by one"
    return DoctorCheck("data of the ranks", twice == 0, value, remedy)


def schedule(config: TrainingConfig) -> DoctorCheck:
    """Where the learning rate goes in all the steps that are asked for."""
    rates = [learning_rate(config, step) for step in range(config.steps)]
    top = max(range(config.steps), key=lambda step: rates[step])
    stopped = next((step for step, rate in enumerate(rates) if rate <= 0), None)
    value = (
        f"{rates[-1]:.1e} at step {config.steps:,} ({config.lr_schedule}), highest {rates[top]:.1e} at step {top + 1:,}"
    )
    remedy = ""
    if stopped is not None:
        remedy = (
            f"it is 0 from step {stopped + 1:,} on, so nothing is learned from there: change --lr-schedule or --steps"
        )
    elif config.warmup_steps >= config.steps:
        remedy = f"the warm-up is not over at the end: --warmup-steps {config.steps // 20} or more --steps"
    return DoctorCheck("learning rate at the end", not remedy, value, remedy)


def resume_exact(difference: float | None, *, on_gpu: bool) -> DoctorCheck:
    """`difference`: root mean square between a step and the same after save and load, in learning rates.

    None where all bits are equal, which they must be but on a GPU, some kernels of which add in any order.
    """
    name, remedy = "step after save and load", "a resumed run would go another way: please report it with this line"
    if difference is None:
        return DoctorCheck(name, True, "bit-equal: weights and averages", remedy)
    allowed = RESUME_TOLERANCE if on_gpu else 0.0
    value = f"weights or averages differ by {difference:.1e} of a step (allowed: {allowed})"
    return DoctorCheck(name, difference <= allowed, value, remedy)


def loss_decreases(first: float, losses: Sequence[float], config: TrainingConfig, *, step: int) -> DoctorCheck:
    """`losses`: of one step that is taken again and again, with the same samples, noise and learning rate.

    `first` is that of step 1, with other samples: a loss that more than doubles from there runs away.
    """
    value = f"{first:.5g} at step 1; {losses[0]:.5g} -> {losses[-1]:.5g} when step {step} is taken {len(losses)} times"
    remedy = "lower --learning-rate, and look at the data with scripts/data.py check"
    if losses[0] > MAX_LOSS_GROWTH * first:
        return DoctorCheck("loss falls", False, value, remedy)
    if step < config.warmup_steps:
        share = learning_rate(config, step - 1) / config.learning_rate
        value += f", at {share:.2g} of the learning rate (warm-up)"
        remedy = f"try --warmup-steps {step // 4}, with which the rate has risen by then; if it fails again, {remedy}"
    return DoctorCheck("loss falls", losses[-1] < losses[0], value, remedy)


def memory(peak: int, total: int, *, on_gpu: bool) -> DoctorCheck:
    """Bytes at the peak of steps, validation, samples and saving, against what there is."""
    owner = "the GPU" if on_gpu else "the machine"
    value = f"{format_bytes(peak)} at the peak ({peak / total:.0%}), {owner} has {format_bytes(total)}"
    remedy = "--grad-accum-steps 2 (smaller micro-batches), --gradient-checkpointing, or --fsdp on several GPUs"
    return DoctorCheck("memory head-room", peak <= MAX_MEMORY_FRACTION * total, value, remedy)


def throughput(seconds: float, waiting: float, config: TrainingConfig) -> DoctorCheck:
    """Seconds of a step, and the share of it that data were waited for."""
    value = f"{config.batch_size / seconds:,.1f} ({seconds:.3g} s a step), {waiting:.0%} of the time for data"
    remedy = f"data are slower than training: --num-workers {2 * config.num_workers or 2}, or scripts/encode.py and --cached-latents"
    return DoctorCheck("images/s", waiting <= MAX_DATA_FRACTION, value, remedy)


def time_to_finish(seconds: Mapping[str, float], config: TrainingConfig) -> DoctorCheck:
    """Time to finish, from the seconds of one "step", "validate", "sample", "save" and "model"."""
    steps = config.steps * seconds["step"]
    every = {"validate": config.validate_every, "sample": config.sample_every, "save": config.checkpoint_every}
    aside = sum(seconds[name] * -(-config.steps // often) for name, often in every.items()) + seconds["model"]
    share = aside / (steps + aside)
    value = (
        f"{format_duration(steps + aside)} for {config.steps:,} steps, {share:.0%} of it to validate, sample and save"
    )
    remedy = "most of the time is not training: raise --validate-every, --sample-every and --checkpoint-every"
    return DoctorCheck("time to finish", share <= MAX_OVERHEAD_FRACTION, value, remedy)


def disk(one: int, model: int, free: int, config: TrainingConfig) -> DoctorCheck:
    """Bytes of a checkpoint and of the finished model, against what is free where the run will be."""
    kept = config.keep_checkpoints + 1  # a new one is written before the oldest goes
    needed = kept * one + model
    value = f"{format_bytes(needed)} ({kept} checkpoints of {format_bytes(one)}, model) of {format_bytes(free)} free"
    remedy = f"free {format_bytes(needed - free)}, or --keep-checkpoints 1, or --run on another disk"
    return DoctorCheck("disk needed", needed <= free, value, remedy)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
