"""What the doctor's numbers say about a run: whether each is sound, and how to fix it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.data.batch_sampler import SampleKey, fitting_batch_size
from ldm.planning.device import format_bytes, format_duration
from ldm.training.config import TrainingConfig
from ldm.training.optimizer import learning_rate

STEP = "a step"
MAX_MEMORY_FRACTION = 0.9
MAX_DATA_FRACTION = 0.5  # of a step, waiting for data
MAX_OVERHEAD_FRACTION = 0.5  # of a run, for validation, samples and saving
MAX_LOSS_GROWTH = 2  # after some steps
MAX_CHANCE_FRACTION = 0.99  # of the loss of a network that ignores its input, after a step was repeated
MIN_RATE_FRACTION = 0.1  # of the peak learning rate: below it no network leaves chance in so few steps
GRADIENT_TOLERANCE = 1e-6  # relative
RESUME_TOLERANCE = 0.02  # of the learning rate, in one step


class DoctorCheck(NamedTuple):
    """One check and its result."""

    name: str
    ok: bool
    value: str
    fix: str

    def line(self) -> str:
        """One line, and a second one with the fix where it failed."""
        text = f"{'ok' if self.ok else 'FAILED':6}  {self.name:34}  {self.value}"
        return text if self.ok else f"{text}\n{'':8}{'fix':34}  {self.fix}"


def devices(places: Sequence[str], name: str, precision: str, *, on_gpu: bool, gpus: int) -> DoctorCheck:
    """`places`: machine and device of each rank; `gpus`: how many this machine has."""
    value, fix = f"{_ranks(len(places))} on {name}, {precision}", ""
    if gpus and not on_gpu:
        fix = f"{gpus} GPUs are idle: launch without --cpu and without ACCELERATE_USE_CPU"
    elif on_gpu and len(set(places)) < len(places):
        fix = "several ranks share a GPU: --num_processes must be the number of GPUs"
    elif on_gpu and precision == "float32":
        value += " (accelerate launch --mixed_precision bf16 is faster)"
    return DoctorCheck("devices and precision", not fix, value, fix)


def gradients_synced(sums: Tensor, *, fsdp: bool) -> DoctorCheck:
    """`sums`: (ranks, gradients, 2), sum and norm of each averaged gradient as each rank has it."""
    difference = ((sums - sums[0]).abs().max() / sums[0].abs().max().clamp_min(1e-30)).item()
    result = "bit-equal" if difference == 0 else f"differ by {difference:.1e} of the largest"
    value = f"{result} on {_ranks(len(sums))}, {sums.shape[1]} tensors"
    if fsdp:
        value += ", gathered from their shards"
    fix = "start all ranks with one launcher and the same versions; a loss must call networks through their forward"
    return DoctorCheck("gradients identical across ranks", difference <= GRADIENT_TOLERANCE, value, fix)


def data_disjoint(keys: Sequence[Sequence[Sequence[SampleKey]]], *, batch_size: int, images: int) -> DoctorCheck:
    """`keys`: of each rank, of each step, the keys of its samples; `images`: how many the training split has.

    Each position of a step comes once. A step in which an epoch ends, or whose bucket has fewer images, may take an
    image again, which is counted; one that is larger than the set must.
    """
    steps = [{key for rank in step for key in rank} for step in zip(*keys, strict=True)]
    disjoint = all(len(step) == batch_size for step in steps)
    repeated = sum(batch_size - len({key.index for key in step}) for step in steps)
    value = f"{len(steps)} steps of {batch_size} samples over {_ranks(len(keys))}, {repeated or 'none'} repeated"
    fix = "each process must know its rank: launch with accelerate or torchrun, not one by one"
    if images < batch_size:
        value += f", of {images} training images"
        fix = f"--batch-size {fitting_batch_size(images)}, or more images" if disjoint else fix
    return DoctorCheck("samples disjoint across ranks", disjoint and images >= batch_size, value, fix)


def schedule(config: TrainingConfig) -> DoctorCheck:
    """The learning rate over all steps."""
    rates = [learning_rate(config, step) for step in range(config.steps)]
    top, zero = max(rates), next((step for step, rate in enumerate(rates) if rate <= 0), None)
    value = f"{rates[-1]:.1e} at step {config.steps:,} ({config.lr_schedule}), "
    value += f"highest {top:.1e} at step {rates.index(top) + 1:,}"
    fix = ""
    if zero is not None:
        fix = f"it is 0 from step {zero + 1:,} on, so nothing is learned from there: change --lr-schedule or --steps"
    elif config.warmup_steps >= config.steps:
        fix = f"the warm-up is not over at the end: --warmup-steps {config.steps // 20} or more --steps"
    return DoctorCheck("learning rate at the end", not fix, value, fix)


def resume_exact(difference: float, *, on_gpu: bool) -> DoctorCheck:
    """`difference`: root mean square between a step and the same after save and load, in learning rates."""
    allowed = RESUME_TOLERANCE if on_gpu else 0.0  # some kernels of a GPU add in any order
    value = f"weights or averages differ by {difference:.1e} of a step (allowed: {allowed})"
    if difference == 0:
        value = "bit-equal: weights and averages"
    fix = "resuming changes the run: please report it with this line"
    return DoctorCheck("resume is bit-exact", difference <= allowed, value, fix)


def loss_decreases(
    first: float, losses: Sequence[float], config: TrainingConfig, *, step: int, chance: float | None = None
) -> DoctorCheck:
    """`losses`: of one step, repeated with the same samples and noise; `first`: of step 1, with other ones.

    `chance`: that of a network that ignores its input, which `losses` must get below, unless the warm-up just began.
    """
    begin, end, rate = losses[0], losses[-1], learning_rate(config, step - 1) / config.learning_rate
    value = f"{first:.5g} at step 1; {begin:.5g} -> {end:.5g} when step {step} is repeated {len(losses)} times"
    fix = "lower --learning-rate, and inspect the data with scripts/check_data.py"
    diverged, stuck = begin > MAX_LOSS_GROWTH * first, False
    if chance is not None and end > MAX_CHANCE_FRACTION * chance:
        value += f"; ignoring the input gives {chance:.5g}"
        stuck = rate >= MIN_RATE_FRACTION
        fix = f"nothing is learned: are captions equal, or cut to equal texts, or images equal? Else {fix}"
    if step < config.warmup_steps and not diverged:
        value += f", at {rate:.2g} of the learning rate (warm-up)"
        fix = f"try --warmup-steps {step // 4}, with which the rate has risen by then; if it fails again, {fix}"
    return DoctorCheck("loss decreases", end < begin and not diverged and not stuck, value, fix)


def memory(peak: int, total: int, doing: str, grad_accum_steps: int, *, on_gpu: bool) -> DoctorCheck:
    """Bytes at the peak of steps, validation, sampling and saving, against what there is; `doing` took them."""
    owner = "the GPU" if on_gpu else "the machine"
    used = (
        f"{format_bytes(peak)} at the peak ({peak / total:.0%}), of {doing}" if peak else "not reported by this system"
    )
    value = f"{used}; {owner} has {format_bytes(total)}"
    fix = memory_remedy(doing, grad_accum_steps)
    return DoctorCheck("memory headroom", peak <= MAX_MEMORY_FRACTION * total, value, fix)


def memory_remedy(doing: str, grad_accum_steps: int) -> str:
    """What makes `doing` take less memory."""
    if doing == STEP:
        fewer = f"--grad-accum-steps {2 * grad_accum_steps} (smaller micro-batches)"
        return f"{fewer}, --gradient-checkpointing, or --fsdp on several GPUs"
    return "a smaller network or --data.resolution"


def throughput(seconds: float, waiting: float, config: TrainingConfig) -> DoctorCheck:
    """Seconds of a step, and the fraction of it spent waiting for data."""
    value = f"{config.batch_size / seconds:,.1f} ({seconds:.3g} s a step), {waiting:.0%} of the time for data"
    workers = 2 * config.num_workers or 2
    fix = f"data are slower than training: --num-workers {workers}, or scripts/cache_latents.py and --cached-latents"
    return DoctorCheck("images/s", waiting <= MAX_DATA_FRACTION, value, fix)


def time_to_finish(seconds: Mapping[str, float], config: TrainingConfig) -> DoctorCheck:
    """Time to finish, from the seconds of one "step", "validate", "sample", "save" and "model"."""
    steps = config.steps * seconds["step"]
    every = {"validate": config.validate_every, "sample": config.sample_every, "save": config.checkpoint_every}
    overhead = sum(seconds[name] * -(-config.steps // often) for name, often in every.items()) + seconds["model"]
    fraction = overhead / (steps + overhead)
    value = f"{format_duration(steps + overhead)} for {config.steps:,} steps, "
    value += f"{fraction:.0%} of it to validate, sample and save"
    fix = "most of the time is not training: raise --validate-every, --sample-every and --checkpoint-every"
    return DoctorCheck("time to finish", fraction <= MAX_OVERHEAD_FRACTION, value, fix)


def disk(checkpoint: int, model: int, free: int, config: TrainingConfig) -> DoctorCheck:
    """Bytes of a checkpoint and of the finished model, against what is free where the run will be."""
    count = config.keep_checkpoints + 1  # a new one is written before the oldest goes
    needed = count * checkpoint + model
    value = f"{format_bytes(needed)} ({count} checkpoints of {format_bytes(checkpoint)}, model) "
    value += f"of {format_bytes(free)} free"
    fix = f"free {format_bytes(needed - free)}, or --keep-checkpoints 1, or --run on another disk"
    return DoctorCheck("disk space", needed <= free, value, fix)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
