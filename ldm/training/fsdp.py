"""Weights, averages and optimizer state sharded over all ranks, with torch's FSDP2."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def apply_fsdp(module: nn.Module, mesh: DeviceMesh, *, bf16: bool) -> nn.Module:
    """A copy of a module on the CPU that holds one shard of each parameter, and gathers the rest as it is called.

    It does so block by block: these are what its `nn.ModuleList`s list. With `bf16` the weights of blocks are gathered
    in it, in which autocast would compute anyway; shards and averaged gradients are float32. All ranks must hold the
    same weights. Side effect: the original module stays on rank 0 (to receive gathered weights) and is moved to meta
    elsewhere. ValueError for a parameter that cannot be sharded.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(f"--fsdp: {scalars[0]} is a single number, which FSDP2 cannot shard; leave out --fsdp")
    sharded = copy.deepcopy(module)
    if mesh.get_rank() > 0:
        module.to("meta")
    in_blocks, in_averaging = (torch.bfloat16, torch.float32) if bf16 else (None, None)
    policy = MixedPrecisionPolicy(in_blocks, in_averaging, cast_forward_inputs=False)
    for blocks in reversed(list(sharded.modules())):  # inner ones first
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                if not isinstance(block, nn.ModuleList):
                    fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh)
    return sharded


@contextmanager
def no_sync(accelerator: Accelerator, network: nn.Module) -> Iterator[None]:
    """Gradients add up on each rank, and are not averaged over the ranks yet."""
    if uses_fsdp(network):
        network.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        with accelerator.no_sync(network):
            yield


def reshard(module: nn.Module) -> None:
    """Free gathered weights, which a forward without a backward leaves behind, and which the next step outdates."""
    if uses_fsdp(module):
        module.reshard()  # type: ignore[operator]


def uses_fsdp(module: nn.Module) -> bool:
    """Whether it is an FSDPModule, whose own module takes long to load."""
    return hasattr(module, "set_requires_gradient_sync")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose own module takes long to load."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; a sharded one is gathered, so all ranks must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of one that is not sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def shard_tensor(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The shard of a tensor that this rank holds, cut as FSDP2 cuts parameters; a single number stays whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    if tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor.to(mesh.device_type), mesh, (Shard(0),), src_data_rank=None)


def empty_shard(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    """A tensor to be filled; with a mesh, the shard of this rank."""
    if mesh is None or not size:
        return torch.zeros(size, dtype=dtype)
    from torch.distributed.tensor import Shard, zeros

    return zeros(size, dtype=dtype, device_mesh=mesh, placements=(Shard(0),))
