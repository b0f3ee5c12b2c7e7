"""What a machine is worth: the speed of a matrix product and of a recipe's convolution, to compare times by."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F

from ldm.planning.device import clock
from ldm.planning.planner import read_recipe
from ldm.precision import resolve_device

MATRIX_SIDE = 1024
CPU_INFO = Path("/proc/cpuinfo")  # on Linux


class ConvShape(NamedTuple):
    """The 3x3 convolution of the first level of a U-Net in a training step."""

    batch: int
    channels: int
    side: int

    @property
    def flop(self) -> int:
        """Of the forward pass, and twice as much of the backward pass; the padding counts."""
        return 3 * 2 * 9 * self.batch * self.channels**2 * self.side**2

    def __str__(self) -> str:
        return f"3x3, {self.channels} channels, {self.side} x {self.side}, batch {self.batch}, forward and backward"


class MachineSpeed(NamedTuple):
    """A machine, and what it computes in float32, the convolution also in bf16."""

    processor: str  # where the networks are
    cores: int
    torch: str
    matmul_gflops: float
    conv_gflops: float
    conv_bf16_gflops: float
    matmul: str  # the shapes
    conv: str


def recipe_conv(recipe: Path) -> ConvShape:
    """The convolution of a recipe: a folder with vae.yaml and ldm.yaml."""
    ldm, vae = read_recipe(recipe / "ldm.yaml"), read_recipe(recipe / "vae.yaml").vae
    side = vae.latent_size(ldm.data.resolution) // ldm.unet.patch_size
    return ConvShape(ldm.batch_size, ldm.unet.channel_mult[0] * ldm.unet.model_channels, side)


def measure_machine(conv: ConvShape, *, seconds: float = 1.0, device: torch.device | None = None) -> MachineSpeed:
    """Measure each for about so many seconds, on the device that would train when it is left out."""
    device = resolve_device(device)
    a = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)
    matmul = 2 * MATRIX_SIDE**3 / fastest_seconds(lambda: a @ a, seconds)
    float32, bf16 = (_conv_flops(conv, dtype, device, seconds) for dtype in (torch.float32, torch.bfloat16))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    cores = len(own_cores())
    speeds = round(matmul / 1e9, 1), round(float32 / 1e9, 1), round(bf16 / 1e9, 1)
    return MachineSpeed(name, cores, torch.__version__, *speeds, f"{MATRIX_SIDE} x {MATRIX_SIDE}", str(conv))


def _conv_flops(conv: ConvShape, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of a convolution, forward and backward."""
    images = torch.randn(conv.batch, conv.channels, conv.side, conv.side, dtype=dtype, device=device)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(conv.channels, conv.channels, 3, 3, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.ones_like(images)

    def step() -> object:
        return torch.autograd.grad(F.conv2d(images, weight, padding=1), (images, weight), gradient)

    return conv.flop / fastest_seconds(step, seconds)


def fastest_seconds(action: Callable[[], object], seconds: float) -> float:
    """Of all calls in so many seconds: what else the machine does makes calls slower, never faster."""
    times: list[float] = []
    end = clock() + seconds
    while not times or clock() < end:
        begin = clock()
        action()
        times.append(clock() - begin)
    return min(times)


def own_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def free_cores(seconds: float = 1.0) -> int:
    """How many of its cores other processes left idle for so many seconds; at least 1."""
    cores, percent = own_cores(), psutil.cpu_percent(seconds, percpu=True)
    if cores[-1] < len(percent):  # else the list is not numbered as the cores are
        percent = [percent[core] for core in cores]
    return max(1, round(len(cores) - sum(percent) / 100))


def cpu_name() -> str:
    """As the system knows it."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
