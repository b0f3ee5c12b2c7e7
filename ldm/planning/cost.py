"""What a training step costs: FLOP and memory from a dry run on fake tensors, and its time, measured."""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm.planning.device import clock
from ldm.rng import StepRNG
from ldm.training.stage import Batch, Stage

# Bytes of a trained parameter between steps: weight, two moments of Adam, average. A gradient comes on top.
STATE_BYTES_PER_PARAMETER, GRADIENT_BYTES = 16, 4
WARMUP_STEPS, TIMED_STEPS = 2, 3  # of a measurement

Build = Callable[[bool, torch.device], Stage]
"""(gradient checkpointing, device) -> a stage with random weights."""


class Cost(NamedTuple):
    """What a step of some images needs."""

    parameters: int  # that are trained
    frozen_bytes: int  # of all other parameters
    flop: int  # forward and backward
    peak_activation_bytes: int  # activations and gradients at the peak of the step

    def memory(self, ranks: int = 1, *, fsdp: bool = False, accumulates: bool = False) -> int:
        """Bytes on each rank; with `fsdp` what belongs to parameters is sharded over the ranks.

        But whole gradients add up on each where a step `accumulates` those of several micro-batches.
        """
        state, gradients = STATE_BYTES_PER_PARAMETER * self.parameters, GRADIENT_BYTES * self.parameters
        if fsdp:
            state = (state + gradients) // ranks - (0 if accumulates else gradients)  # the peak has whole ones
        elif ranks > 1:
            state += gradients  # DDP's buckets, in which they stay, also where activations are at their peak
        return state + self.peak_activation_bytes + self.frozen_bytes


class FlopMemoryMeter(TorchDispatchMode):
    """Counts FLOP, and the bytes of live tensors, without those that were there before, such as weights.

    torch's FlopCounterMode counts the same FLOP, but its hooks keep tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            self._track(value, is_new=False)
        out = func(*args, **kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.flop += count(*args, **kwargs, out_val=out)
        self._track(out, is_new=True)
        return out

    def _track(self, value: Any, *, is_new: bool) -> None:
        """The memory of a tensor, or of several, unless it is tracked already."""
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = id(storage)  # torch keeps the object as long as the memory lives
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes() if is_new else 0
                self.live_bytes += self._sizes[key]
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._untrack, key)

    def _untrack(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


@cache
def dry_run(build: Build, images: int, gradient_checkpointing: bool, *, bf16: bool) -> Cost:
    """A training step on fake tensors, which have shapes and no numbers: no time and no memory.

    They are fake tensors of the CPU, since the meta device knows no autocast and would keep activations in float32.
    """
    device = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage = build(gradient_checkpointing, device)
        networks, batch = _networks(stage), stage.example_batch(images)
        with FlopMemoryMeter() as meter:
            _forward_backward(stage, batch, images, device, bf16=bf16)
    trained = sum(p.numel() for p in networks.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in networks.parameters() if not p.requires_grad)
    return Cost(trained, 4 * frozen, meter.flop, meter.peak_bytes)


@cache
def time_step(build: Build, images: int, gradient_checkpointing: bool, device: torch.device, *, bf16: bool) -> float:
    """Seconds of a real step on random images: the mean of three."""
    stage = build(gradient_checkpointing, device)
    networks, batch = _networks(stage).to(device), stage.example_batch(images)
    optimizer = torch.optim.AdamW([p for p in networks.parameters() if p.requires_grad], fused=True)
    begin = 0.0
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        if step == WARMUP_STEPS:
            begin = clock()
        optimizer.zero_grad(set_to_none=True)
        _forward_backward(stage, batch, images, device, bf16=bf16)
        optimizer.step()
    return (clock() - begin) / TIMED_STEPS


def _networks(stage: Stage) -> nn.Module:
    return nn.ModuleList([*(trainable.module for trainable in stage.trainables), *stage.frozen.values()])


def _forward_backward(stage: Stage, batch: Batch, images: int, device: torch.device, *, bf16: bool) -> None:
    """Of each trainable, with the loss of the stage, in a step in which all are trained."""
    step = max(trainable.start for trainable in stage.trainables)
    rng = StepRNG(0, step, range(images), images, device)
    networks = {trainable.name: trainable.module for trainable in stage.trainables}
    for name in networks:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = stage.loss(name, networks, batch, rng)["loss"]
        loss.backward()
