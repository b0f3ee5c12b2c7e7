"""Weights, their averages and the optimizer's state split over all processes, with torch's FSDP2."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

PLACEMENTS = (Shard(0),)  # how FSDP2 splits a parameter, so how all that belongs to it is split


def apply_fsdp(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of a module that holds one part of each parameter, and gathers the rest block by block as it is called.

    The blocks are what its `nn.ModuleList`s list. All processes must hold the same weights. The module itself stays
    whole on the CPU of the first process, to be filled by whoever wants all weights in one place, and is empty on the
    others. ValueError for a parameter that can not be split.
    """
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(f"shard: {scalars[0]} is a single number, which FSDP2 can not split; leave out --fsdp")
    parts = copy.deepcopy(module)
    module.to("cpu" if mesh.get_rank() == 0 else "meta")
    for blocks in reversed(list(parts.modules())):  # inner ones first
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                if not isinstance(block, nn.ModuleList):
                    fully_shard(block, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    return parts


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, which may be split over the processes: then each of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_tensor(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The part of a tensor that this process holds; a single number stays whole."""
    if tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor.to(mesh.device_type), mesh, PLACEMENTS, src_data_rank=None)


def empty_shard(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    """A tensor to be filled, of which this process holds its part where there is a mesh."""
    if mesh is None or not size:
        return torch.zeros(size, dtype=dtype)
    return zeros(size, dtype=dtype, device_mesh=mesh, placements=PLACEMENTS)
