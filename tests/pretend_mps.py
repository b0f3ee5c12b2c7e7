"""An Apple GPU that is not there: tensors that say they are on mps, compute on the CPU, and have no float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

PROPERTIES = {  # of a tensor, by the function that gets them
    Tensor.device.__get__: torch.device("mps:0"),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_mps.__get__: True,  # type: ignore[attr-defined]
}


class OnMPS(Tensor):
    """A tensor of the pretended GPU; what is computed from it is one, too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PROPERTIES:
            return PROPERTIES[func]
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")
        return checked(super().__torch_function__(func, types, args, kwargs))


class MPSMode(TorchFunctionMode):
    """Moves tensors to the pretended GPU, and from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cpu:
            return plain(args[0])
        if func is Tensor.to:
            return moved(func, *args, **kwargs)
        if str(kwargs.get("device", "")).startswith("mps"):
            out = func(*plain(args), **plain(kwargs) | {"device": "cpu"})
            return checked(out.as_subclass(OnMPS))
        return func(*args, **kwargs)


def moved(to: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, of and to both devices."""
    other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
    copy = kwargs.pop("copy", False)
    if other is None:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    else:
        device, dtype, memory_format = other.device, other.dtype, None
    device = tensor.device if device is None else device
    out = to(
        plain(tensor), "cpu", dtype or tensor.dtype, copy=copy, memory_format=memory_format or torch.preserve_format
    )
    return checked(out.as_subclass(OnMPS)) if device.type == "mps" else out


def plain(values: Any) -> Any:
    """The same on the CPU."""
    return tree_map_only(OnMPS, lambda tensor: tensor.as_subclass(Tensor), values)


def checked(values: Any) -> Any:
    """What is on the GPU, unless it is float64."""
    if any(isinstance(x, OnMPS) and x.dtype == torch.float64 for x in tree_leaves(values)):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return values


@contextmanager
def pretend_mps() -> Iterator[None]:
    """Within it `device="mps"` works."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with MPSMode():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
