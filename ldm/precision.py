"""How networks run: on which device, in which precision, compiled or not."""

from typing import Literal, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)
Precision = Literal["float32", "bf16", "fp16"]
MAX_GRAPHS = 64
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device | None) -> torch.device:
    """This device, or the accelerator of this machine, else the CPU; ValueError when it cannot be used."""
    device = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device} cannot be used here ({reason}): leave out --device") from None
    return torch.device(device)


def resolve_precision(name: Precision | None, device: torch.device) -> Precision:
    """This precision, or the best on a device: bf16 on GPUs that have it, else float32."""
    if name is None and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return name or "float32"


def place(network: Network, device: torch.device) -> Network:
    """Move a network, in the layout in which its convolutions are fastest: channels last, but on a CPU its own.

    `docs/performance.md` has what was measured.
    """
    layout = getattr(network, "cpu_layout", torch.channels_last) if device.type == "cpu" else torch.channels_last
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]


def compile_network(network: nn.Module, *, frozen: bool = False) -> None:
    """Let torch.compile make one graph of a network at its next call, and others where lengths or sizes differ.

    With `frozen`, for weights that no longer change, the graph has its own copy of them, as kernels of a CPU read them.
    """
    import torch._dynamo  # which takes long to load
    import torch._inductor.config

    # The limit is one for all networks, and beyond it an error.
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    network.compile(fullgraph=True)
    if frozen:  # in each call, as it is read where a graph is traced; elsewhere in the process weights may change
        network._compiled_call_impl = torch._inductor.config.patch(freezing=True)(network._compiled_call_impl)


def allow_tf32(device: torch.device) -> None:
    """Let GPUs multiply float32 matrices in TF32, of 10 bits, as cuDNN convolves anyway."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
