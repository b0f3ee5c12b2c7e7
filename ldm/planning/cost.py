"""What a training step costs: FLOP and memory from a dry run without any numbers, and its time, measured."""

import math
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm.planning.device import synchronize

STATE_BYTES_PER_PARAMETER = (
    16  # bytes for a trained parameter between steps: weight, two moments of Adam, average; gradients come on top
)
WARMUP_STEPS, TIMED_STEPS = 2, 3  # steps of a measurement

Build = Callable[[], nn.Module]
Loss = Callable[[nn.Module, int, torch.device], Tensor]  # of a batch of so many images


class Cost(NamedTuple):
    """What a step of some images needs."""

    parameters: int  # that are trained
    weights: int  # bytes of all parameters that are not
    flop: int  # forward and backward
    peak_activation_bytes: (
        int  # bytes at the peak of the step, beside weights and Adam's moments: activations and gradients
    )

    def memory(self, processes: int = 1, *, split: bool = False) -> int:
        """Bytes in each process; `split`: what belongs to parameters is split over them (--fsdp)."""
        if split:
            return (
                (STATE_BYTES_PER_PARAMETER + 4) * self.parameters // processes
                + self.peak_activation_bytes
                - 4 * self.parameters
                + self.weights
            )
        buckets = 4 * self.parameters if processes > 1 else 0  # in which gradients travel
        return STATE_BYTES_PER_PARAMETER * self.parameters + buckets + self.peak_activation_bytes + self.weights


class FlopMemoryMeter(TorchDispatchMode):
    """Counts FLOP, and the bytes of tensors that are alive, beside those of `known`.

    torch's FlopCounterMode counts the same FLOP, but its hooks keep tensors alive.
    """

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.flop = self.now = self.peak = 0
        self.alive = {id(tensor.untyped_storage()): 0 for tensor in known.state_dict(keep_vars=True).values()}

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
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._untrack, key)

    def _untrack(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def dry_run(build: Build, loss: Loss, images: int, *, bf16: bool) -> Cost:
    """A training step on tensors that have shapes and no numbers, so in no time and no memory.

    They count as tensors of the CPU, for the meta device knows no autocast and would keep activations in float32.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build()
        with FlopMemoryMeter(module) as meter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss(module, images, torch.device("cpu"))
            value.backward()
        parameters = list(module.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = 4 * (sum(p.numel() for p in parameters) - trained)
        return Cost(trained, frozen, meter.flop, meter.peak)


def time_step(build: Build, loss: Loss, images: int, device: torch.device, *, bf16: bool) -> float:
    """The mean of some real steps, on random images."""
    module = build().to(device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss(module, images, device)
        value.backward()
        optimizer.step()

    for _ in range(WARMUP_STEPS):
        step()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / TIMED_STEPS


def largest_batch(memory: Callable[[int], int], room: int, wanted: int) -> int:
    """Of the divisors of `wanted` the largest number of images whose memory fits in `room` bytes; 0 when none does.

    Memory is the largest of some lines (the peak is at the end of the forward pass, or within the backward pass), so
    what lies between two points of it is below the line through them.
    """
    one, all_ = memory(1), memory(wanted)
    if all_ <= room:
        return wanted
    if one > room:
        return 0
    most = 1 + math.floor((room - one) / (all_ - one) * (wanted - 1))
    return max(divisor for divisor in range(1, most + 1) if wanted % divisor == 0)
