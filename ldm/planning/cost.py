"""What a training step costs: FLOP and memory from a dry run on fake tensors, and its time, measured."""

import math
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm.planning.device import synchronize
from ldm.rng import StepRNG
from ldm.training.stage import Batch, Stage

# Bytes of a trained parameter between steps: weight, two moments of Adam, average. A gradient comes on top.
STATE_BYTES_PER_PARAMETER, GRADIENT_BYTES = 16, 4
WARMUP_STEPS, TIMED_STEPS = 2, 3  # of a measurement

Build = Callable[[torch.device], Stage]


class Cost(NamedTuple):
    """What a step of some images needs."""

    parameters: int  # that are trained
    frozen_bytes: int  # of all other parameters
    flop: int  # forward and backward
    peak_activation_bytes: int  # activations and gradients at the peak of the step

    def memory(self, ranks: int = 1, *, fsdp: bool = False) -> int:
        """Bytes on each rank; with `fsdp` what belongs to parameters is sharded over the ranks."""
        if fsdp:
            sharded = (STATE_BYTES_PER_PARAMETER + GRADIENT_BYTES) * self.parameters // ranks
            return sharded + self.peak_activation_bytes - GRADIENT_BYTES * self.parameters + self.frozen_bytes
        buckets = GRADIENT_BYTES * self.parameters if ranks > 1 else 0  # of DDP, in which gradients travel
        return STATE_BYTES_PER_PARAMETER * self.parameters + buckets + self.peak_activation_bytes + self.frozen_bytes


class FlopMemoryMeter(TorchDispatchMode):
    """Counts FLOP, and the bytes of live tensors, without the parameters and buffers of a stage.

    torch's FlopCounterMode counts the same FLOP, but its hooks keep tensors alive.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.flop = self.live_bytes = self.peak_bytes = 0
        modules = [*(t.module for t in stage.trainables), *stage.frozen.values()]
        tensors = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.flop += count(*args, **kwargs, out_val=out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # torch keeps the object as long as the memory lives
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._untrack, key)

    def _untrack(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def dry_run(build: Build, images: int, *, bf16: bool) -> Cost:
    """A training step on fake tensors, which have shapes and no numbers: no time and no memory.

    They are fake tensors of the CPU, since the meta device knows no autocast and would keep activations in float32.
    """
    device = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage = build(device)
        batch = stage.example_batch(images)
        with FlopMemoryMeter(stage) as meter:
            _backward(stage, batch, device, bf16=bf16)
    trained = [p for t in stage.trainables for p in t.module.parameters()]
    frozen = [p for module in stage.frozen.values() for p in module.parameters()]
    frozen += [p for p in trained if not p.requires_grad]
    parameters = sum(p.numel() for p in trained if p.requires_grad)
    return Cost(parameters, 4 * sum(p.numel() for p in frozen), meter.flop, meter.peak_bytes)


def time_step(build: Build, images: int, device: torch.device, *, bf16: bool) -> float:
    """Seconds of a real step on random images: the mean of three."""
    stage = build(device)
    for module in [*(t.module for t in stage.trainables), *stage.frozen.values()]:
        module.to(device)
    parameters = [p for t in stage.trainables for p in t.module.parameters() if p.requires_grad]
    optimizer, batch = torch.optim.AdamW(parameters, fused=True), stage.example_batch(images)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _backward(stage, batch, device, bf16=bf16)
        optimizer.step()

    for _ in range(WARMUP_STEPS):
        step()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / TIMED_STEPS


def _backward(stage: Stage, batch: Batch, device: torch.device, *, bf16: bool) -> None:
    """Forward and backward of each trainable, with the loss of the stage."""
    images = len(batch["sizes"])
    rng = StepRNG(0, 0, range(images), images, device)
    networks = {t.name: t.module for t in stage.trainables}
    for name in networks:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = stage.loss(name, networks, batch, rng)["loss"]
        loss.backward()


def largest_batch(memory: Callable[[int], int], usable_bytes: int, batch_size: int) -> int:
    """Of the divisors of `batch_size` the largest number of images whose memory fits; 0 when none does.

    Memory is the largest of some lines (the peak is at the end of the forward pass, or within the backward pass), so
    what lies between two points of it is below the line through them.
    """
    one, all_ = memory(1), memory(batch_size)
    if all_ <= usable_bytes:
        return batch_size
    if one > usable_bytes:
        return 0
    limit = 1 + math.floor((usable_bytes - one) / (all_ - one) * (batch_size - 1))
    return max(divisor for divisor in range(1, limit + 1) if batch_size % divisor == 0)
