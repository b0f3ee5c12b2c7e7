"""Weights, averages and optimizer state sharded over all ranks, with torch's FSDP2."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

PLACEMENTS = (Shard(0),)  # how FSDP2 shards a parameter, so how all that belongs to it is sharded


def apply_fsdp(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of a module that holds one shard of each parameter, and gathers the rest block by block as it is called.

    The blocks are what its `nn.ModuleList`s list. All ranks must hold the same weights. Side effect: the original
    module is moved to the CPU on rank 0 (to receive gathered weights) and to meta elsewhere. ValueError for a parameter
    that cannot be sharded.
    """
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(f"--fsdp: {scalars[0]} is a single number, which FSDP2 cannot shard; leave out --fsdp")
    sharded = copy.deepcopy(module)
    module.to("cpu" if mesh.get_rank() == 0 else "meta")
    for blocks in reversed(list(sharded.modules())):  # inner ones first
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                if not isinstance(block, nn.ModuleList):
                    fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded


def reshard(module: nn.Module) -> None:
    """Free gathered weights, which a forward without a backward leaves behind, and which the next step outdates."""
    if isinstance(module, FSDPModule):
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; a sharded one is gathered, so all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_tensor(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The shard of a tensor that this rank holds; a single number stays whole."""
    if tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor.to(mesh.device_type), mesh, PLACEMENTS, src_data_rank=None)


def empty_shard(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    """A tensor to be filled; with a mesh, the shard of this rank."""
    if mesh is None or not size:
        return torch.zeros(size, dtype=dtype)
    return zeros(size, dtype=dtype, device_mesh=mesh, placements=PLACEMENTS)
